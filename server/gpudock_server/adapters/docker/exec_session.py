"""ports.ExecSession on a hijacked connection: the output of a process as fast as the engine gives it."""

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any, Final, Self

from gpudock_server.adapters.docker.connection import Connection, JsonAnswer
from gpudock_server.adapters.docker.failures import BAD_REQUEST, NOT_FOUND, engine_errors
from gpudock_server.adapters.docker.hijack import hijack
from gpudock_server.adapters.docker.raw_stream import RawStream
from gpudock_server.errors import EngineRejected, EngineUnavailable
from gpudock_server.model.engine import ExecRequest, ExecStatus, ExecStream

HEADER_BYTES: Final = 8
# A frame is a header (stream, three zeros, length as a big-endian uint32) and its payload:
# https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
_HEADER = struct.Struct(">BxxxL")
_STDOUT: Final = 1


# From here on an exec is born with its size; before, it is told afterwards.
_CONSOLE_SIZE_API_VERSION: Final = (1, 42)
# Should the end of its output overtake the news of its end: seconds to wait for that, and between two questions.
_EXIT_CODE_TIMEOUT_SECONDS: Final = 2.0
_EXIT_CODE_POLL_SECONDS: Final = 0.01
# What a keyboard sends for "that was all". At the beginning of a line it ends the input, elsewhere the line.
_END_OF_INPUT: Final = b"\x04"
# Typed into a TTY these keys make the engine drop the session, by default ctrl-p ctrl-q, and it keeps back the first
# of them until it has seen the next: shells use ctrl-p all the time. Nobody types this.
_DETACH_KEYS: Final = "ctrl-@,ctrl-^,ctrl-@,ctrl-_"


class DockerExecSession:
    """Implements ports.ExecSession. Made by `start`; `close` must be called.

    One task reads and one writes. Nothing is read ahead: what is not read waits in the engine and holds the process
    back. Without a TTY the two outputs are told apart; with one, all is STDOUT.
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
        self._resize_task: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, connection: Connection, engine_id: str, request: ExecRequest) -> Self:
        """Create the exec and start it. Raises EngineRejected (409 where the container does not run or is paused)."""
        answer: JsonAnswer = await connection.call(
            "prepare a process", "POST", f"containers/{engine_id}/exec", body=_create(connection, request)
        )
        with engine_errors("prepare a process"):
            exec_id = str(answer["Id"])
        start: dict[str, Any] = {"Detach": False, "Tty": request.tty}
        start |= _size(connection, request)
        stream = await hijack(connection, "start a process", f"exec/{exec_id}/start", start)
        session = cls(connection, engine_id, exec_id, stream, request)
        if request.tty and request.size and connection.version < _CONSOLE_SIZE_API_VERSION:
            # In the background: such an engine keeps the question until the process has begun.
            session._resize_task = asyncio.create_task(session._resize_quietly(*request.size))
        return session

    async def read(self) -> AsyncIterator[tuple[ExecStream, bytes]]:
        """Chunks of up to 512 KiB, as large as what is there. Ends with the output, or with the engine.

        An engine that dies looks like the end of the output: only `status` tells which of the two it was.
        """
        frames = None if self._request.tty else FrameDecoder()
        while block := await self._stream.wait():
            if frames is None:
                chunks, used = [(ExecStream.STDOUT, bytes(block))], len(block)
            else:
                chunks, used = frames.take(block)
            self._stream.consume(used)
            for chunk in chunks:
                yield chunk
        self._ended = not self._closed

    async def write(self, data: bytes) -> None:
        """Give `data` to its stdin; returns when the kernel has taken it, so that little waits here.

        After the process has ended, or closed its stdin, it is dropped, as a pipe would.
        """
        if data:
            self._mid_line = data[-1:] not in b"\r\n"
            await self._stream.send(data)

    async def close_stdin(self) -> None:
        """End its stdin; its output goes on. Nothing to do for a process without stdin.

        A terminal has no end: it is given what its user would type, Ctrl-D. Raises EngineRejected over TLS, which
        cannot be closed on one side.
        """
        if not self._request.stdin:
            return
        if self._request.tty:
            # The engine answers a half-close by dropping the terminal's output.
            await self._stream.send(_END_OF_INPUT * (2 if self._mid_line else 1))
        elif not await self._stream.end():
            detail = "a TLS connection cannot be closed on one side; use a unix socket, or end the process by a signal"
            raise EngineRejected(call="end the stdin of a process", status=BAD_REQUEST, detail=detail)

    async def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal a new size; one that has ended is no error."""
        params = {"h": str(rows), "w": str(columns)}
        try:
            await self._connection.call("resize a terminal", "POST", f"exec/{self._exec_id}/resize", params=params)
        except EngineRejected:
            if (await self.status()).running:
                raise

    async def _resize_quietly(self, rows: int, columns: int) -> None:
        # A process that could not start has no terminal; what became of it the stream and `status` tell.
        try:
            await self.resize(rows, columns)
        except (EngineRejected, EngineUnavailable):
            return

    async def status(self) -> ExecStatus:
        """How the process stands; neither running nor with an exit code when its container was removed meanwhile.

        After its output has ended this waits up to 2 s for its exit code. Raises EngineUnavailable where the engine
        does not answer, or was restarted meanwhile and knows nothing of the process.
        """
        status = await self._ask()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _EXIT_CODE_TIMEOUT_SECONDS
        while self._ended and status.running and loop.time() < deadline:
            await asyncio.sleep(_EXIT_CODE_POLL_SECONDS)
            status = await self._ask()
        return status

    async def _ask(self) -> ExecStatus:
        call = "tell how a process stands"
        try:
            answer: JsonAnswer = await self._connection.call(call, "GET", f"exec/{self._exec_id}/json")
        except EngineRejected as rejection:
            if rejection.status == NOT_FOUND:
                return await self._status_after_not_found(call, rejection)
            raise
        with engine_errors(call):
            code = answer["ExitCode"]
            # Neither running nor ended is what the engine says of one that is about to start.
            return ExecStatus(running=code is None, exit_code=code, pid=int(answer.get("Pid") or 0))

    async def _status_after_not_found(self, call: str, rejection: EngineRejected) -> ExecStatus:
        """The engine forgets a process with its container, or because it was itself restarted."""
        try:
            await self._connection.call(call, "GET", f"containers/{self._engine_id}/json")
        except EngineRejected as gone:
            if gone.status != NOT_FOUND:
                raise
            return ExecStatus(running=False, exit_code=None, pid=0)
        raise EngineUnavailable(call=call, detail="it was restarted and no longer knows the process") from rejection

    async def close(self) -> None:
        """Let go of the connection; the process is not touched. Whoever reads gets the end. May be called again."""
        if self._resize_task is not None:
            self._resize_task.cancel()
            self._resize_task = None
        self._closed = True
        self._stream.close()


def _create(connection: Connection, request: ExecRequest) -> JsonAnswer:
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


def _size(connection: Connection, request: ExecRequest) -> JsonAnswer:
    if request.tty and request.size and connection.version >= _CONSOLE_SIZE_API_VERSION:
        return {"ConsoleSize": list(request.size)}
    return {}


class FrameDecoder:
    """Takes blocks as they come, cut anywhere, and gives back what each output said."""

    def __init__(self) -> None:
        self._stream = ExecStream.STDOUT
        self._missing = 0

    def take(self, block: memoryview) -> tuple[list[tuple[ExecStream, bytes]], int]:
        """The chunks in `block`, and how many of its bytes were used: all but the beginning of a header at its end.

        Neighbouring frames of one stream become one chunk; order is kept. Payloads are copied, once.
        """
        chunks: list[tuple[ExecStream, bytes]] = []
        stream = self._stream
        pieces = [block[: self._missing]]
        position = len(pieces[0])
        missing = self._missing - position
        last = len(block) - HEADER_BYTES
        # Short, for a gigabyte has a hundred thousand frames.
        while position <= last and not missing:
            kind, length = _HEADER.unpack_from(block, position)
            # 2 is stderr; 3 is the engine's own error, which belongs there too.
            speaker = ExecStream.STDOUT if kind <= _STDOUT else ExecStream.STDERR
            if speaker is not stream:
                chunks.append((stream, b"".join(pieces)))
                stream, pieces = speaker, []
            position += HEADER_BYTES
            piece = block[position : position + length]
            pieces.append(piece)
            position += len(piece)
            missing = length - len(piece)
        chunks.append((stream, b"".join(pieces)))
        self._stream, self._missing = stream, missing
        return [chunk for chunk in chunks if chunk[1]], position
