"""Watches: streams of changes of resources."""

from __future__ import annotations

from collections.abc import AsyncIterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from gpudock._calls import Backoff, Calls, ReopenedStream, Stream
from gpudock._operations import CONNECTION_LOST_CODES
from gpudock.errors import GpudockError, Unavailable

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WatchEvent(Generic[T]):
    """One event of a watch.

    `kind` is `added`, `modified` or `deleted`; `item` is the resource after the change, or a deleted one as it was.
    With `checkpoints`, `kind` may be `checkpoint`, without an `item`; `list_complete` then means that everything that
    existed at the beginning was sent.
    """

    kind: str
    item: T | None
    resume_token: str
    list_complete: bool = False


class Watch(Generic[T]):
    """A watch: `async for event in watch`. Nothing is sent before it is iterated; it ends only with an error.

    After a lost connection the watch continues after the last event, so that no event is lost or repeated. If that
    fails for too long, it raises Unavailable and may be iterated again. It raises OutOfRange (RESUME_TOKEN_EXPIRED)
    when the server no longer keeps the next event; then start a new watch without a token. Cancelling the iterating
    task or calling `aclose` ends it.
    """

    def __init__(
        self,
        calls: Calls,
        method: grpc.aio.UnaryStreamMultiCallable[Any, Any],
        request: Any,  # noqa: ANN401 - a message of any watch's RPC
        *,
        checkpoints: bool,
    ) -> None:
        """`request` is the request of `method`; its token is empty at the beginning."""
        self._calls = calls
        self._method = method
        self._request = request
        # Before the first response, retry like any other call.
        self._backoff = Backoff(calls.retry_for)
        self._checkpoints = checkpoints
        self._stream = ReopenedStream(self._open)
        self.resume_token: str = request.resume_token
        """The position after the last event or checkpoint; empty before the first."""

    def __aiter__(self) -> AsyncIterator[WatchEvent[T]]:
        return self

    async def __anext__(self) -> WatchEvent[T]:
        while True:
            try:
                response = await self._response()
            except GpudockError as error:
                self._stream.drop()
                if not _is_lost(error):
                    raise
                await self._backoff.wait(error)
                continue
            # Reset the retries on an event only: a server might answer and disconnect again and again.
            self._backoff = Backoff(self._calls.reattach_for)
            self.resume_token = response.resume_token
            kind = response.WhichOneof("event") or "checkpoint"
            if kind != "checkpoint":
                return WatchEvent(kind, getattr(response, kind), response.resume_token)
            if self._checkpoints:
                return WatchEvent(kind, None, response.resume_token, response.checkpoint.list_complete)

    async def aclose(self) -> None:
        """Stop watching; iterating again continues after the last event."""
        self._stream.drop()

    def _open(self) -> Stream:
        request = deepcopy(self._request)
        request.resume_token = self.resume_token
        return self._calls.stream(self._method, request)

    async def _response(self) -> Any:  # noqa: ANN401 - a message of any watch's RPC
        response = await self._stream.read()
        if response is None:
            raise Unavailable("the server ended the watch", code=grpc.StatusCode.UNAVAILABLE)
        return response


def _is_lost(error: GpudockError) -> bool:
    """Return whether the watch can continue after a retry."""
    return isinstance(error, Unavailable) or (not error.answered and error.code in CONNECTION_LOST_CODES)
