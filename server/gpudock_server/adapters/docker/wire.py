"""Bytes both ways between us and the engine, with nothing in between that could lose any."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
import ssl
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from gpudock_server.adapters.docker.address import Address

# Read ahead at most: more than a unix socket holds (208 KiB by default).
_BLOCK = 512 * 1024
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


class SocketWire:
    """A plain socket without a transport.

    A transport gives up both directions as soon as one write fails. But a process that ends without having read its
    stdin makes our writes fail while its last output still lies in the kernel: it would be lost. And unlike the
    loop's `sock_recv`, this stays registered between reads, which halves the CPU that small pieces cost.

    A flow is gathered by the kernel, in a thread that asks for a whole block at once (MSG_WAITALL): neither the loop
    nor the interpreter hears of its pieces. For that the socket is blocking, with a limit of time; the loop's own
    reads and writes say each that they do not wait.
    """

    def __init__(self, connected: socket.socket) -> None:
        """`connected` is this wire's from now on."""
        connected.settimeout(None)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(0, int(_MOMENT * 1e6)))
        self._socket = connected
        self._loop = asyncio.get_running_loop()
        self._space = memoryview(bytearray(_BLOCK))
        self._filled = 0
        self._ripe = False
        # Of the first flow on.
        self._thread: ThreadPoolExecutor | None = None
        self._gathering = False
        self._flowing = False
        self._flow_until = 0.0
        self._ended = False
        self._listening = False
        self._waiter: asyncio.Future[None] | None = None
        self._sending = False
        self._closing = False

    async def wait(self) -> memoryview:
        """See Wire. While this task is busy elsewhere up to 512 KiB are read ahead, and then no more."""
        if not self._ripe:
            self._go_on()
        while not self._ripe and not self._ended:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        seen = self._filled if self._ripe else 0
        self._ripe = False
        return self._space[:seen]

    def taken(self, count: int) -> None:
        """See Wire."""
        rest = bytes(self._space[count : self._filled])
        self._filled = len(rest)
        self._space[: self._filled] = rest
        self._ripe = count > 0 and self._filled > 0
        self._flow_until = self._loop.time() + _CLOSELY if count >= _SOME_SIZE else 0.0
        if self._flowing and not self._ripe:
            self._go_on()

    def _go_on(self) -> None:
        """See to it that what comes next is received."""
        if self._ended or self._gathering or self._listening:
            return
        if self._flowing and self._filled < len(self._space):
            self._gather()
        else:
            self._loop.add_reader(self._socket, self._receive)
            self._listening = True

    def _receive(self) -> None:
        """Called by the loop when there is something to receive."""
        try:
            count = self._socket.recv_into(self._space[self._filled :], 0, socket.MSG_DONTWAIT)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            # A reset is an end like any other: it is how an engine hangs up on input that nobody has read.
            count = 0
        self._filled += count
        full = self._filled == len(self._space)
        if count == 0 or full:
            self._stop_listening()
        if count == 0:
            self._end()
        elif self._ripe or full or self._loop.time() >= self._flow_until:
            self._ripen()
        else:
            self._stop_listening()
            self._gather()

    def _gather(self) -> None:
        # Nothing else touches the space meanwhile: there is nothing ripe in it, so nobody takes any.
        self._gathering = True
        self._thread = self._thread or ThreadPoolExecutor(1, "flow")
        gathering = self._loop.run_in_executor(self._thread, self._receive_block, self._space[self._filled :])
        gathering.add_done_callback(self._gathered)

    def _receive_block(self, space: memoryview) -> int | None:
        """In the thread: how much of `space` was filled; 0 at the end, None if nothing came."""
        try:
            return self._socket.recv_into(space, 0, socket.MSG_WAITALL)
        except BlockingIOError:
            return None
        except OSError:
            return 0

    def _gathered(self, gathering: asyncio.Future[int | None]) -> None:
        self._gathering = False
        if self._closing or gathering.cancelled():
            return
        count = gathering.result()
        self._filled += count or 0
        self._flowing = self._filled == len(self._space)
        if count == 0:
            self._end()
            return
        if not self._flowing:
            self._go_on()
        if self._filled:
            self._ripen()

    def _end(self) -> None:
        self._ended = True
        # The engine ends its side when the process is gone, but goes on holding the other. Wakes who sends.
        self._shut_down(socket.SHUT_RDWR)
        self._ripen()

    def _ripen(self) -> None:
        """What there is, is given away."""
        self._ripe = self._filled > 0
        if self._waiter is not None and not self._waiter.done():
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
        if self._thread is not None:
            self._thread.shutdown()
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
