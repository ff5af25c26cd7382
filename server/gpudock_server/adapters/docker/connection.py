"""The way to the engine: its API version, and calls that always end and never leak a connection."""

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
from gpudock_server.errors import EngineRejected

JsonAnswer = dict[str, Any]

# The newest API version whose answers were read with care, and the oldest that knows DeviceRequests (Docker 19.03).
_NEWEST_API_VERSION: Final = (1, 47)
_OLDEST_API_VERSION: Final = (1, 40)

_MAX_CALL_CONNECTIONS: Final = 64
# A stream that says nothing for so long (seconds) is no proof that the engine lives: it is asked.
_SILENCE_SECONDS: Final = 30.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*", re.ASCII)


def path_segment(name: str) -> str:
    """`name` (an id or name that the engine knows things by) as one segment of a URL's path.

    What could lead out of the segment ('/', '..', '?', '%') is refused with EngineRejected, as the engine would if it
    could see it.
    """
    if not _NAME.fullmatch(name):
        raise EngineRejected(call="look up a name", status=BAD_REQUEST, detail=f"{name!r} cannot name anything")
    return name


class Connection:
    """Two clients of one engine: one for calls, whose pool is bounded, and one for streams, which may last for ever.

    In one pool, a hundred open streams would starve every call: aiodocker's pool has a limit and waits without end.
    `timeout` is in seconds, for a call that the engine answers at once.
    """

    def __init__(self, address: EngineAddress, timeout: float) -> None:
        self.address = address
        self.timeout = timeout
        self.version = _OLDEST_API_VERSION
        self._connectors = (address.connector(_MAX_CALL_CONNECTIONS), address.connector(0))
        # `url` is always given: aiodocker would otherwise let a docker context decide. And so is `api_version`: its
        # "auto" takes the engine's newest, which nobody has read.
        self._calls, self._streams = (
            aiodocker.Docker(url=address.http_url, connector=connector, api_version=_format_version(self.version))
            for connector in self._connectors
        )

    async def close(self) -> None:
        """Close every connection. May be called again."""
        for client, connector in zip((self._streams, self._calls), reversed(self._connectors), strict=True):
            await client.close()
            await connector.close()

    async def negotiate(self) -> JsonAnswer:
        """Agree on an API version; the engine's `version` answer. Raises EngineRejected where there is none."""
        answer: JsonAnswer = await self.call("tell its version", "GET", "version", versioned=False)
        with engine_errors("tell its version"):
            newest = _parse_version(answer["ApiVersion"])
            oldest = _parse_version(answer.get("MinAPIVersion") or "1.0")
        if newest < _OLDEST_API_VERSION or oldest > _NEWEST_API_VERSION:
            ours = f"{_format_version(_OLDEST_API_VERSION)} to {_format_version(_NEWEST_API_VERSION)}"
            theirs = f"{_format_version(oldest)} to {_format_version(newest)}"
            detail = f"it speaks API {theirs}, gpudock {ours}: update the older of the two"
            raise EngineRejected(call="agree on an API version", status=BAD_REQUEST, detail=detail)
        self.version = min(newest, _NEWEST_API_VERSION)
        self._calls.api_version = self._streams.api_version = _format_version(self.version)
        return answer

    async def call(
        self,
        what: str,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: object = None,
        timeout: float | None = None,
        versioned: bool = True,
    ) -> Any:  # noqa: ANN401 - JSON, which each caller reads with care
        """The answer's JSON, None when it has no body, within `timeout` seconds (by default the connection's).

        `what` completes "the engine refused to ...". Raises EngineUnavailable, EngineRejected.
        """
        with engine_errors(what):
            async with asyncio.timeout(self.timeout if timeout is None else timeout):
                response = await _query(self._calls, method, path, params, body, versioned=versioned)
                try:
                    payload = await response.read()
                finally:
                    # After a complete read this does nothing, and the connection is in the pool again.
                    response.close()
            return json.loads(payload) if payload.strip() else None

    @asynccontextmanager
    async def stream(
        self,
        what: str,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        content: AsyncIterator[bytes] | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer whose body comes bit by bit; `timeout` is for its beginning alone.

        `content` is sent bit by bit as well, and the engine may answer before it has it all.
        The connection is closed on leaving, which is how the engine learns that nobody listens any more.
        """
        with engine_errors(what):
            async with asyncio.timeout(self.timeout if timeout is None else timeout):
                response = await _query(self._streams, method, path, params, None, headers=headers, content=content)
        try:
            yield response
        finally:
            response.close()

    async def documents(self, what: str, response: aiohttp.ClientResponse) -> AsyncIterator[JsonAnswer]:
        """The JSON documents of a stream, one a line, until it ends.

        An engine that hangs, or a host that is gone, looks just like a quiet stream: after each silence the engine is
        asked for a sign of life. Raises EngineUnavailable.
        """
        rest = b""
        while True:
            with engine_errors(what):
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
        """Return when the engine has answered; raises EngineUnavailable."""
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
    # aiodocker's public calls lack what is needed here (update, commit's labels, deadlines) and leave responses open
    # when they are cancelled; this is the call beneath all of them, and the response is ours to close.
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
