"""ports.ExecSession on a hijacked connection."""

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any, Final, Self

from gpudock_server.adapters.docker.connection import Connection
from gpudock_server.adapters.docker.failures import BAD_REQUEST, NOT_FOUND, engine_errors, is_program_missing
from gpudock_server.adapters.docker.hijack import hijack
from gpudock_server.adapters.docker.raw_stream import RawStream
from gpudock_server.adapters.docker.translate import Json
from gpudock_server.errors import EngineRejected, EngineUnavailable
from gpudock_server.model.engine import ExecRequest, ExecStatus, ExecStream, TerminalSize

HEADER_BYTES: Final = 8
# A frame is a header (stream, three zeros, length as a big-endian uint32) and its payload:
# https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
_HEADER = struct.Struct(">BxxxL")
_STDOUT: Final = 1

# From this version on an exec is created with its terminal size; before, it has to be resized after its start.
_CONSOLE_SIZE_API_VERSION: Final = (1, 42)
# The output may end before the engine knows the exit code: how long to wait for the code, and how often to ask.
_EXIT_CODE_TIMEOUT_SECONDS: Final = 2.0
_EXIT_CODE_POLL_SECONDS: Final = 0.01
# If a program cannot be started, the engine writes its error, with this ending, as the first output.
_START_ERROR_SUFFIX: Final = b"\r\n"
_EXIT_NOT_EXECUTABLE: Final = 126
_EXIT_NOT_FOUND: Final = 127
# Ctrl-D. At the beginning of a line it ends the input, elsewhere it ends the line.
_END_OF_INPUT: Final = b"\x04"
# The engine drops a TTY session in which these keys are typed, and holds back the first key until the next one. The
# default, ctrl-p ctrl-q, would delay ctrl-p, which shells use; users do not type this sequence.
_DETACH_KEYS: Final = "ctrl-@,ctrl-^,ctrl-@,ctrl-_"


class DockerExecSession:
    """Implements ports.ExecSession. Created by `start`; `close` must be called.

    One task may read and one may write. Unread output waits in the engine and blocks the process. Without a TTY, stdout
    and stderr are separate; with a TTY all output is STDOUT.
    """

    def __init__(
        self, connection: Connection, engine_id: str, exec_id: str, stream: RawStream, request: ExecRequest
    ) -> None:
        self._connection = connection
        self._engine_id = engine_id
        self._exec_id = exec_id
        self._stream = stream
        self._request = request
        self._ended = False
        self._closed = False
        self._mid_line = False
        self._start_error = ""
        self._resize_task: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, connection: Connection, engine_id: str, request: ExecRequest) -> Self:
        """Create and start an exec. Raises EngineRejected (409 if the container is paused or not running)."""
        answer: Json = await connection.call(
            "create an exec", "POST", f"containers/{engine_id}/exec", body=_create(connection, request)
        )
        with engine_errors("create an exec"):
            exec_id = str(answer["Id"])
        start: dict[str, Any] = {"Detach": False, "Tty": request.tty}
        start |= _size(connection, request)
        stream = await hijack(connection, "start an exec", f"exec/{exec_id}/start", start)
        session = cls(connection, engine_id, exec_id, stream, request)
        if request.tty and request.size and connection.version < _CONSOLE_SIZE_API_VERSION:
            # In the background: such an engine answers only after the process has started.
            session._resize_task = asyncio.create_task(session._resize_quietly(request.size))
        return session

    async def read(self) -> AsyncIterator[tuple[ExecStream, bytes]]:
        """Chunks of all output available, up to 512 KiB each. Ends with the output, or with the engine.

        An engine that dies looks like the end of the output: `status` tells them apart. Where the program cannot be
        started, `status` has the engine's error, which is not output.
        """
        frames = None if self._request.tty else FrameDecoder()
        first = True
        while block := await self._stream.wait():
            if frames is None:
                chunks, used = [(ExecStream.STDOUT, bytes(block))], len(block)
            else:
                chunks, used = frames.decode(block)
            self._stream.consume(used)
            for stream, data in chunks:
                if not (first and await self._is_start_error(data)):
                    yield stream, data
                first = False
        self._ended = not self._closed

    async def _is_start_error(self, data: bytes) -> bool:
        """Whether the first output is an error of the engine, which `status` then reports."""
        if data.endswith(_START_ERROR_SUFFIX):
            status = await self._inspect()
            if status.pid == 0 and status.exit_code in (_EXIT_NOT_EXECUTABLE, _EXIT_NOT_FOUND):
                self._start_error = data.decode(errors="replace").strip()
        return bool(self._start_error)

    async def write(self, data: bytes) -> None:
        """Write `data` to the stdin; returns once the kernel has all of it.

        Data for a process that has ended or closed its stdin is dropped, as by a pipe.
        """
        if data:
            self._mid_line = data[-1:] not in b"\r\n"
            await self._stream.send(data)

    async def close_stdin(self) -> None:
        """Close the stdin; output continues. Does nothing for a process without stdin.

        The stdin of a terminal cannot be closed: it gets Ctrl-D. Raises EngineRejected over TLS (no half-close).
        """
        if not self._request.stdin:
            return
        if self._request.tty:
            # After a half-close the engine drops the terminal's output.
            await self._stream.send(_END_OF_INPUT * (2 if self._mid_line else 1))
        elif not await self._stream.end():
            detail = (
                "over TLS, stdin cannot be closed without closing the output;"
                " use a unix socket or end the process with a signal"
            )
            raise EngineRejected(call="close the stdin of an exec", status=BAD_REQUEST, detail=detail)

    async def resize(self, size: TerminalSize) -> None:
        """Set the terminal's size; an exec that has ended is no error."""
        params = {"h": str(size.rows), "w": str(size.columns)}
        try:
            await self._connection.call("resize a terminal", "POST", f"exec/{self._exec_id}/resize", params=params)
        except EngineRejected:
            if (await self.status()).running:
                raise

    async def _resize_quietly(self, size: TerminalSize) -> None:
        # A process that could not start has no terminal; the stream and `status` report that.
        try:
            await self.resize(size)
        except (EngineRejected, EngineUnavailable):
            return

    async def status(self) -> ExecStatus:
        """The state of the process. If its container was removed, it is not running and has no exit code.

        After the end of the output this waits up to 2 s for the exit code. Raises EngineUnavailable if the engine does
        not answer, or was restarted and has lost the exec.
        """
        status = await self._inspect()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _EXIT_CODE_TIMEOUT_SECONDS
        while self._ended and status.running and loop.time() < deadline:
            await asyncio.sleep(_EXIT_CODE_POLL_SECONDS)
            status = await self._inspect()
        return status

    async def _inspect(self) -> ExecStatus:
        call = "inspect an exec"
        try:
            answer: Json = await self._connection.call(call, "GET", f"exec/{self._exec_id}/json")
        except EngineRejected as rejection:
            if rejection.status == NOT_FOUND:
                return await self._status_after_not_found(call, rejection)
            raise
        with engine_errors(call):
            code, pid = answer["ExitCode"], int(answer.get("Pid") or 0)
        if is_program_missing(self._start_error):
            # The engine reports 126 also where the program was not found.
            code = _EXIT_NOT_FOUND
        # Not the engine's Running: it is false before the start, when there is no exit code either.
        return ExecStatus(running=code is None, exit_code=code, pid=pid, start_error=self._start_error)

    async def _status_after_not_found(self, call: str, rejection: EngineRejected) -> ExecStatus:
        """The engine loses an exec when its container is removed, or when the engine restarts; only the first is ok."""
        try:
            await self._connection.call(call, "GET", f"containers/{self._engine_id}/json")
        except EngineRejected as no_container:
            if no_container.status != NOT_FOUND:
                raise
            return ExecStatus(running=False, exit_code=None, pid=0)
        raise EngineUnavailable(call=call, detail="the engine was restarted and has lost the exec") from rejection

    async def close(self) -> None:
        """Close the connection, which ends `read` and leaves the process alone. May be called again."""
        if self._resize_task is not None:
            self._resize_task.cancel()
            self._resize_task = None
        self._closed = True
        self._stream.close()


def _create(connection: Connection, request: ExecRequest) -> Json:
    return {
        "AttachStdin": request.stdin,
        "AttachStdout": True,
        "AttachStderr": True,
        "Tty": request.tty,
        "DetachKeys": _DETACH_KEYS,
        "Cmd": list(request.command),
        "Env": [f"{name}={value}" for name, value in request.env.items()],
        "WorkingDir": request.working_dir,
        "User": request.user,
        **_size(connection, request),
    }


def _size(connection: Connection, request: ExecRequest) -> Json:
    if request.tty and request.size and connection.version >= _CONSOLE_SIZE_API_VERSION:
        return {"ConsoleSize": [request.size.rows, request.size.columns]}
    return {}


class FrameDecoder:
    """Decodes the engine's multiplexed output from blocks that may end anywhere, also within a frame."""

    def __init__(self) -> None:
        self._stream = ExecStream.STDOUT
        self._missing = 0

    def decode(self, block: memoryview) -> tuple[list[tuple[ExecStream, bytes]], int]:
        """The chunks in `block`, and how many of its bytes were used: all but an incomplete header at its end.

        Adjacent frames of the same stream become one chunk; order is kept. Payloads are copied once.
        """
        chunks: list[tuple[ExecStream, bytes]] = []
        stream = self._stream
        pieces = [block[: self._missing]]
        position = len(pieces[0])
        missing = self._missing - position
        last = len(block) - HEADER_BYTES
        # Kept small, because a gigabyte has a hundred thousand frames.
        while position <= last and not missing:
            kind, length = _HEADER.unpack_from(block, position)
            # 2 is stderr; 3 is an error of the engine, which goes to stderr too.
            source = ExecStream.STDOUT if kind <= _STDOUT else ExecStream.STDERR
            if source is not stream:
                chunks.append((stream, b"".join(pieces)))
                stream, pieces = source, []
            position += HEADER_BYTES
            piece = block[position : position + length]
            pieces.append(piece)
            position += len(piece)
            missing = length - len(piece)
        chunks.append((stream, b"".join(pieces)))
        self._stream, self._missing = stream, missing
        return [chunk for chunk in chunks if chunk[1]], position
