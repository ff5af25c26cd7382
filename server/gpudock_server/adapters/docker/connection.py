"""The connection to the engine: API version, and calls that always end and never leak a connection."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import aiodocker
import aiohttp

from gpudock_server.adapters.docker.address import EngineAddress
from gpudock_server.adapters.docker.failures import BAD_REQUEST, engine_errors
from gpudock_server.adapters.docker.translate import Json
from gpudock_server.errors import EngineRejected

# The newest API version that this adapter was checked against, and the oldest with DeviceRequests (Docker 19.03).
_NEWEST_API_VERSION: Final = (1, 47)
_OLDEST_API_VERSION: Final = (1, 40)

_MAX_CALL_CONNECTIONS: Final = 64
# After so many seconds without data on a stream the engine is pinged: a silent stream may be a dead connection.
_SILENCE_SECONDS: Final = 30.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)


def path_segment(name: str) -> str:
    """Check that `name`, the id or name of an engine object, is one segment of a URL's path, and return it.

    Raises EngineRejected for a name that could reach another part of the API ('/', '..', '?', '%').
    """
    if not _NAME.fullmatch(name):
        detail = f"{name!r} is not a valid name or id of a container or volume"
        raise EngineRejected(call="look up a name", status=BAD_REQUEST, detail=detail)
    return name


class Connection:
    """Two clients of one engine: one for calls, with a bounded pool, and one for streams of any duration.

    In one pool a hundred open streams would starve every call: aiodocker's pool is limited and waits without a timeout.
    `timeout` is in seconds, for a call that the engine answers immediately.
    """

    def __init__(self, address: EngineAddress, timeout: float) -> None:
        self.address = address
        self.timeout = timeout
        self.version = _OLDEST_API_VERSION
        self._connectors = (address.connector(_MAX_CALL_CONNECTIONS), address.connector(0))
        # Without `url` aiodocker uses the docker context. With `api_version` "auto" it uses the engine's newest, which
        # this adapter may not have been checked against.
        self._calls, self._streams = (
            aiodocker.Docker(url=address.http_url, connector=connector, api_version=_format_version(self.version))
            for connector in self._connectors
        )

    async def close(self) -> None:
        """Close every connection. May be called again."""
        for client, connector in zip((self._streams, self._calls), reversed(self._connectors), strict=True):
            await client.close()
            await connector.close()

    async def negotiate(self) -> Json:
        """Choose the API version; returns the engine's `version` answer. Raises EngineRejected if no version fits."""
        answer: Json = await self.call("report its version", "GET", "version", versioned=False)
        with engine_errors("report its version"):
            newest = _parse_version(answer["ApiVersion"])
            oldest = _parse_version(answer.get("MinAPIVersion") or "1.0")
        if newest < _OLDEST_API_VERSION or oldest > _NEWEST_API_VERSION:
            ours = f"{_format_version(_OLDEST_API_VERSION)} to {_format_version(_NEWEST_API_VERSION)}"
            theirs = f"{_format_version(oldest)} to {_format_version(newest)}"
            detail = f"the engine supports API {theirs}, gpudock {ours}; update the older one"
            raise EngineRejected(call="agree on an API version", status=BAD_REQUEST, detail=detail)
        self.version = min(newest, _NEWEST_API_VERSION)
        self._calls.api_version = self._streams.api_version = _format_version(self.version)
        return answer

    async def call(
        self,
        call: str,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: object = None,
        timeout: float | None = None,
        versioned: bool = True,
    ) -> Any:  # noqa: ANN401 - JSON, whose shape each caller checks
        """The response's JSON, None if it has no body, within `timeout` seconds (default: the connection's timeout).

        `call` completes "the engine refused to ...". Raises EngineUnavailable, EngineRejected.
        """
        with engine_errors(call):
            async with asyncio.timeout(self.timeout if timeout is None else timeout):
                response = await _query(self._calls, method, path, params, body, versioned=versioned)
                try:
                    payload = await response.read()
                finally:
                    # After a complete read the connection is already back in the pool, and this does nothing.
                    response.close()
            return json.loads(payload) if payload.strip() else None

    async def call_idempotent(
        self,
        call: str,
        method: str,
        path: str,
        *,
        done_statuses: tuple[int, ...],
        params: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> None:
        """Do a call for which the error statuses in `done_statuses` mean that there is nothing left to do."""
        try:
            await self.call(call, method, path, params=params, timeout=timeout)
        except EngineRejected as rejection:
            if rejection.status not in done_statuses:
                raise

    @asynccontextmanager
    async def stream(
        self,
        call: str,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        content: AsyncIterator[bytes] | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response whose body is streamed; `timeout` applies only until its head has arrived.

        `content` is streamed as well, and the engine may respond before it has received all of it. Leaving the context
        closes the connection, which tells the engine to stop.
        """
        with engine_errors(call):
            async with asyncio.timeout(self.timeout if timeout is None else timeout):
                response = await _query(self._streams, method, path, params, None, headers=headers, content=content)
        try:
            yield response
        finally:
            response.close()

    async def documents(self, call: str, response: aiohttp.ClientResponse) -> AsyncIterator[Json]:
        """The JSON documents of a stream, one per line, until it ends.

        A hanging engine or an unreachable host looks like a stream without data, so the engine is pinged after each
        silence of `_SILENCE_SECONDS`. Raises EngineUnavailable.
        """
        rest = b""
        while True:
            with engine_errors(call):
                silence = asyncio.timeout(_SILENCE_SECONDS)
                try:
                    async with silence:
                        block = await response.content.readany()
                except TimeoutError:
                    if not silence.expired():
                        raise
                    await self.ping()
                    continue
                *lines, rest = (rest + block).split(b"\n")
                if not block:
                    lines, rest = [rest], b""
                parsed = [json.loads(line) for line in lines if line.strip()]
            for document in parsed:
                yield document
            if not block:
                return

    async def ping(self) -> None:
        """Return once the engine has answered. Raises EngineUnavailable."""
        await self.call("answer a ping", "GET", "version", versioned=False)


async def _query(
    client: aiodocker.Docker,
    method: str,
    path: str,
    params: Mapping[str, str] | None,
    body: object,
    *,
    headers: Mapping[str, str] | None = None,
    content: AsyncIterator[bytes] | None = None,
    versioned: bool = True,
) -> aiohttp.ClientResponse:
    # aiodocker's public calls lack features needed here (update, commit's labels, deadlines) and leave responses open
    # when cancelled. All of them use this method; its response is closed by its caller.
    return await client._do_query(  # noqa: SLF001 - see above
        path,
        method,
        params=params,
        data=content if body is None else json.dumps(body),
        headers=headers,
        timeout=None,
        versioned_api=versioned,
    )


def _parse_version(version: str) -> tuple[int, int]:
    major, _, minor = version.partition(".")
    return int(major), int(minor)


def _format_version(version: tuple[int, int]) -> str:
    return f"v{version[0]}.{version[1]}"
