"""Checks and converts the messages of an ExecContainer stream."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from gpudock.v1 import exec_pb2

from gpudock_server.model.engine import ExecRequest, TerminalSize
from gpudock_server.rpc.validation import fields
from gpudock_server.rpc.validation.violations import Violations

MAX_CHUNK_BYTES = 1024 * 1024

_MIN_TIMEOUT = timedelta(milliseconds=1)
_MAX_TIMEOUT = timedelta(days=30)
_MAX_TERMINAL_SIDE = 65535
# The size of a terminal if the caller gives none.
_DEFAULT_SIZE = TerminalSize(columns=80, rows=24)


@dataclass(frozen=True, slots=True)
class ExecStartRequest:
    """The converted first message. `timeout` is in seconds; None is no timeout."""

    container: str
    exec_id: str
    request: ExecRequest
    timeout: float | None


def start(message: exec_pb2.ExecContainerRequest | None) -> ExecStartRequest:
    """Convert the first message of a stream; None if the stream had no message."""
    violations = Violations()
    if message is None or message.WhichOneof("message") != "start":
        violations.add("start", "must be the first message")
        violations.raise_if_any()
    start_message = exec_pb2.ExecStart() if message is None else message.start
    start_violations = violations.at("start")
    found = ExecStartRequest(
        container=fields.name(start_violations, "container", start_message.container),
        exec_id=fields.optional_uuid(start_violations, "exec_id", start_message.exec_id),
        request=ExecRequest(
            command=fields.program(start_violations, "command", start_message.command),
            env=fields.environment(start_violations, "env", start_message.env),
            working_dir=fields.absolute_path(start_violations, "working_dir", start_message.working_dir)
            if start_message.working_dir
            else "",
            user=fields.user(start_violations, "user", start_message.user),
            tty=start_message.tty,
            stdin=start_message.stdin,
            size=_first_size(start_violations, start_message),
        ),
        timeout=_timeout(start_violations, start_message),
    )
    violations.raise_if_any()
    return found


def _first_size(violations: Violations, start_message: exec_pb2.ExecStart) -> TerminalSize | None:
    if start_message.HasField("size"):
        if not start_message.tty:
            violations.add("size", "must be unset without `tty`")
        return _size(violations.at("size"), start_message.size)
    return _DEFAULT_SIZE if start_message.tty else None


def _timeout(violations: Violations, start_message: exec_pb2.ExecStart) -> float | None:
    if not start_message.HasField("timeout"):
        return None
    span = fields.duration(violations, "timeout", start_message.timeout, _MIN_TIMEOUT, _MAX_TIMEOUT)
    return None if span is None else span.total_seconds()


def stdin(message: exec_pb2.ExecContainerRequest, *, enabled: bool, closed: bool) -> bytes:
    """Check a chunk of standard input."""
    violations = Violations()
    if not enabled:
        violations.add("stdin", "is allowed only if `start.stdin` is true")
    elif closed:
        violations.add("stdin", "must not follow `close_stdin`")
    if len(message.stdin) > MAX_CHUNK_BYTES:
        violations.add("stdin", f"must have at most {MAX_CHUNK_BYTES} bytes in one message")
    violations.raise_if_any()
    return message.stdin


def close_stdin(*, enabled: bool) -> None:
    """Check a `close_stdin` message; a second one has no effect."""
    if not enabled:
        violations = Violations()
        violations.add("close_stdin", "is allowed only if `start.stdin` is true")
        violations.raise_if_any()


def resize(message: exec_pb2.ExecContainerRequest, *, tty: bool) -> TerminalSize:
    """The new size of the terminal."""
    violations = Violations()
    if not tty:
        violations.add("resize", "is allowed only if `start.tty` is true")
    size = _size(violations.at("resize"), message.resize)
    violations.raise_if_any()
    return size


def signal(message: exec_pb2.ExecContainerRequest) -> str:
    """The name of the signal to send."""
    violations = Violations()
    name = fields.signal(violations.at("signal"), "signal", message.signal.signal)
    violations.raise_if_any()
    return name


def unexpected(message: exec_pb2.ExecContainerRequest) -> None:
    """Refuse a message that is not allowed after the first."""
    violations = Violations()
    if message.WhichOneof("message") == "start":
        violations.add("start", "must only be the first message")
    else:
        violations.add("message", "one of `stdin`, `close_stdin`, `resize` and `signal` is required")
    violations.raise_if_any()


def _size(violations: Violations, message: exec_pb2.TerminalSize) -> TerminalSize:
    return TerminalSize(
        columns=fields.in_range(violations, "columns", message.columns, 1, _MAX_TERMINAL_SIDE),
        rows=fields.in_range(violations, "rows", message.rows, 1, _MAX_TERMINAL_SIDE),
    )
