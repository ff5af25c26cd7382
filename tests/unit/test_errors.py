"""Every error says what it must: a message from its fields, and a reason that is in the contract."""

from __future__ import annotations

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
KINDS = sorted(GpudockError.__subclasses__(), key=lambda kind: kind.__name__)
# With those below them, which have sentences of their own.
ALL_KINDS = (*KINDS, *(special for kind in KINDS for special in kind.__subclasses__()))


def example(kind: type[GpudockError]) -> GpudockError:
    hints = typing.get_type_hints(kind, vars(errors))
    return kind(**{field.name: _EXAMPLES[hints[field.name]] for field in fields(kind)})


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind.__name__)
def test_error(kind: type[GpudockError]) -> None:
    error = example(kind)
    assert error.message == str(error)
    assert all(isinstance(value, str) for value in error.metadata.values())
    assert f"ERROR_REASON_{error.reason}" in error_reason_pb2.ErrorReason.keys()  # noqa: SIM118 (a protobuf enum)
    for word in ("{", "}", "self"):
        assert word not in error.message


def test_every_reason_of_the_contract_is_raised() -> None:
    raised = {f"ERROR_REASON_{kind.reason}" for kind in KINDS}
    promised = set(error_reason_pb2.ErrorReason.keys()) - {"ERROR_REASON_UNSPECIFIED"}
    assert promised - raised == {"ERROR_REASON_PERMISSION_DENIED"}, "what nothing raises is not in the contract"


def test_the_contract_names_every_key_of_the_metadata() -> None:
    text = (Path(__file__).parents[2] / "protos/gpudock/v1/error_reason.proto").read_text(encoding="utf-8")
    promised = {}
    for comment, reason in re.findall(r"((?:  //[^\n]*\n)+)  ERROR_REASON_(\w+) = ", text):
        said = " ".join(line.strip().removeprefix("//").strip() for line in comment.splitlines())
        if "Metadata: " in said:
            keys = re.sub(r"\([^)]*\)", "", said.split("Metadata: ")[1]).rstrip(".")
            promised[reason] = {key.strip() for key in keys.split(",")} - {"none"}
    for kind in KINDS:
        if kind is not errors.Recorded:
            assert set(example(kind).metadata) == promised[kind.reason], kind.reason


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            errors.VolumeTooSmallForData("data", 10 << 20, 65_576_960, 247_463_936),
            (
                "volume 'data' cannot shrink to 10 MiB; the smallest size that it can have now is 236 MiB"
                " (62.6 MiB in use)"
            ),
        ),
        (
            errors.DiskFull("/d", needed_bytes=1_100_000, available_bytes=1_099_999),
            "/d has 1 MiB free; 1.1 MiB are needed",
        ),
        (
            errors.WrongNode(container="train", node="gpu2", address=""),
            "container 'train' is on node 'gpu2'; the daemon there does not run, or listens on a unix socket alone",
        ),
        (
            errors.VolumeElsewhere(container="", node="gpu2", address="gpu2:50051", volume="data"),
            "volume 'data' is on node 'gpu2'; call the daemon there, at gpu2:50051",
        ),
        (
            errors.GpusOfRunningContainer(container="train", state="RUNNING"),
            (
                "container 'train' is RUNNING; StartContainer gives other GPUs to a stopped container only, use"
                " ScaleContainer (`gpudock scale`)"
            ),
        ),
        (errors.VolumeNotFound("nope", ("plain", "data")), "there is no volume 'nope'; existing volumes: plain, data"),
        (
            errors.VolumeMountedByRunning("data", ("train",)),
            (
                "volume 'data' is mounted by train; force removes a mount from stopped containers only, so stop"
                " train first"
            ),
        ),
    ],
)
def test_a_sentence_says_what_would_be_right(error: GpudockError, message: str) -> None:
    assert str(error) == message
