"""Bytes both ways between us and the engine, with nothing in between that could lose any."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import struct
from collections import deque
from collections.abc import Iterator
from typing import Protocol

from gpudock_server.adapters.docker.address import EngineAddress
from gpudock_server.adapters.docker.receive_thread import ReceiveThread

# Read ahead at most: more than a unix socket holds (208 KiB by default).
_BLOCK_BYTES = 512 * 1024
# Before it there is space for what was left of the block before: in practice the beginning of a frame's header.
_MARGIN_BYTES = 64
# Sent at once at most. The kernel takes as much as the engine reads meanwhile, however long that holds up the loop.
_SEND_BYTES = 256 * 1024
# The engine passes output on as it gets it, 10 KiB at a time on a busy host, and whoever forwards each piece by itself
# pays for a hundred thousand messages a gigabyte. So what closely follows (seconds) a piece of some size (bytes) is a
# flow, and is gathered: until there is a block of it, or for a moment (seconds; the kernel rounds up to its clock). A
# moment that was too short for a block ends the flow. What comes alone, or is as small as what people and protocols say
# to each other, is given at once.
_BULK_GAP_SECONDS = 0.005
_BULK_BYTES = 4 * 1024
_GATHER_SECONDS = 0.002
# struct timeval
_TIMEVAL = struct.Struct("@ll")


class RawStream(Protocol):
    """A connection whose two directions end separately. One task receives and one sends; both may wait at once."""

    async def wait(self) -> memoryview:
        """All that has come and was not taken, once there is something new in it; empty when no more will come.

        The view is good until `taken` is called, and nothing may be awaited before.
        """
        ...

    def consume(self, count: int) -> None:
        """The first `count` bytes of what `wait` gave are done with; the rest comes again.

        It comes at once if any were taken. 0 says that it is too little to make sense of: it comes with what follows.
        """
        ...

    async def send(self, data: bytes) -> bool:
        """Give all of `data` to the kernel; False when the other side has stopped listening."""
        ...

    async def end(self) -> bool:
        """Send no more, while receiving goes on. False where the wire cannot do that."""
        ...

    def close(self) -> None:
        """End both directions at once; whoever waits is woken. May be called again."""
        ...


async def open_raw_stream(address: EngineAddress) -> RawStream:
    """Connect. Raises OSError."""
    if address.tls is not None:
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=address.tls)
        return TlsRawStream(reader, writer)
    if address.path:
        return SocketRawStream(await _connected(socket.AF_UNIX, address.path))
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    for index, (family, _, _, _, where) in enumerate(found):
        try:
            connected = await _connected(family, where)
        except OSError:
            if index == len(found) - 1:
                raise
            continue
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return SocketRawStream(connected)
    raise OSError(errno.EADDRNOTAVAIL, f"{address.host} has no address")


async def _connected(family: int, where: object) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setblocking(False)  # noqa: FBT003 - the library's signature
        await asyncio.get_running_loop().sock_connect(made, where)  # type: ignore[arg-type]  # a tuple or a path
    except BaseException:
        made.close()
        raise
    return made


def _slices(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[start : start + _SEND_BYTES] for start in range(0, len(view), _SEND_BYTES))


class _Block:
    """Space for what comes, and where in it lies what has come and was not taken."""

    def __init__(self) -> None:
        # Touched only as far as it is used.
        self._space = memoryview(bytearray(_MARGIN_BYTES + _BLOCK_BYTES))
        self.start = self.end = _MARGIN_BYTES

    @property
    def content(self) -> memoryview:
        """What has come and was not taken."""
        return self._space[self.start : self.end]

    @property
    def room(self) -> memoryview:
        """Where the next goes."""
        return self._space[self.end :]

    def prepend(self, rest: bytes) -> None:
        """Put what was left elsewhere before what has come here."""
        if len(rest) > self.start:
            content = bytes(self.content)
            self._space = memoryview(bytearray(_MARGIN_BYTES + len(rest) + len(content) + _BLOCK_BYTES))
            self.start = _MARGIN_BYTES + len(rest)
            self.end = self.start + len(content)
            self.content[:] = content
        self.start -= len(rest)
        self._space[self.start : self.start + len(rest)] = rest

    def compact(self) -> None:
        """Make room behind what is left."""
        rest = bytes(self.content)
        self.start = self.end = _MARGIN_BYTES
        self.prepend(rest)


class SocketRawStream:
    """A plain socket without a transport.

    A transport gives up both directions as soon as one write fails. But a process that ends without having read its
    stdin makes our writes fail while its last output still lies in the kernel: it would be lost. And unlike the
    loop's `sock_recv`, this stays registered between reads, which halves the CPU that small pieces cost.

    What comes is received by the loop into one block, or, in a flow, by a thread into two in turn: one fills while the
    other is given away. For the thread the socket is blocking; the loop's own reads and writes say each that they do
    not wait.
    """

    def __init__(self, connected: socket.socket) -> None:
        """`connected` is this wire's from now on."""
        connected.settimeout(None)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(0, int(_GATHER_SECONDS * 1e6)))
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._receiver = ReceiveThread(connected, self._block_filled)
        # What is given away, now or when it has come; and another for a flow, if neither of the next two has it.
        self._block = _Block()
        self._spare_block: _Block | None = None
        self._filling: deque[_Block] = deque()
        self._filled: deque[_Block] = deque()
        self._receiving_in_thread = False
        self._bulk_until = 0.0
        self._deliverable = False
        self._ended = False
        self._listening = False
        self._waiter: asyncio.Future[None] | None = None
        self._sending = False
        self._closing = False

    async def wait(self) -> memoryview:
        """See RawStream. While this task is busy elsewhere up to 512 KiB are read ahead, twice that in a flow."""
        if not self._deliverable:
            self._ensure_receiving()
        while not self._deliverable and not self._ended:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        content = self._block.content
        if not self._deliverable:
            return content[:0]
        self._deliverable = False
        return content

    def consume(self, count: int) -> None:
        """See RawStream."""
        self._block.start += count
        self._bulk_until = self._loop.time() + _BULK_GAP_SECONDS if count >= _BULK_BYTES else 0.0
        self._deliverable = count > 0 and self._block.start < self._block.end
        if self._receiving_in_thread and not self._deliverable:
            self._ensure_receiving()

    def _ensure_receiving(self) -> None:
        """See to it that something comes."""
        if self._filled:
            self._switch_block()
        elif not (self._ended or self._filling or self._listening):
            self._block.compact()
            self._loop.add_reader(self._socket, self._receive)
            self._listening = True

    def _receive(self) -> None:
        """Called by the loop when there is something to receive."""
        try:
            count = self._socket.recv_into(self._block.room, 0, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            # A reset is an end like any other: it is how an engine hangs up on input that nobody has read.
            count = 0
        self._block.end += count
        full = not self._block.room
        if count == 0 or full:
            self._stop_listening()
        if count == 0:
            self._end()
        elif self._deliverable or full or self._loop.time() >= self._bulk_until:
            self._deliver()
        else:
            self._stop_listening()
            self._fill(self._block)
            self._fill(self._spare_block or _Block())
            self._spare_block = None

    def _fill(self, block: _Block) -> None:
        # Nothing else touches it until it is filled.
        self._filling.append(block)
        self._receiver.fill(block.room)

    def _block_filled(self, count: int | None) -> None:
        """Called by the loop when the first of those that are being filled is done."""
        block = self._filling.popleft()
        if self._closing:
            return
        block.end += count or 0
        self._receiving_in_thread = not block.room
        if block is self._block:
            self._deliver()
        elif count:
            self._filled.append(block)
        else:
            self._spare_block = block
        if count == 0:
            self._end()
        elif not self._deliverable and self._waiter is not None:
            self._ensure_receiving()

    def _switch_block(self) -> None:
        """Go on with the next filled block, what was left of this one before it."""
        spent, self._block = self._block, self._filled.popleft()
        self._block.prepend(bytes(spent.content))
        spent.start = spent.end
        spent.compact()
        if self._receiving_in_thread:
            self._fill(spent)
        else:
            self._spare_block = spent
        self._deliver()

    def _end(self) -> None:
        self._ended = True
        # The engine ends its side when the process is gone, but goes on holding the other. Wakes who sends.
        self._shut_down(socket.SHUT_RDWR)
        self._deliver()

    def _deliver(self) -> None:
        """What there is, is given away."""
        self._deliverable = self._block.start < self._block.end
        if self._waiter is not None and not self._waiter.done() and (self._deliverable or self._ended):
            self._waiter.set_result(None)

    def _stop_listening(self) -> None:
        if self._listening:
            self._loop.remove_reader(self._socket)
            self._listening = False

    async def send(self, data: bytes) -> bool:
        """See RawStream."""
        if self._socket.fileno() < 0:
            return False
        self._sending = True
        try:
            for piece in _slices(data):
                await self._send_all(piece)
                await asyncio.sleep(0)
        except ConnectionError:
            return False
        finally:
            self._sending = False
            if self._closing:
                self._socket.close()
        return True

    async def _send_all(self, piece: memoryview) -> None:
        while piece:
            try:
                piece = piece[self._socket.send(piece, socket.MSG_DONTWAIT) :]
            except (BlockingIOError, InterruptedError):
                await self._writable()

    async def _writable(self) -> None:
        room = self._loop.create_future()
        self._loop.add_writer(self._socket, _resolve, room)
        try:
            await room
        finally:
            self._loop.remove_writer(self._socket)

    async def end(self) -> bool:
        """See RawStream. All that was sent is with the kernel already."""
        self._shut_down(socket.SHUT_WR)
        return True

    def close(self) -> None:
        """See RawStream."""
        self._stop_listening()
        self._ended = True
        self._closing = True
        self._deliver()
        # Ends a send that waits, and a receive. The descriptor must outlive both: they know it by its number, which the
        # next socket of this process may be given as soon as this one is closed.
        self._shut_down(socket.SHUT_RDWR)
        self._receiver.close()
        if not self._sending:
            self._socket.close()

    def _shut_down(self, how: int) -> None:
        # The other side may have gone first.
        with contextlib.suppress(OSError):
            self._socket.shutdown(how)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class TlsRawStream:
    """A TLS connection. It has no half-close: Python's ssl ends both directions or none."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._rest = b""
        self._has_unread = False
        writer.transport.set_write_buffer_limits(high=_SEND_BYTES)

    async def wait(self) -> memoryview:
        """See RawStream."""
        if not self._has_unread:
            try:
                data = await self._reader.read(_BLOCK_BYTES)
            except (ConnectionError, ssl.SSLError):
                data = b""
            self._rest = self._rest + data if data else b""
        self._has_unread = False
        return memoryview(self._rest)

    def consume(self, count: int) -> None:
        """See RawStream."""
        self._rest = self._rest[count:]
        self._has_unread = count > 0 and len(self._rest) > 0

    async def send(self, data: bytes) -> bool:
        """See RawStream."""
        try:
            for piece in _slices(data):
                self._writer.write(piece)
                await self._writer.drain()
        except ConnectionError:
            return False
        return True

    async def end(self) -> bool:
        """See RawStream: it cannot."""
        return False

    def close(self) -> None:
        """See RawStream."""
        self._writer.transport.abort()
