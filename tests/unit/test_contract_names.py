"""Every kind of drift, cause of a revision and reason of an error is expected by a test.

This shows that a test of the daemon has an assertion with the name (`assertion_syntax.py` says which expressions count;
comments, docstrings and requests do not). It does not show that the assertion is reached, that the test creates the
right situation, or that every place that reports the name is tested.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from gpudock.v1 import container_revision_pb2, drift_pb2, error_reason_pb2, volume_pb2
from gpudock_server import errors

from tests.unit.assertion_syntax import TESTS, AssertedExpression, asserted_expressions

# These tests run gpudockd on an engine and a store. In other tests a name may come from the input of the test.
_DRIFT_HELPERS = ("wait_for_drift", "wait_for_drift_log", "expect_drift")
_REAL = ("engine", "faults", "stateful", "vm")


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (TESTS / folder).rglob("*.py"))


@pytest.fixture(scope="module")
def real() -> list[AssertedExpression]:
    """What tests of the daemon assert."""
    return asserted_expressions([*_files(*_REAL), TESTS / "clients/test_against_daemon.py"])


@pytest.fixture(scope="module")
def server_wide(real: list[AssertedExpression]) -> list[AssertedExpression]:
    """What all tests of server code assert; not those that create errors of every class."""
    return [*real, *asserted_expressions([path for path in _files("rpc", "unit") if path.name != "test_errors.py"])]


def _values(names: list[str], prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in names} - {"UNSPECIFIED"}


_KINDS = _values(drift_pb2.DriftKind.keys(), "DRIFT_KIND_")
_REASONS = _values(error_reason_pb2.ErrorReason.keys(), "ERROR_REASON_")
_REVISION_CAUSES = _values(container_revision_pb2.RevisionCause.keys(), "REVISION_CAUSE_")
_VOLUME_CAUSES = _values(volume_pb2.VolumeRevisionCause.keys(), "VOLUME_REVISION_CAUSE_")


def test_every_kind_of_drift_is_expected_by_a_test(real: list[AssertedExpression]) -> None:
    assert {
        kind for kind in _KINDS if not any(asserted.names("DRIFT_KIND_", kind, *_DRIFT_HELPERS) for asserted in real)
    } == set()


@pytest.mark.parametrize(
    ("prefix", "causes"), [("REVISION_CAUSE_", _REVISION_CAUSES), ("VOLUME_REVISION_CAUSE_", _VOLUME_CAUSES)]
)
def test_every_cause_of_a_revision_is_expected_by_a_test(
    real: list[AssertedExpression], prefix: str, causes: set[str]
) -> None:
    assert {cause for cause in causes if not any(asserted.names(prefix, cause, prefix) for asserted in real)} == set()


def _errors_of(reason: str) -> set[str]:
    return {name for name, kind in inspect.getmembers(errors, inspect.isclass) if getattr(kind, "reason", "") == reason}


def _expects(asserted: AssertedExpression, reason: str) -> bool:
    # These words alone can be codes of gRPC or kinds of drift.
    if reason in _KINDS | set(grpc.StatusCode.__members__):
        named = asserted.names("ERROR_REASON_", reason, "reason", "err")
    else:
        named = reason in asserted.words
    return named or ("raises" in asserted.words and not asserted.words.isdisjoint(_errors_of(reason)))


def _unexpected_reasons(expressions: list[AssertedExpression]) -> Iterator[str]:
    return (reason for reason in sorted(_REASONS) if not any(_expects(asserted, reason) for asserted in expressions))


def test_every_reason_of_an_error_is_expected_by_a_test(server_wide: list[AssertedExpression]) -> None:
    never_raised = {"PERMISSION_DENIED"}
    assert set(_unexpected_reasons(server_wide)) - never_raised == set()


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
def test_which_expressions_count_as_expected(tmp_path: Path, text: str, counts: bool) -> None:  # noqa: FBT001 - a parameter of the test
    path = tmp_path / "test_one.py"
    path.write_text(f'"""GPU_BUSY."""\ndef test_one():\n    """GPU_BUSY."""\n    {text}\n')
    assert ("GPU_BUSY" not in _unexpected_reasons(asserted_expressions([path]))) == counts
