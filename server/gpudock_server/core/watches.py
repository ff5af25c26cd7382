"""Watches: streams of the changes of containers and volumes, filtered for a caller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

from gpudock_server.errors import ShuttingDown
from gpudock_server.ports import ContainerView, Store, StoreEvent, VolumeDetails

T = TypeVar("T")


class ChangeType(StrEnum):
    """How an object changed, from the caller's view."""

    ADDED = "added"
    MODIFIED = "modified"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class WatchEvent(Generic[T]):
    """A change, or a checkpoint, which has no `change_type` and no `item`. `token` resumes the watch after the event.

    `item` is the object after the change. For DELETED (deleted, or no longer matched by the filter) it is the object
    before the change.
    """

    token: str
    change_type: ChangeType | None = None
    item: T | None = None
    list_complete: bool = False


class Watches:
    """Streams changes of containers and volumes.

    A stream has an event at least every `checkpoint_seconds`; the store's idle interval must be half of that.
    """

    def __init__(self, store: Store, *, checkpoint_seconds: float) -> None:
        self._store = store
        self._idle_seconds = checkpoint_seconds / 2
        self._draining = asyncio.Event()

    def containers(
        self, matches: Callable[[ContainerView], bool], *, token: str, listing: bool
    ) -> AsyncGenerator[WatchEvent[ContainerView], None]:
        """Stream the changes of containers that `matches` accepts, after `token`; from now on where it is empty.

        `listing`: begin with the existing containers, if there is no token. Raises ResumeTokenExpired,
        InvalidArgument (resume_token), StoreUnavailable, ShuttingDown.
        """
        return self._watch_stream(self._store.watch_containers(token=token, listing=listing), matches)

    def volumes(
        self, matches: Callable[[VolumeDetails], bool], *, token: str, listing: bool
    ) -> AsyncGenerator[WatchEvent[VolumeDetails], None]:
        """Stream the changes of volumes, with the containers that mount them; otherwise like `containers`."""
        return self._watch_stream(self._store.watch_volumes(token=token, listing=listing), matches)

    def drain(self) -> None:
        """End every watch and refuse new ones. Callers resume with their tokens at another or the next daemon."""
        self._draining.set()

    async def _watch_stream(
        self, store_events: AsyncGenerator[StoreEvent[T], None], matches: Callable[[T], bool]
    ) -> AsyncGenerator[WatchEvent[T], None]:
        # In the past, so that the first checkpoint, which shows that the watch has begun, is sent.
        last_sent = time.monotonic() - self._idle_seconds
        async with aclosing(store_events):
            while True:
                event = _watch_event(await self._next(store_events), matches)
                if event.change_type or event.list_complete or time.monotonic() - last_sent >= self._idle_seconds:
                    yield event
                    last_sent = time.monotonic()

    async def _next(self, store_events: AsyncGenerator[StoreEvent[T], None]) -> StoreEvent[T]:
        """The next event of the store. Raises ShuttingDown where this daemon shuts down first."""
        if self._draining.is_set():
            await store_events.aclose()
            raise ShuttingDown
        following = asyncio.ensure_future(anext(store_events))
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait((following, draining), return_when=asyncio.FIRST_COMPLETED)
            if following.done():
                return following.result()
            raise ShuttingDown
        finally:
            draining.cancel()
            if not following.done():
                following.cancel()
                # The generator cannot be closed while it runs.
                await asyncio.wait((following,))


def _watch_event(event: StoreEvent[T], matches: Callable[[T], bool]) -> WatchEvent[T]:
    """The event for a caller whose filter is `matches`."""
    before = event.before if event.before is not None and matches(event.before) else None
    after = event.after if event.after is not None and matches(event.after) else None
    if after is not None:
        return WatchEvent(event.token, ChangeType.MODIFIED if before is not None else ChangeType.ADDED, after)
    if before is not None:
        return WatchEvent(event.token, ChangeType.DELETED, before)
    return WatchEvent(event.token, list_complete=event.list_complete)
