"""The messages of a watch, whatever is watched."""

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
    asked: WatchRequest[T],
    watch: AsyncGenerator[WatchEvent[T], None],
    convert: Callable[[T], Message],
    response: type[R],
) -> AsyncIterator[R]:
    """A `response` for everything that `watch` tells; `convert` makes what it shows of an object."""
    async with aclosing(watch) as told:
        async for each in told:
            message = response(resume_token=asked.token(each.token))
            if each.change_type is None or each.item is None:
                message.checkpoint.CopyFrom(watch_pb2.WatchCheckpoint(list_complete=each.list_complete))
            else:
                # The field of the event is named by what happened.
                getattr(message, each.change_type.value).CopyFrom(convert(each.item))
            yield message
