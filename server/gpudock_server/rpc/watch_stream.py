"""Converts watch events of core to response messages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeVar

from google.protobuf.message import Message
from gpudock.v1 import container_service_pb2, volume_service_pb2, watch_pb2

from gpudock_server.core.watches import WatchEvent
from gpudock_server.rpc.watch_requests import WatchRequest

T = TypeVar("T")
R = TypeVar("R", container_service_pb2.WatchContainersResponse, volume_service_pb2.WatchVolumesResponse)


async def watch_stream(
    request: WatchRequest[T],
    watch: AsyncGenerator[WatchEvent[T], None],
    convert: Callable[[T], Message],
    response: type[R],
) -> AsyncIterator[R]:
    """Yield a response for each event of `watch`; `convert` turns an object into its message."""
    async with aclosing(watch) as events:
        async for event in events:
            message = response(resume_token=request.token(event.token))
            if event.change_type is None or event.item is None:
                message.checkpoint.CopyFrom(watch_pb2.WatchCheckpoint(list_complete=event.list_complete))
            else:
                # The fields of the oneof have the names of the change types.
                getattr(message, event.change_type.value).CopyFrom(convert(event.item))
            yield message
