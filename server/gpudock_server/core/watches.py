"""Watches: what a caller is told of the changes that the store sees."""

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
    """What is told of an object."""

    ADDED = "added"
    MODIFIED = "modified"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class WatchEvent(Generic[T]):
    """Something that happened, or a checkpoint, which has neither `change_type` nor `item`. `token` goes on behind it.

    `item` is what the object became; of one that was deleted, or is no longer wanted, what it was.
    """

    token: str
    change_type: ChangeType | None = None
    item: T | None = None
    list_complete: bool = False


class Watches:
    """Watches of everything that can be watched.

    Each says something at least every `checkpoint_seconds`; the store's idle interval has to be half of that.
    """

    def __init__(self, store: Store, *, checkpoint_seconds: float) -> None:
        self._store = store
        self._idle_seconds = checkpoint_seconds / 2
        self._draining = asyncio.Event()

    def containers(
        self, wanted: Callable[[ContainerView], bool], *, token: str, listing: bool
    ) -> AsyncGenerator[WatchEvent[ContainerView], None]:
        """Containers that are `wanted`, as they begin to be, change and cease to be, behind `token` or from now on.

        `listing` shows first, without a token, those that are there. Raises ResumeTokenExpired, InvalidArgument
        (resume_token), StoreUnavailable, ShuttingDown.
        """
        return self._watch_stream(self._store.watch_containers(token=token, listing=listing), wanted)

    def volumes(
        self, wanted: Callable[[VolumeDetails], bool], *, token: str, listing: bool
    ) -> AsyncGenerator[WatchEvent[VolumeDetails], None]:
        """Volumes that are `wanted`, and who mounts them; otherwise like `containers`."""
        return self._watch_stream(self._store.watch_volumes(token=token, listing=listing), wanted)

    def drain(self) -> None:
        """End every watch, and begin none: with their tokens they go on elsewhere, or later."""
        self._draining.set()

    async def _watch_stream(
        self, seen: AsyncGenerator[StoreEvent[T], None], wanted: Callable[[T], bool]
    ) -> AsyncGenerator[WatchEvent[T], None]:
        # So that the first one is told, which says that the watch has begun.
        last_sent = time.monotonic() - self._idle_seconds
        async with aclosing(seen):
            while True:
                told = _watch_event(await self._next(seen), wanted)
                if told.change_type or told.list_complete or time.monotonic() - last_sent >= self._idle_seconds:
                    yield told
                    last_sent = time.monotonic()

    async def _next(self, seen: AsyncGenerator[StoreEvent[T], None]) -> StoreEvent[T]:
        """What the store sees next, unless this daemon shuts down first."""
        if self._draining.is_set():
            await seen.aclose()
            raise ShuttingDown
        following = asyncio.ensure_future(anext(seen))
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
                # The generator cannot be closed before it has stopped.
                await asyncio.wait((following,))


def _watch_event(seen: StoreEvent[T], wanted: Callable[[T], bool]) -> WatchEvent[T]:
    """What of it is told to a caller who wants only some."""
    before = seen.before if seen.before is not None and wanted(seen.before) else None
    after = seen.after if seen.after is not None and wanted(seen.after) else None
    if after is not None:
        return WatchEvent(seen.token, ChangeType.MODIFIED if before is not None else ChangeType.ADDED, after)
    if before is not None:
        return WatchEvent(seen.token, ChangeType.DELETED, before)
    return WatchEvent(seen.token, list_complete=seen.list_complete)
