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

from gpudock_server.adapters.docker.address import Address
from gpudock_server.adapters.docker.flow import Flow

# Read ahead at most: more than a unix socket holds (208 KiB by default).
_BLOCK = 512 * 1024
# Before it there is space for what was left of the block before: in practice the beginning of a frame's header.
_MARGIN = 64
# Sent at once at most. The kernel takes as much as the engine reads meanwhile, however long that holds up the loop.
_SLICE = 256 * 1024
# The engine passes output on as it gets it, 10 KiB at a time on a busy host, and whoever forwards each piece by itself
# pays for a hundred thousand messages a gigabyte. So what closely follows (seconds) a piece of some size (bytes) is a
# flow, and is gathered: until there is a block of it, or for a moment (seconds; the kernel rounds up to its clock). A
# moment that was too short for a block ends the flow. What comes alone, or is as small as what people and protocols say
# to each other, is given at once.
_CLOSELY = 0.005
_SOME_SIZE = 4 * 1024
_MOMENT = 0.002
# struct timeval
_TIMEVAL = struct.Struct("@ll")


class Wire(Protocol):
    """A connection whose two directions end separately. One task receives and one sends; both may wait at once."""

    async def wait(self) -> memoryview:
        """All that has come and was not taken, once there is something new in it; empty when no more will come.

        The view is good until `taken` is called, and nothing may be awaited before.
        """
        ...

    def taken(self, count: int) -> None:
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


async def open_wire(address: Address) -> Wire:
    """Connect. Raises OSError."""
    if address.tls is not None:
        reader, writer = await asyncio.open_connection(address.host, address.port, ssl=address.tls)
        return TlsWire(reader, writer)
    if address.path:
        return SocketWire(await _connected(socket.AF_UNIX, address.path))
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
        return SocketWire(connected)
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
    return (view[start : start + _SLICE] for start in range(0, len(view), _SLICE))


class _Block:
    """Space for what comes, and where in it lies what has come and was not taken."""

    def __init__(self) -> None:
        # Touched only as far as it is used.
        self._space = memoryview(bytearray(_MARGIN + _BLOCK))
        self.start = self.end = _MARGIN

    @property
    def content(self) -> memoryview:
        """What has come and was not taken."""
        return self._space[self.start : self.end]

    @property
    def room(self) -> memoryview:
        """Where the next goes."""
        return self._space[self.end :]

    def put_before(self, rest: bytes) -> None:
        """Put what was left elsewhere before what has come here."""
        if len(rest) > self.start:
            content = bytes(self.content)
            self._space = memoryview(bytearray(_MARGIN + len(rest) + len(content) + _BLOCK))
            self.start = _MARGIN + len(rest)
            self.end = self.start + len(content)
            self.content[:] = content
        self.start -= len(rest)
        self._space[self.start : self.start + len(rest)] = rest

    def tidy(self) -> None:
        """Make room behind what is left."""
        rest = bytes(self.content)
        self.start = self.end = _MARGIN
        self.put_before(rest)


class SocketWire:
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
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(0, int(_MOMENT * 1e6)))
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._flow = Flow(connected, self._flowed)
        # What is given away, now or when it has come; and another for a flow, if neither of the next two has it.
        self._block = _Block()
        self._spare: _Block | None = None
        self._filling: deque[_Block] = deque()
        self._filled: deque[_Block] = deque()
        self._flowing = False
        self._flow_until = 0.0
        self._ripe = False
        self._ended = False
        self._listening = False
        self._waiter: asyncio.Future[None] | None = None
        self._sending = False
        self._closing = False

    async def wait(self) -> memoryview:
        """See Wire. While this task is busy elsewhere up to 512 KiB are read ahead, twice that in a flow."""
        if not self._ripe:
            self._go_on()
        while not self._ripe and not self._ended:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        content = self._block.content
        if not self._ripe:
            return content[:0]
        self._ripe = False
        return content

    def taken(self, count: int) -> None:
        """See Wire."""
        self._block.start += count
        self._flow_until = self._loop.time() + _CLOSELY if count >= _SOME_SIZE else 0.0
        self._ripe = count > 0 and self._block.start < self._block.end
        if self._flowing and not self._ripe:
            self._go_on()

    def _go_on(self) -> None:
        """See to it that something comes."""
        if self._filled:
            self._turn_over()
        elif not (self._ended or self._filling or self._listening):
            self._block.tidy()
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
        elif self._ripe or full or self._loop.time() >= self._flow_until:
            self._ripen()
        else:
            self._stop_listening()
            self._fill(self._block)
            self._fill(self._spare or _Block())
            self._spare = None

    def _fill(self, block: _Block) -> None:
        # Nothing else touches it until it is filled.
        self._filling.append(block)
        self._flow.fill(block.room)

    def _flowed(self, count: int | None) -> None:
        """Called by the loop when the first of those that are being filled is done."""
        block = self._filling.popleft()
        if self._closing:
            return
        block.end += count or 0
        self._flowing = not block.room
        if block is self._block:
            self._ripen()
        elif count:
            self._filled.append(block)
        else:
            self._spare = block
        if count == 0:
            self._end()
        elif not self._ripe and self._waiter is not None:
            self._go_on()

    def _turn_over(self) -> None:
        """Go on with the next filled block, what was left of this one before it."""
        spent, self._block = self._block, self._filled.popleft()
        self._block.put_before(bytes(spent.content))
        spent.start = spent.end
        spent.tidy()
        if self._flowing:
            self._fill(spent)
        else:
            self._spare = spent
        self._ripen()

    def _end(self) -> None:
        self._ended = True
        # The engine ends its side when the process is gone, but goes on holding the other. Wakes who sends.
        self._shut_down(socket.SHUT_RDWR)
        self._ripen()

    def _ripen(self) -> None:
        """What there is, is given away."""
        self._ripe = self._block.start < self._block.end
        if self._waiter is not None and not self._waiter.done() and (self._ripe or self._ended):
            self._waiter.set_result(None)

    def _stop_listening(self) -> None:
        if self._listening:
            self._loop.remove_reader(self._socket)
            self._listening = False

    async def send(self, data: bytes) -> bool:
        """See Wire."""
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
        self._loop.add_writer(self._socket, _settle, room)
        try:
            await room
        finally:
            self._loop.remove_writer(self._socket)

    async def end(self) -> bool:
        """See Wire. All that was sent is with the kernel already."""
        self._shut_down(socket.SHUT_WR)
        return True

    def close(self) -> None:
        """See Wire."""
        self._stop_listening()
        self._ended = True
        self._closing = True
        self._ripen()
        # Ends a send that waits, and a receive. The descriptor must outlive both: they know it by its number, which the
        # next socket of this process may be given as soon as this one is closed.
        self._shut_down(socket.SHUT_RDWR)
        self._flow.close()
        if not self._sending:
            self._socket.close()

    def _shut_down(self, how: int) -> None:
        # The other side may have gone first.
        with contextlib.suppress(OSError):
            self._socket.shutdown(how)


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class TlsWire:
    """A TLS connection. It has no half-close: Python's ssl ends both directions or none."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._rest = b""
        self._news = False
        writer.transport.set_write_buffer_limits(high=_SLICE)

    async def wait(self) -> memoryview:
        """See Wire."""
        if not self._news:
            try:
                data = await self._reader.read(_BLOCK)
            except (ConnectionError, ssl.SSLError):
                data = b""
            self._rest = self._rest + data if data else b""
        self._news = False
        return memoryview(self._rest)

    def taken(self, count: int) -> None:
        """See Wire."""
        self._rest = self._rest[count:]
        self._news = count > 0 and len(self._rest) > 0

    async def send(self, data: bytes) -> bool:
        """See Wire."""
        try:
            for piece in _slices(data):
                self._writer.write(piece)
                await self._writer.drain()
        except ConnectionError:
            return False
        return True

    async def end(self) -> bool:
        """See Wire: it cannot."""
        return False

    def close(self) -> None:
        """See Wire."""
        self._writer.transport.abort()
