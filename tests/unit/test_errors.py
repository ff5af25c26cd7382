"""Every error has a message with its fields, and a reason that is in the contract."""

from __future__ import annotations

import ast
import re
import typing
from dataclasses import fields
from pathlib import Path

import pytest
from gpudock.v1 import error_reason_pb2
from gpudock_server import errors
from gpudock_server.errors import FieldViolation, GpudockError

_EXAMPLES: dict[object, object] = {
    str: "example",
    int: 7,
    tuple[str, ...]: ("one", "two"),
    tuple[FieldViolation, ...]: (FieldViolation("spec.image", "must be set"),),
    dict[str, str]: {"key": "value"},
}


def _subclasses(kind: type[GpudockError]) -> set[type[GpudockError]]:
    return {kind, *(found for child in kind.__subclasses__() for found in _subclasses(child))}


# Concrete errors; base classes begin with an underscore.
KINDS = sorted(
    (kind for kind in _subclasses(GpudockError) if not kind.__name__.startswith("_") and kind is not GpudockError),
    key=lambda kind: kind.__name__,
)


def example(kind: type[GpudockError]) -> GpudockError:
    hints = typing.get_type_hints(kind)
    return kind(**{field.name: _EXAMPLES[hints[field.name]] for field in fields(kind)})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_has_a_message_metadata_and_a_reason_of_the_contract(kind: type[GpudockError]) -> None:
    error = example(kind)
    assert error.message == str(error)
    assert all(isinstance(value, str) for value in error.metadata.values())
    assert f"ERROR_REASON_{error.reason}" in error_reason_pb2.ErrorReason.keys()  # noqa: SIM118 - a protobuf enum
    for word in ("{", "}", "self"):
        assert word not in error.message


def _raised() -> set[str]:
    """Return the names that the code of the daemon uses, except in `except` clauses and return annotations."""
    names = set()
    for path in Path(errors.__file__).parents[1].rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        caught = {
            id(name)
            for handler in ast.walk(tree)
            if isinstance(handler, ast.ExceptHandler) and handler.type is not None
            for name in ast.walk(handler.type)
        }
        annotations = {
            id(name)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None
            for name in ast.walk(node.returns)
        }
        names |= {
            node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in caught | annotations
        }
    return names


def test_every_error_is_raised_somewhere() -> None:
    # A class with subclasses is raised as one of these.
    assert {kind.__name__ for kind in KINDS if not kind.__subclasses__()} - _raised() == set()


def test_every_reason_of_the_contract_is_raised() -> None:
    names = _raised()
    raised = {f"ERROR_REASON_{kind.reason}" for kind in KINDS if kind.__name__ in names}
    promised = set(error_reason_pb2.ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}
    assert promised - raised == {"ERROR_REASON_PERMISSION_DENIED"}, "the contract has a reason that no code raises"


def test_the_contract_names_every_key_of_the_metadata() -> None:
    """The metadata in the contract: `a or b` is one of both or none; a key with `(optional: …)` may be missing."""
    text = (Path(__file__).parents[2] / "protos/gpudock/v1/error_reason.proto").read_text(encoding="utf-8")
    promised: dict[str, list[tuple[set[str], bool]]] = {}
    for comment, reason in re.findall(r"((?:  //[^\n]*\n)+)  ERROR_REASON_(\w+) = ", text):
        description = " ".join(line.strip().removeprefix("//").strip() for line in comment.splitlines())
        if "Metadata: " in description:
            keys = re.sub(r"\((optional)?[^)]*\)", r"\1", description.split("Metadata: ")[1]).rstrip(".")
            promised[reason] = [_promise(key) for key in keys.split(",") if key.strip() != "none"]
    for kind in KINDS:
        if kind is errors.OperationFailed:
            continue
        metadata = set(example(kind).metadata)
        for names, required in promised[kind.reason]:
            assert len(metadata & names) == 1 or (not required and not metadata & names), (kind, names)
        assert metadata <= {name for names, _ in promised[kind.reason] for name in names}, kind


def _promise(key: str) -> tuple[set[str], bool]:
    """Return the names that a key can have, and whether one of them is required."""
    names = set(key.removesuffix("optional").split(" or ")) if " or " in key else {key.removesuffix("optional")}
    return {name.strip() for name in names}, len(names) == 1 and not key.endswith("optional")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.VolumeTooSmallForData("data", 10 << 20, 65_576_960, 247_463_936),
            "volume 'data' cannot shrink to 10 MiB; its minimum size is 236 MiB (62.6 MiB used)",
        ),
        (
            errors.DiskFull("/d", needed_bytes=1_100_000, available_bytes=1_099_999),
            "/d has 1 MiB free; 1.1 MiB are needed",
        ),
        (
            errors.WrongNode(container="train", node="gpu2", address=""),
            "container 'train' is on node 'gpu2'; its daemon is not running or has no TCP address",
        ),
        (
            errors.VolumeOnOtherNode(node="gpu2", address="gpu2:50051", volume="data"),
            "volume 'data' is on node 'gpu2'; call its daemon at gpu2:50051",
        ),
        (
            errors.GpusOfRunningContainer(container="train", state="RUNNING"),
            (
                "container 'train' is RUNNING; StartContainer changes the GPUs of stopped containers only. Use"
                " ScaleContainer (`gpudock scale`)"
            ),
        ),
        (errors.VolumeNotFound("nope", ("plain", "data")), "volume 'nope' not found; existing volumes: plain, data"),
        (
            errors.VolumeMountedByRunning("data", ("train",)),
            (
                "volume 'data' is mounted by train; force removes a mount only from containers that are STOPPED or"
                " EXITED. Stop train first; roll back or delete a FAILED container"
            ),
        ),
    ],
)
def test_messages_say_what_is_wrong_and_what_would_be_right(error: GpudockError, message: str) -> None:
    assert str(error) == message
