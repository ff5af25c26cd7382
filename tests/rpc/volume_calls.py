"""Calls of VolumeService."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest
from gpudock.v1 import volume_pb2
from gpudock.v1 import volume_service_pb2 as pb

from tests.rpc.in_memory_server import InMemoryServer, read_to_end, reason_of

MIB = 1 << 20


async def create_volume(
    server: InMemoryServer, name: str = "data", size_bytes: int = 64 * MIB, **fields: Any
) -> volume_pb2.Volume:
    """Create a volume; return it."""
    request = pb.CreateVolumeRequest(name=name, size_bytes=size_bytes, **fields)
    return (await server.volumes.CreateVolume(request)).volume


async def resize(
    server: InMemoryServer, size_bytes: int, **fields: Any
) -> tuple[list[Any], grpc.aio.AioRpcError | None]:
    """Resize volume `data`; return the events, and the error with which the stream ends."""
    request = pb.ResizeVolumeRequest(name="data", size_bytes=size_bytes, **fields)
    return await read_to_end(server.volumes.ResizeVolume(request))


async def error_reason(call: Any) -> str:
    """Return the reason of the error of a unary call."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return reason_of(caught.value)
