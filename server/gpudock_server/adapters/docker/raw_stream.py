"""A two-way byte stream to the engine that loses no data when either side closes."""

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

# Most bytes read ahead: more than a unix socket's buffer (208 KiB by default).
_BLOCK_BYTES = 512 * 1024
# Space before the block for what was left of the previous block, usually the beginning of a frame's header.
_MARGIN_BYTES = 64
# Most bytes sent per call: the kernel takes more as long as the engine reads, which would block the event loop.
_SEND_BYTES = 256 * 1024
# The engine forwards output in pieces, of 10 KiB on a busy host; forwarding each of them alone would cost a hundred
# thousand messages per gigabyte. So data that arrives within _BULK_GAP_SECONDS after at least _BULK_BYTES is a bulk
# transfer, which is gathered until a block is full or _GATHER_SECONDS have passed (the kernel rounds up to its clock).
# A block that is not filled in this time ends the bulk transfer. Other data, such as typed text, is delivered at once.
_BULK_GAP_SECONDS = 0.005
_BULK_BYTES = 4 * 1024
_GATHER_SECONDS = 0.002
# struct timeval
_TIMEVAL = struct.Struct("@ll")


class RawStream(Protocol):
    """A connection whose directions end separately. One task may receive while one other task sends."""

    async def wait(self) -> memoryview:
        """All received data that was not consumed, once new data has arrived; empty at the end of the stream.

        The view is valid until `consume` is called, and nothing may be awaited before that.
        """
        ...

    def consume(self, count: int) -> None:
        """Consume the first `count` bytes of the result of `wait`; the next `wait` returns the rest again.

        It returns immediately if `count` is more than 0. A `count` of 0 means that more data is needed: it returns
        after more has arrived.
        """
        ...

    async def send(self, data: bytes) -> bool:
        """Give all of `data` to the kernel; False if the other side has closed its receiving direction."""
        ...

    async def end(self) -> bool:
        """Close the sending direction while receiving continues. False if the connection cannot do that."""
        ...

    def close(self) -> None:
        """Close both directions immediately and wake waiting tasks. May be called again."""
        ...


async def open_raw_stream(address: EngineAddress) -> RawStream:
    """Connect to the engine. Raises OSError."""
    if address.tls is not None:
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=address.tls)
        return TlsRawStream(reader, writer)
    if address.path:
        return SocketRawStream(await _connect(socket.AF_UNIX, address.path))
    loop = asyncio.get_running_loop()
    resolved = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    for index, (family, _, _, _, socket_address) in enumerate(resolved):
        try:
            connected = await _connect(family, socket_address)
        except OSError:
            if index == len(resolved) - 1:
                raise
            continue
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return SocketRawStream(connected)
    raise OSError(errno.EADDRNOTAVAIL, f"host {address.host!r} has no address")


async def _connect(family: int, socket_address: object) -> socket.socket:
    new = socket.socket(family, socket.SOCK_STREAM)
    try:
        new.setblocking(False)  # noqa: FBT003 - the library's signature
        await asyncio.get_running_loop().sock_connect(new, socket_address)  # type: ignore[arg-type]  # a tuple or a path
    except BaseException:
        new.close()
        raise
    return new


def _slices(data: bytes) -> Iterator[memoryview]:
    view = memoryview(data)
    return (view[start : start + _SEND_BYTES] for start in range(0, len(view), _SEND_BYTES))


class _Block:
    """A receive buffer, and the position in it of data that was received and not consumed."""

    def __init__(self) -> None:
        # The kernel allocates only the pages that are used.
        self._space = memoryview(bytearray(_MARGIN_BYTES + _BLOCK_BYTES))
        self.start = self.end = _MARGIN_BYTES

    @property
    def content(self) -> memoryview:
        """Received data that was not consumed."""
        return self._space[self.start : self.end]

    @property
    def free_space(self) -> memoryview:
        """Where the next data is received."""
        return self._space[self.end :]

    def prepend(self, rest: bytes) -> None:
        """Insert what is left of another block before the content of this one."""
        if len(rest) > self.start:
            content = bytes(self.content)
            self._space = memoryview(bytearray(_MARGIN_BYTES + len(rest) + len(content) + _BLOCK_BYTES))
            self.start = _MARGIN_BYTES + len(rest)
            self.end = self.start + len(content)
            self.content[:] = content
        self.start -= len(rest)
        self._space[self.start : self.start + len(rest)] = rest

    def compact(self) -> None:
        """Move the content to the beginning, which frees the space behind it."""
        rest = bytes(self.content)
        self.start = self.end = _MARGIN_BYTES
        self.prepend(rest)


class SocketRawStream:
    """RawStream on a plain socket, without an asyncio transport.

    A transport closes both directions when a write fails. But writes fail when a process ends without having read its
    stdin, while its last output is still in the kernel: that output would be lost. Unlike the loop's `sock_recv`, this
    class stays registered between reads, which halves the CPU cost of small pieces.

    The event loop receives into one block. In a bulk transfer a thread receives into two blocks in turn: one is filled
    while the other is delivered. For the thread the socket is in blocking mode; the loop's reads and writes use
    MSG_DONTWAIT.
    """

    def __init__(self, connected: socket.socket) -> None:
        """Takes over the socket `connected`."""
        connected.settimeout(None)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(0, int(_GATHER_SECONDS * 1e6)))
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._receiver = ReceiveThread(connected, self._block_filled)
        # The block to deliver from, a spare one for bulk transfers, those that the thread fills, and filled ones.
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
        """See RawStream. Reads ahead up to 512 KiB, in a bulk transfer 1 MiB."""
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
        """Switch to a filled block, or start receiving."""
        if self._filled:
            self._switch_block()
        elif not (self._ended or self._filling or self._listening):
            self._block.compact()
            self._loop.add_reader(self._socket, self._receive)
            self._listening = True

    def _receive(self) -> None:
        """Called by the loop when data can be received."""
        try:
            count = self._socket.recv_into(self._block.free_space, 0, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            # The engine resets the connection if it has not read all input: that is a normal end.
            count = 0
        self._block.end += count
        full = not self._block.free_space
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
        # Until it is filled, the block belongs to the thread.
        self._filling.append(block)
        self._receiver.fill(block.free_space)

    def _block_filled(self, count: int | None) -> None:
        """Called by the loop when the thread is done with the first block of `_filling`."""
        block = self._filling.popleft()
        if self._closing:
            return
        block.end += count or 0
        self._receiving_in_thread = not block.free_space
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
        """Switch to the next filled block and insert the rest of the current one before it."""
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
        # The engine closes only its sending direction when the process ends. Closing both wakes a sending task.
        self._shut_down(socket.SHUT_RDWR)
        self._deliver()

    def _deliver(self) -> None:
        """Wake the task in `wait`, if there is data or the stream has ended."""
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
        writable = self._loop.create_future()
        self._loop.add_writer(self._socket, _resolve, writable)
        try:
            await writable
        finally:
            self._loop.remove_writer(self._socket)

    async def end(self) -> bool:
        """See RawStream. The kernel has all sent data already."""
        self._shut_down(socket.SHUT_WR)
        return True

    def close(self) -> None:
        """See RawStream."""
        self._stop_listening()
        self._ended = True
        self._closing = True
        self._deliver()
        # Ends a waiting send and receive. The descriptor must stay open until both have ended: once it is closed, a new
        # socket of this process may get the same number.
        self._shut_down(socket.SHUT_RDWR)
        self._receiver.close()
        if not self._sending:
            self._socket.close()

    def _shut_down(self, how: int) -> None:
        # The other side may have closed it already.
        with contextlib.suppress(OSError):
            self._socket.shutdown(how)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class TlsRawStream:
    """RawStream on TLS. It has no half-close: Python's ssl closes both directions or none."""

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
        """See RawStream: always False."""
        return False

    def close(self) -> None:
        """See RawStream."""
        self._writer.transport.abort()
