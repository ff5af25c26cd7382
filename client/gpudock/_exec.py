"""Commands in a running container: their input, output and exit."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, TypeAlias, TypedDict, TypeVar, cast

import grpc
import grpc.aio

from gpudock._spec import Seconds, duration
from gpudock.errors import GpudockError, Internal, error_of
from gpudock.v1 import container_service_pb2
from gpudock.v1 import exec_pb2 as pb

T = TypeVar("T")

Call: TypeAlias = "grpc.aio.StreamStreamCall[pb.ExecContainerRequest, Event]"
Exec: TypeAlias = "grpc.aio.StreamStreamMultiCallable[pb.ExecContainerRequest, Event]"

# The size that the contract recommends for one message of stdin.
_STDIN_CHUNK = 64 * 1024
# The block is never touched, so it costs no memory.
_LARGE_BLOCK = 4 * 1024 * 1024
# One byte of tag and up to five of length.
_MAX_HEADER_BYTES = 6
_SIGNAL_BASE = 128
# Signals of Linux, which containers use also where this client runs on another system: signal(7).
_SIGNAL_NAMES = """
    HUP INT QUIT ILL TRAP ABRT BUS FPE KILL USR1 SEGV USR2 PIPE ALRM TERM STKFLT CHLD CONT STOP TSTP TTIN TTOU URG
    XCPU XFSZ VTALRM PROF WINCH IO PWR SYS
""".split()  # noqa: SIM905 - as a literal list it is a screen long
_SIGNAL_NUMBERS = {name: number for number, name in enumerate(_SIGNAL_NAMES, start=1)} | {
    "POLL": 29,
    "RTMIN": 34,
    "RTMAX": 64,
}
_UNKNOWN_SIGNAL = 127
_NOT_ENTERED = "the session is not open; use `async with ... as session`"


class ExecOptions(TypedDict, total=False):
    """How a command runs; by default as the container does. protos/gpudock/v1/exec.proto has the limits."""

    env: Mapping[str, str]
    working_dir: str
    user: str
    tty: bool
    stdin: bool
    size: tuple[int, int]
    """Columns and rows of the terminal, with `tty`."""
    timeout: Seconds
    """Seconds after which the command is killed."""
    exec_id: str


class Chunk(NamedTuple):
    """A piece of output. With a terminal, all output is `stdout`."""

    stream: Literal["stdout", "stderr"]
    data: bytes


Event: TypeAlias = "Chunk | pb.ExecContainerResponse"
"""A response of the server. Output is not wrapped in a message, since there may be much of it."""

# The tag of a bytes field is its number and wire type 2: https://protobuf.dev/programming-guides/encoding/#structure
_FIELDS = pb.ExecContainerResponse.DESCRIPTOR.fields_by_name
_STREAMS: Mapping[int, Literal["stdout", "stderr"]] = {
    _FIELDS["stdout"].number << 3 | 2: "stdout",
    _FIELDS["stderr"].number << 3 | 2: "stderr",
}
_SEVEN_BITS = 0x7F
_SERVICE = container_service_pb2.DESCRIPTOR.services_by_name["ContainerService"]


def exec_method(channel: grpc.aio.Channel) -> Exec:
    """Return the ExecContainer RPC with a decoder that copies output only once."""
    method = _SERVICE.methods_by_name["ExecContainer"]
    return channel.stream_stream(
        f"/{_SERVICE.full_name}/{method.name}",
        request_serializer=pb.ExecContainerRequest.SerializeToString,
        response_deserializer=decode_response,
    )


def decode_response(raw: bytes) -> Event:
    """Decode an ExecContainerResponse: one field of output by hand, anything else by protobuf."""
    stream = _STREAMS.get(raw[0]) if raw else None
    # https://protobuf.dev/programming-guides/encoding/#varints
    length = 0
    for position, byte in enumerate(raw[1:_MAX_HEADER_BYTES] if stream else b""):
        length |= (byte & _SEVEN_BITS) << (7 * position)
        if byte <= _SEVEN_BITS:
            data = raw[position + 2 :]
            if stream is not None and len(data) == length:
                return Chunk(stream, data)
            break
    return pb.ExecContainerResponse.FromString(raw)


@cache
def raise_mmap_threshold() -> None:
    """Make glibc keep freed memory, up to 8 MiB in each arena, instead of returning it to the kernel.

    Otherwise each message of half a megabyte needs fresh pages, which takes half of the time of reading. glibc adapts
    its threshold to the largest block that the process has freed, so this frees one of 4 MiB. See M_MMAP_THRESHOLD in
    https://man7.org/linux/man-pages/man3/mallopt.3.html. With another libc this has no effect.
    """
    bytes(_LARGE_BLOCK)


@dataclass(frozen=True, slots=True)
class ExecExit:
    """How a command ended: by `signal` (such as `SIGKILL`) if it is set, else with the exit code `code`."""

    code: int | None
    signal: str
    message: str
    timed_out: bool

    @property
    def returncode(self) -> int:
        """The exit code as in a shell: `code`, or 128 plus the number of the signal."""
        return _SIGNAL_BASE + _signal_number(self.signal) if self.code is None else self.code


@dataclass(frozen=True, slots=True)
class Completed:
    """The output and the exit of a command."""

    stdout: bytes
    stderr: bytes
    exit: ExecExit
    truncated: bool
    """Whether output was discarded because of the limit."""

    @property
    def returncode(self) -> int:
        """The exit code as in a shell."""
        return self.exit.returncode


class ExecSession:
    """A running command, as an async context manager. Leaving it before the command has ended sends SIGHUP.

    Output that is not read blocks the command: read `output` until it ends, then call `exit`. Other tasks may send
    input meanwhile. A command is never started twice: a broken connection raises an error, and the server ends the
    command.
    """

    def __init__(self, converse: Callable[[], Call], start: pb.ExecStart) -> None:
        self._open_call = converse
        self._start = start
        self._call: Call | None = None
        self._events: AsyncIterator[Event] | None = None
        self._recorded_status: grpc.aio.AioRpcError | None = None
        self._reading = asyncio.Lock()
        self._writing = asyncio.Lock()
        self._exit: ExecExit | None = None
        self._error: GpudockError | None = None
        self.exec_id: str = start.exec_id
        """The id of this command; generated by the server if the caller gave none."""

    async def __aenter__(self) -> Self:
        raise_mmap_threshold()
        self._call = self._open_call()
        self._call.add_done_callback(self._record_status)
        # Not by `read`: after a failed write, `read` drops responses that have arrived; the iterator returns them.
        self._events = aiter(self._call)
        try:
            with contextlib.suppress(BrokenPipeError):  # the call was refused; the next read has the reason
                await self._send(pb.ExecContainerRequest(start=self._start))
            await self._read_started()
        except BaseException:
            self._call.cancel()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._call is not None:
            self._call.cancel()

    async def output(self) -> AsyncIterator[Chunk]:
        """Yield the output of the command until it ends. Only one task may read."""
        while self._exit is None:
            event = await self._read()
            if isinstance(event, Chunk):
                yield event

    async def exit(self) -> ExecExit:
        """Wait for the exit of the command and return it; unread output is discarded."""
        async for _ in self.output():
            pass
        if self._exit is None:
            raise Internal("the stream ended before the command did", code=grpc.StatusCode.INTERNAL)
        return self._exit

    async def write(self, data: bytes) -> None:
        """Write `data` to the stdin of the command; blocks while the command reads slowly.

        Raises:
            BrokenPipeError: the command has ended.
        """
        for begin in range(0, len(data), _STDIN_CHUNK):
            await self._send(pb.ExecContainerRequest(stdin=data[begin : begin + _STDIN_CHUNK]))

    async def close_stdin(self) -> None:
        """Close the stdin of the command. Raises BrokenPipeError once the command has ended."""
        await self._send(pb.ExecContainerRequest(close_stdin=pb.ExecCloseStdin()))

    async def resize(self, columns: int, rows: int) -> None:
        """Set the size of the terminal. Raises BrokenPipeError once the command has ended."""
        await self._send(pb.ExecContainerRequest(resize=pb.TerminalSize(columns=columns, rows=rows)))

    async def signal(self, signal: str | int) -> None:
        """Send a signal, such as `SIGTERM` or 15. Raises BrokenPipeError once the command has ended."""
        await self._send(pb.ExecContainerRequest(signal=pb.ExecSignal(signal=str(signal))))

    async def _read_started(self) -> None:
        while self._exit is None:
            event = await self._read()
            if not isinstance(event, Chunk) and event.HasField("started"):
                self.exec_id = event.started.exec_id
                return

    async def _read(self) -> Event:
        async with self._reading:
            if self._error is not None:
                raise self._error
            try:
                event = await self._receive()
                if not isinstance(event, Chunk) and event.HasField("exited"):
                    self._exit = _exit_of(event.exited)
                    await self._read_to_end()
            except GpudockError as error:
                self._error = error
                raise
        return event

    async def _receive(self) -> Event:
        if self._events is None:
            raise RuntimeError(_NOT_ENTERED)
        try:
            return await anext(self._events)
        except StopAsyncIteration:
            raise Internal("the stream ended before the command did", code=grpc.StatusCode.INTERNAL) from None
        except grpc.aio.AioRpcError as failure:
            raise error_of(self._original_failure(failure)) from failure

    def _record_status(self, call: Any) -> None:  # noqa: ANN401 - the stubs' type of a done callback is wider than a call
        self._recorded_status = grpc.aio.AioRpcError(
            _result_without_waiting(call.code()),
            _result_without_waiting(call.initial_metadata()),
            _result_without_waiting(call.trailing_metadata()),
            _result_without_waiting(call.details()),
            None,
        )

    def _original_failure(self, failure: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """Return the status of the server: grpc.aio replaces it with INTERNAL if a write fails as the call ends.

        https://github.com/grpc/grpc/issues/36066
        """
        first = self._recorded_status
        if failure.code() is grpc.StatusCode.INTERNAL and first is not None and first.code() is not grpc.StatusCode.OK:
            return first
        return failure

    async def _read_to_end(self) -> None:
        """Wait until the server ends the stream; cancelling it would look like a client that disconnected."""
        with contextlib.suppress(GpudockError):
            await self._receive()

    async def _send(self, message: pb.ExecContainerRequest) -> None:
        async with self._writing:
            call = self._entered_call()
            if self._exit is not None or call.done():
                raise BrokenPipeError("the command has ended")
            try:
                await call.write(message)
            except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError) as failure:
                raise BrokenPipeError("the command has ended") from failure

    def _entered_call(self) -> Call:
        if self._call is None:
            raise RuntimeError(_NOT_ENTERED)
        return self._call


def exec_start(container: str, command: Sequence[str], options: ExecOptions) -> pb.ExecStart:
    """Return the first message of an exec stream."""
    start = pb.ExecStart(
        container=container,
        exec_id=options.get("exec_id", ""),
        command=command,
        env=options.get("env", {}),
        working_dir=options.get("working_dir", ""),
        user=options.get("user", ""),
        tty=options.get("tty", False),
        stdin=options.get("stdin", False),
    )
    if "size" in options:
        columns, rows = options["size"]
        start.size.CopyFrom(pb.TerminalSize(columns=columns, rows=rows))
    if "timeout" in options:
        start.timeout.CopyFrom(duration(options["timeout"]))
    return start


async def collect(session: ExecSession, stdin: bytes | None, limit: int) -> Completed:
    """Run a session until the command exits and keep the first `limit` bytes of stdout and of stderr."""
    kept = {"stdout": bytearray(), "stderr": bytearray()}
    truncated = False
    async with session, _sending_stdin(session, stdin):
        async for stream, data in session.output():
            remaining = limit - len(kept[stream])
            kept[stream] += data[:remaining]
            truncated = truncated or len(data) > remaining
        exited = await session.exit()
    return Completed(bytes(kept["stdout"]), bytes(kept["stderr"]), exited, truncated)


@asynccontextmanager
async def _sending_stdin(session: ExecSession, stdin: bytes | None) -> AsyncIterator[None]:
    """Send `stdin` while output is read: a command that writes before it has read all input would block otherwise."""
    feeding = asyncio.create_task(_send_stdin(session, stdin))
    try:
        yield
    finally:
        feeding.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await feeding


async def _send_stdin(session: ExecSession, stdin: bytes | None) -> None:
    # A command may end without reading all of its input.
    with contextlib.suppress(BrokenPipeError):
        if stdin is not None:
            await session.write(stdin)
            await session.close_stdin()


def _exit_of(exited: pb.ExecExited) -> ExecExit:
    code = exited.code if exited.HasField("code") else None
    return ExecExit(code=code, signal=exited.signal, message=exited.message, timed_out=exited.timed_out)


def _signal_number(name: str) -> int:
    """Return the number of a signal such as `SIGTERM` or `SIGRTMIN+3`; 127, which is no signal, for an unknown name."""
    for sign in "+-":
        base, found, offset = name.partition(sign)
        if found and offset.isdecimal():
            return _signal_number(base) + int(sign + offset)
    return _SIGNAL_NUMBERS.get(name.removeprefix("SIG"), _UNKNOWN_SIGNAL)


def _result_without_waiting(answer: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that does not wait; a task for it would run too late."""
    try:
        answer.send(None)
    except StopIteration as end:
        return cast("T", end.value)
    answer.close()
    raise RuntimeError("a finished call has no status")
