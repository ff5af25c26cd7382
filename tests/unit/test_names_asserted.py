"""Every kind of drift, cause of a revision and reason of an error is what some test expects.

What this shows: for each name there is an assertion, in a test of the real thing, that expects the name or something
that is made of it (`asserted.py` says which expressions count; a comment, a docstring or a request does not). What it
does not show: that the assertion is reached, that the scene before it is a good one, or that every place that says the
name is tested. Whether assertions are reached shows when the tests run; for the others somebody has to read them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from gpudock.v1 import container_revision_pb2, drift_pb2, error_reason_pb2, volume_pb2
from gpudock_server import errors

from tests.unit.asserted import TESTS, Asserted, asserted_in

# These run gpudockd on an engine and a store. Everywhere else a name may come out of what the test itself put in.
_REAL = ("engine", "faults", "stateful", "vm")


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (TESTS / folder).rglob("*.py"))


@pytest.fixture(scope="module")
def real() -> list[Asserted]:
    """What tests of the whole daemon assert."""
    return asserted_in([*_files(*_REAL), TESTS / "clients/test_against_daemon.py"])


@pytest.fixture(scope="module")
def of_the_server(real: list[Asserted]) -> list[Asserted]:
    """That, and what tests of the server's parts assert; not those that make errors of every class."""
    return [*real, *asserted_in([path for path in _files("rpc", "unit") if path.name != "test_errors.py"])]


def _values(names: list[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in names} - {"UNSPECIFIED"}


_KINDS = _values(drift_pb2.DriftKind.keys(), "DRIFT_KIND_")
_REASONS = _values(error_reason_pb2.ErrorReason.keys(), "ERROR_REASON_")
_REVISION_CAUSES = _values(container_revision_pb2.RevisionCause.keys(), "REVISION_CAUSE_")
_VOLUME_CAUSES = _values(volume_pb2.VolumeRevisionCause.keys(), "VOLUME_REVISION_CAUSE_")


def test_every_kind_of_drift_is_expected_by_a_test(real: list[Asserted]) -> None:
    assert {
        kind for kind in _KINDS if not any(one.says("DRIFT_KIND_", kind, "found", "logged") for one in real)
    } == set()


@pytest.mark.parametrize(
    ("prefix", "causes"), [("REVISION_CAUSE_", _REVISION_CAUSES), ("VOLUME_REVISION_CAUSE_", _VOLUME_CAUSES)]
)
def test_every_cause_of_a_revision_is_expected_by_a_test(real: list[Asserted], prefix: str, causes: set[str]) -> None:
    assert {cause for cause in causes if not any(one.says(prefix, cause, prefix) for one in real)} == set()


def _of_reason(reason: str) -> set[str]:
    return {name for name, kind in inspect.getmembers(errors, inspect.isclass) if getattr(kind, "reason", "") == reason}


def _expects(one: Asserted, reason: str) -> bool:
    # These words alone may be gRPC's codes or kinds of drift.
    if reason in _KINDS | set(grpc.StatusCode.__members__):
        named = one.says("ERROR_REASON_", reason, "reason", "err")
    else:
        named = reason in one.words
    return named or ("raises" in one.words and not one.words.isdisjoint(_of_reason(reason)))


def _unexpected_reasons(asserted: list[Asserted]) -> Iterator[str]:
    return (reason for reason in sorted(_REASONS) if not any(_expects(one, reason) for one in asserted))


def test_every_reason_of_an_error_is_expected_by_a_test(of_the_server: list[Asserted]) -> None:
    promised_only = {"PERMISSION_DENIED"}
    assert set(_unexpected_reasons(of_the_server)) - promised_only == set()


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ('assert one.reason == "GPU_BUSY"', True),
        ('assert [one.reason for one in all_of_them] == ["GPU_BUSY"]', True),
        ('expected = {"a": "GPU_BUSY"}\n    assert one.reason == expected["a"]', True),
        ('for text in ("GPU_BUSY",):\n        assert text in err', True),
        ("with pytest.raises(GpuBusy):\n        call()", True),
        ('# "GPU_BUSY"\n    assert one', False),
        ('assert one, "GPU_BUSY"', False),
        ('assert one.reason != "GPU_BUSY"', False),
        ('assert not one.reason == "GPU_BUSY"', False),
        ('assert "GPU_BUSY" not in err', False),
        ('assert one.reason in ("GPU_BUSY", "GPU_EXHAUSTED")', False),
        ('assert one.reason == "GPU_BUSY" or one.reason == "GPU_EXHAUSTED"', False),
        ('call("GPU_BUSY")\n    assert one', False),
        ("try:\n        call()\n    except GpuBusy:\n        pass", False),
    ],
)
def test_what_counts_as_expected(tmp_path: Path, text: str, counts: bool) -> None:  # noqa: FBT001 - a parameter of the test
    path = tmp_path / "test_one.py"
    path.write_text(f'"""GPU_BUSY."""\ndef test_one():\n    """GPU_BUSY."""\n    {text}\n')
    assert ("GPU_BUSY" not in _unexpected_reasons(asserted_in([path]))) == counts
