"""An HTTP request that turns its connection into a stream of raw bytes, as for exec and attach.

The engine calls it hijacking: https://docs.docker.com/reference/api/engine/version/v1.41/#tag/Container/operation/ContainerAttach
Not through aiohttp, whose reads cost a copy, a queue entry and a wakeup for every 64 KiB.
"""

from __future__ import annotations

import asyncio
import json
from typing import Final

from aiodocker import DockerError

from gpudock_server.adapters.docker.connection import Connection
from gpudock_server.adapters.docker.failures import engine_errors
from gpudock_server.adapters.docker.raw_stream import RawStream, open_raw_stream

_UPGRADE_STATUSES: Final = (101, 200)  # 200: an engine that ignores the Upgrade header and hijacks anyway
_MAX_HEAD_BYTES: Final = 64 * 1024
_END_OF_HEAD: Final = b"\r\n\r\n"


async def hijack(connection: Connection, call: str, path: str, body: object) -> RawStream:
    """POST `body` to `path` and return the raw stream. Raises EngineUnavailable, EngineRejected."""
    with engine_errors(call):
        async with asyncio.timeout(connection.timeout):
            stream = await open_raw_stream(connection.address)
            try:
                await stream.send(_request(connection, path, body))
                await _await_upgrade(stream)
            except BaseException:
                stream.close()
                raise
            return stream


def _request(connection: Connection, path: str, body: object) -> bytes:
    payload = json.dumps(body).encode()
    major, minor = connection.version
    head = (
        f"POST /v{major}.{minor}/{path} HTTP/1.1\r\n"
        f"Host: {connection.address.host}\r\n"
        "Connection: Upgrade\r\n"
        "Upgrade: tcp\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


async def _await_upgrade(stream: RawStream) -> None:
    """Consume the response's head. Raises DockerError if the engine did not upgrade the connection."""
    head = await _read_head(stream)
    # "HTTP/1.1 101 UPGRADED"
    status = int(head.split(maxsplit=2)[1])
    if status not in _UPGRADE_STATUSES:
        raise DockerError(status, _message(await _read_body(stream, head)))


async def _read_head(stream: RawStream) -> bytes:
    while True:
        block = await stream.wait()
        if not block:
            raise ConnectionResetError("the engine closed the connection")
        head, end, _ = bytes(block[:_MAX_HEAD_BYTES]).partition(_END_OF_HEAD)
        if end:
            stream.consume(len(head) + len(end))
            return head
        if len(block) > _MAX_HEAD_BYTES:
            raise ValueError(f"the response head is larger than {_MAX_HEAD_BYTES} bytes")
        stream.consume(0)


async def _read_body(stream: RawStream, head: bytes) -> bytes:
    """The body of an error response: one short JSON document with a content-length."""
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
    length = min(int(fields.get(b"content-length", b"0")), _MAX_HEAD_BYTES)
    body = b""
    while len(body) < length and (block := await stream.wait()):
        body += block
        stream.consume(len(block))
    return body


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")
