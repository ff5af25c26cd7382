"""Messages of ExecContainer: the first one, and those after it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from gpudock.v1 import exec_pb2

from gpudock_server.model.engine import ExecRequest
from gpudock_server.rpc.validation import fields
from gpudock_server.rpc.validation.violations import Violations

MAX_CHUNK_BYTES = 1024 * 1024

_MIN_TIMEOUT = timedelta(milliseconds=1)
_MAX_TIMEOUT = timedelta(days=30)
_MAX_TERMINAL_SIDE = 65535
# Rows and columns of a terminal whose size nobody says.
_DEFAULT_SIZE = (24, 80)


@dataclass(frozen=True, slots=True)
class ExecStartRequest:
    """What to run and where. `timeout` in seconds; None is without end."""

    container: str
    exec_id: str
    request: ExecRequest
    timeout: float | None


def start(message: exec_pb2.ExecContainerRequest | None) -> ExecStartRequest:
    """Check the first message of the stream; None is a stream that had none."""
    violations = Violations()
    if message is None or message.WhichOneof("message") != "start":
        violations.add("start", "is required: it is the first message")
        violations.raise_if_any()
    asked = exec_pb2.ExecStart() if message is None else message.start
    here = violations.at("start")
    found = ExecStartRequest(
        container=fields.name(here, "container", asked.container),
        exec_id=fields.optional_uuid(here, "exec_id", asked.exec_id),
        request=ExecRequest(
            command=fields.program(here, "command", asked.command),
            env=fields.environment(here, "env", asked.env),
            working_dir=fields.absolute_path(here, "working_dir", asked.working_dir) if asked.working_dir else "",
            user=fields.user(here, "user", asked.user),
            tty=asked.tty,
            stdin=asked.stdin,
            size=_first_size(here, asked),
        ),
        timeout=_timeout(here, asked),
    )
    violations.raise_if_any()
    return found


def _first_size(violations: Violations, asked: exec_pb2.ExecStart) -> tuple[int, int] | None:
    if asked.HasField("size"):
        if not asked.tty:
            violations.add("size", "is only for `tty`")
        return _size(violations.at("size"), asked.size)
    return _DEFAULT_SIZE if asked.tty else None


def _timeout(violations: Violations, asked: exec_pb2.ExecStart) -> float | None:
    if not asked.HasField("timeout"):
        return None
    span = fields.duration(violations, "timeout", asked.timeout, _MIN_TIMEOUT, _MAX_TIMEOUT)
    return None if span is None else span.total_seconds()


def stdin(message: exec_pb2.ExecContainerRequest, *, enabled: bool, closed: bool) -> bytes:
    """Check a chunk of standard input."""
    violations = Violations()
    if not enabled:
        violations.add("stdin", "is only sent after a `start` with `stdin`")
    elif closed:
        violations.add("stdin", "was closed by `close_stdin`")
    if len(message.stdin) > MAX_CHUNK_BYTES:
        violations.add("stdin", f"must have at most {MAX_CHUNK_BYTES} bytes in one message")
    violations.raise_if_any()
    return message.stdin


def close_stdin(*, enabled: bool) -> None:
    """Check the end of standard input; a second one changes nothing."""
    if not enabled:
        violations = Violations()
        violations.add("close_stdin", "is only sent after a `start` with `stdin`")
        violations.raise_if_any()


def resize(message: exec_pb2.ExecContainerRequest, *, tty: bool) -> tuple[int, int]:
    """The rows and columns that a terminal is to have."""
    violations = Violations()
    if not tty:
        violations.add("resize", "is only sent after a `start` with `tty`")
    size = _size(violations.at("resize"), message.resize)
    violations.raise_if_any()
    return size


def signal(message: exec_pb2.ExecContainerRequest) -> str:
    """The signal that a process is to get."""
    violations = Violations()
    name = fields.signal(violations.at("signal"), "signal", message.signal.signal)
    violations.raise_if_any()
    return name


def unexpected(message: exec_pb2.ExecContainerRequest) -> None:
    """Refuse what cannot come after the first message."""
    violations = Violations()
    if message.WhichOneof("message") == "start":
        violations.add("start", "is the first message and no other one")
    else:
        violations.add("message", "one of `stdin`, `close_stdin`, `resize` and `signal` is required")
    violations.raise_if_any()


def _size(violations: Violations, message: exec_pb2.TerminalSize) -> tuple[int, int]:
    return (
        fields.in_range(violations, "rows", message.rows, 1, _MAX_TERMINAL_SIDE),
        fields.in_range(violations, "columns", message.columns, 1, _MAX_TERMINAL_SIDE),
    )
