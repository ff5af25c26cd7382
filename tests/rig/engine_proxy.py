"""A proxy in front of dockerd that can fail, hang or drop a request before or after the engine executes it.

It forwards byte for byte, also hijacked connections (exec, attach), and runs in the event loop of the test: a daemon
that is started with the proxy as its engine must be waited for in a thread (`Rig.start_daemon`). While dockerd is down
the proxy accepts connections and closes them.
"""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Coroutine
from http import HTTPStatus
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .engine_faults import Fault, Faults, Kind, Request
from .http_framing import HEAD_LIMIT, Head, Peer

_VERSION = re.compile(r"^/v\d+\.\d+(?=/)")
_PREFETCH_LIMIT = 1 << 20
_DISCONNECT_ERRORS = (OSError, EOFError, asyncio.LimitOverrunError)


class EngineProxy:
    """Listens at `path` and forwards to the engine's socket; an async context manager."""

    def __init__(self, engine: Path, path: Path) -> None:
        self.engine = engine
        self.path = path
        self.faults = Faults()
        self.requests: list[Request] = []
        """All requests, in order of arrival."""
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """The address for gpudockd's --docker-host, aiodocker and DOCKER_HOST."""
        return f"unix://{self.path}"

    async def idle(self) -> None:
        """Wait until no client is connected, and every disconnect has been handled."""
        while self._connections:
            await asyncio.wait(self._connections)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_unix_server(self._connected, self.path, limit=HEAD_LIMIT)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # asyncio would make a task for a coroutine, and report that task as failed when it is cancelled.
        task = asyncio.create_task(self._serve(Peer(reader, writer)))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, client: Peer) -> None:
        """Forward the requests of one client connection, in turn, over one connection to the engine."""
        engine: Peer | None = None
        try:
            # When one side disconnects, the connection of the other is closed below.
            with contextlib.suppress(*_DISCONNECT_ERRORS):
                while (head := await client.read_head()) is not None:
                    request = self._record(head)
                    exchange = _Exchange(client, head, request)
                    if await exchange.before() and request.status is None:
                        engine = engine or Peer(*await asyncio.open_unix_connection(self.engine, limit=HEAD_LIMIT))
                        await exchange.run(engine)
                    if exchange.over:
                        break
            if engine is not None:
                engine.abort()
            await client.close()
        finally:
            if engine is not None:
                engine.abort()
            client.abort()

    def _record(self, head: Head) -> Request:
        method, target, _ = head.first_line
        path, _, query = target.partition("?")
        request = Request(method, _VERSION.sub("", path), query)
        request.fault = self.faults.match(request)
        self.requests.append(request)
        return request


class _Exchange:
    """One request and its answer. `over`: the connection cannot be used for another request."""

    def __init__(self, client: Peer, head: Head, request: Request) -> None:
        self.over = False
        self._client = client
        self._head = head
        self._request = request
        self._fault = request.fault
        self._prefetched: list[bytes] | None = None

    async def before(self) -> bool:
        """Apply a fault before the engine gets the request; returns whether the request is to be forwarded."""
        fault = self._fault
        if fault is None or fault.after:
            return True
        fault.hit.set()
        if fault.kind is Kind.DROP:
            self.over = True
            return False
        if fault.kind is Kind.ANSWER:
            async for _ in self._client.body(self._head):
                pass
            await self._send_to_client(fault.answer)
            return False
        if not self._head.chunked and (self._head.length or 0) <= _PREFETCH_LIMIT:
            # Once the body is read, the end of the connection can be noticed.
            self._prefetched = [piece async for piece in self._client.body(self._head)]
            self.over = not await _finishes_before(fault.released.wait(), self._client.until_gone())
        else:
            await fault.released.wait()
        return not self.over

    async def run(self, engine: Peer) -> None:
        """Forward the request to the engine and its answer to the client, unless a fault applies to the answer."""
        upload = asyncio.create_task(self._upload(engine))
        answered = asyncio.create_task(self._answer(engine))
        try:
            if self._head.upgrades:
                raw = await answered
            elif await _finishes_before(answered, self._client_disconnect(upload)):
                raw = answered.result()
            else:
                self.over = True
                return
            if raw:
                self.over = True
                await self._pump(engine, upload)
            self.over = self.over or not upload.done()
        finally:
            for task in (upload, answered):
                task.cancel()
            await asyncio.gather(upload, answered, return_exceptions=True)

    async def _upload(self, engine: Peer) -> None:
        await engine.send(self._head.raw)
        if self._prefetched is not None:
            await engine.send(b"".join(self._prefetched))
            return
        async for piece in self._client.body(self._head):
            await engine.send(piece)

    async def _client_disconnect(self, upload: "asyncio.Task[None]") -> None:
        await asyncio.wait([upload])
        await self._client.until_gone()

    async def _answer(self, engine: Peer) -> bool:
        """Forward the engine's answer; returns whether a raw stream in both directions follows."""
        response = await engine.read_head()
        while response is not None and response.status == HTTPStatus.CONTINUE:
            await self._client.send(response.raw)
            response = await engine.read_head()
        if response is None:
            self.over = True
            return False
        self._request.engine_status = response.status
        bodiless = self._head.first_line[0] == "HEAD" or response.status in {204, 304}
        raw = response.status == HTTPStatus.SWITCHING_PROTOCOLS or (
            not bodiless and not response.chunked and response.length is None
        )
        self.over = response.closes and not raw
        body = _empty_body() if bodiless or raw else engine.body(response)
        if self._fault is not None and self._fault.after:
            return await self._after(self._fault, response, body) and raw
        await self._send_to_client(response.raw)
        async for piece in body:
            await self._client.send(piece)
        return raw

    async def _after(self, fault: Fault, response: Head, body: AsyncIterator[bytes]) -> bool:
        """Apply a fault after the engine's complete answer; returns whether the client got the answer in the end."""
        pieces = [piece async for piece in body]
        fault.hit.set()
        if fault.kind is Kind.DROP:
            self.over = True
            return False
        if fault.kind is Kind.ANSWER:
            self.over = True
            await self._send_to_client(fault.answer)
            return False
        await fault.released.wait()
        await self._send_to_client(b"".join([response.raw, *pieces]))
        return True

    async def _send_to_client(self, data: bytes) -> None:
        self._request.status = int(data.split(b" ", 2)[1])
        await self._client.send(data)

    async def _pump(self, engine: Peer, upload: "asyncio.Task[None]") -> None:
        """Copy in both directions until the engine closes; forward the client's end of input as a half-close."""
        await upload
        inwards = asyncio.create_task(_copy(self._client, engine))
        try:
            await _copy(engine, self._client)
        finally:
            inwards.cancel()
            await asyncio.gather(inwards, return_exceptions=True)


async def _copy(source: Peer, target: Peer) -> None:
    while data := await source.read_some():
        await target.send(data)
    target.writer.write_eof()


async def _finishes_before(
    expected: "asyncio.Task[bool] | Coroutine[Any, Any, object]", end: "Coroutine[Any, Any, None]"
) -> bool:
    """Wait for one of the two; returns whether `expected` has finished."""
    first, second = asyncio.ensure_future(expected), asyncio.create_task(end)
    try:
        await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        return first.done()
    finally:
        for task in (first, second):
            task.cancel()
        await asyncio.gather(second, return_exceptions=True)


async def _empty_body() -> AsyncIterator[bytes]:
    nothing: tuple[bytes, ...] = ()
    for piece in nothing:
        yield piece
