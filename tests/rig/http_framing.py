"""HTTP/1.1 messages on asyncio streams, without changing a byte: heads, and where bodies end (RFC 9112)."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass

CHUNK = 1 << 16
HEAD_LIMIT = 1 << 20


@dataclass(frozen=True)
class Head:
    """The first line and the headers of a request or a response, parsed and raw."""

    raw: bytes
    first_line: list[str]
    headers: dict[str, str]
    """By name in lower case; of repeated headers the last."""

    @property
    def upgrades(self) -> bool:
        """Whether the request asks for an upgrade of the connection to a raw stream."""
        return "upgrade" in self.headers.get("connection", "").lower()

    @property
    def status(self) -> int:
        """The status of a response."""
        return int(self.first_line[1])

    @property
    def chunked(self) -> bool:
        """Whether the transfer encoding of the body is chunked."""
        return self.headers.get("transfer-encoding", "").lower() == "chunked"

    @property
    def length(self) -> int | None:
        """The length of the body in bytes; None without a Content-Length."""
        text = self.headers.get("content-length")
        return None if text is None else int(text)

    @property
    def closes(self) -> bool:
        """Whether the connection ends with this message."""
        return "close" in self.headers.get("connection", "").lower()


class Peer:
    """A connection to a client or to the engine: the writer, and the reader with a byte that was read too early."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._early = b""
        self.writer = writer

    async def read_head(self) -> Head | None:
        """Read the head of the next message; None at the end of the connection."""
        try:
            raw = self._take_early() + await self._reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return None
        lines = raw.decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines[1:] if line)
        headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        return Head(raw, lines[0].split(" ", 2), headers)

    async def read_some(self) -> bytes:
        """Read the next bytes; b"" at the end."""
        return self._take_early() or await self._reader.read(CHUNK)

    async def until_gone(self) -> None:
        """Return when the other side closes. If it sends a byte first, keep that byte and wait forever."""
        self._early += await self._reader.read(1)
        if self._early:
            await asyncio.Event().wait()

    async def body(self, head: Head) -> AsyncIterator[bytes]:
        """The raw bytes of the body that follows the head, with its chunk framing."""
        if head.chunked:
            while True:
                size = await self._reader.readuntil(b"\r\n")
                yield size
                if not int(size.split(b";")[0], 16):
                    break
                async for piece in self._exactly(int(size.split(b";")[0], 16) + 2):
                    yield piece
            while (line := await self._reader.readuntil(b"\r\n")) != b"\r\n":
                yield line
            yield b"\r\n"
        elif head.length:
            async for piece in self._exactly(head.length):
                yield piece

    async def send(self, data: bytes) -> None:
        """Write, and wait until the buffer has space again."""
        self.writer.write(data)
        await self.writer.drain()

    def abort(self) -> None:
        """Close immediately, without sending buffered data."""
        self.writer.transport.abort()

    async def close(self) -> None:
        """Close once all buffered data has been sent."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def _exactly(self, count: int) -> AsyncIterator[bytes]:
        while count:
            piece = self._take_early() or await self._reader.read(min(count, CHUNK))
            if not piece:
                raise ConnectionResetError("the body ended early")
            count -= len(piece)
            yield piece

    def _take_early(self) -> bytes:
        early, self._early = self._early, b""
        return early


def answer(status: int, message: str) -> bytes:
    """An error answer of the engine: {"message": ...}."""
    body = json.dumps({"message": message}).encode()
    head = f"HTTP/1.1 {status} Injected\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
