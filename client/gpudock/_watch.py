"""Watches: what happens to the resources of the installation, for as long as one listens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from gpudock._calls import Backoff, Calls
from gpudock._operations import CONNECTION_LOST_CODES, Stream
from gpudock.errors import GpudockError, Unavailable, error_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WatchEvent(Generic[T]):
    """Something that happened.

    `kind` is `added`, `modified` or `deleted`, and `item` what it happened to: what it became, or of one that was
    deleted what it was. With `checkpoints`, `kind` is `checkpoint` as well, without an `item`; `list_complete` then
    says that what was there at the beginning has been told.
    """

    kind: str
    item: T | None
    resume_token: str
    list_complete: bool = False


class Watch(Generic[T]):
    """A watch: `async for event in watch`. Nothing is sent before it is iterated; it ends only by an error.

    A connection that breaks is made anew, and the watch goes on behind the last event: none is lost, none comes twice.
    If that fails for too long it raises Unavailable, and may be iterated again. It raises OutOfRange
    (RESUME_TOKEN_EXPIRED) when the server no longer keeps what comes next: make another one, without a token.
    Cancelling the task that iterates, or `aclose`, ends it.
    """

    def __init__(self, calls: Calls, begin: Callable[[str], Stream], resume_token: str, *, checkpoints: bool) -> None:
        """`begin` makes the call that goes on behind a token, which is empty at the beginning."""
        self._calls = calls
        self._begin = begin
        # Until the server has answered, this is a call like any other.
        self._backoff = Backoff(calls.retry_for)
        self._checkpoints = checkpoints
        self._stream: Stream | None = None
        self.resume_token: str = resume_token
        """Goes on behind the last event that was given out, or behind a checkpoint since; empty before the first."""

    def __aiter__(self) -> AsyncIterator[WatchEvent[T]]:
        return self

    async def __anext__(self) -> WatchEvent[T]:
        while True:
            try:
                response = await self._response()
            except GpudockError as error:
                self._drop_stream()
                if not _is_lost(error):
                    raise
                await self._backoff.wait(error)
                continue
            # Only news shows that the way is sound: a server might answer and break off for ever.
            self._backoff = Backoff(self._calls.reattach_for)
            self.resume_token = response.resume_token
            kind = response.WhichOneof("event") or "checkpoint"
            if kind != "checkpoint":
                return WatchEvent(kind, getattr(response, kind), response.resume_token)
            if self._checkpoints:
                return WatchEvent(kind, None, response.resume_token, response.checkpoint.list_complete)

    async def aclose(self) -> None:
        """Stop watching; to iterate again goes on behind the last event."""
        self._drop_stream()

    async def _response(self) -> Any:  # noqa: ANN401 - a message of any watch's RPC
        if self._stream is None:
            self._stream = self._begin(self.resume_token)
        try:
            response = await self._stream.read()
        except grpc.aio.AioRpcError as failure:
            raise error_of(failure) from failure
        except asyncio.CancelledError:
            # gRPC has ended the stream with the read; whoever reads on, after a timeout say, gets a new one.
            self._drop_stream()
            raise
        if not hasattr(response, "WhichOneof"):
            raise Unavailable("the server ended the watch", code=grpc.StatusCode.UNAVAILABLE)
        return response

    def _drop_stream(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None


def _is_lost(error: GpudockError) -> bool:
    """Whether the same watch may go on in a moment."""
    return isinstance(error, Unavailable) or (not error.answered and error.code in CONNECTION_LOST_CODES)
