"""Reads every change in a range of keys, revision by revision, and reconnects when the stream breaks.

Nothing runs in the background: etcd's messages are read only when the caller asks for the next revision. Until then
HTTP/2 flow control holds them back, so the caller may be slow. Unread changes wait in etcd's history and are lost only
when etcd compacts it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.connection import CallFailed, EtcdConnection, WatchStream
from gpudock_server.adapters.etcd.keys import KeyRange
from gpudock_server.adapters.etcd.messages import KeyChange, WatchMessage


class RevisionUnavailable(Exception):
    """The requested revision was compacted, or is newer than all revisions of this etcd, which was restored."""


@dataclass(frozen=True, slots=True)
class RevisionChanges:
    """All changes of one revision in the range."""

    revision: int
    changes: tuple[KeyChange, ...]


class RangeWatch:
    """Returns the changes in `keys` after `revision`, each revision once.

    A broken stream is replaced by one that starts after the last returned revision; etcd may be away for `retry_for`.
    """

    def __init__(self, connection: EtcdConnection, keys: KeyRange, revision: int, retry_for: timedelta) -> None:
        self.revision = revision
        self._connection = connection
        self._keys = keys
        self._retry_for = retry_for
        self._stream: WatchStream | None = None
        self._reading: asyncio.Task[WatchMessage] | None = None
        # Complete revisions of the last message, and the changes of a revision that continues in the next fragment.
        self._ready: deque[RevisionChanges] = deque()
        self._partial: list[KeyChange] = []

    async def open(self) -> None:
        """Start the watch, unless it is started; `next` does so too. Raises RevisionUnavailable, CallFailed."""
        if self._stream is None:
            self._stream = await self._connection.with_retries(self._begin, self._retry_for)

    async def next(self, seconds: float) -> RevisionChanges | None:
        """The next revision that changed the range; None if there was none within `seconds`.

        Raises RevisionUnavailable, CallFailed.
        """
        while not self._ready:
            await self.open()
            answer = await self._answer(seconds)
            if answer is None:
                return None
            if answer.compacted:
                raise RevisionUnavailable
            if answer.refusal:
                # The member has lost its leader or is shutting down: another member may serve the watch.
                await self.close_stream()
            else:
                self._add(answer)
        batch = self._ready.popleft()
        self.revision = batch.revision
        return batch

    async def close_stream(self) -> None:
        """Close the stream; `next` opens another one. Changes that were not returned yet are read again."""
        self._ready.clear()
        self._partial.clear()
        stream, self._stream = self._stream, None
        reading, self._reading = self._reading, None
        if stream is not None:
            stream.close()
        if reading is not None:
            reading.cancel()
            await asyncio.wait({reading})
            if not reading.cancelled():
                # Retrieve the error, so that asyncio does not log it.
                reading.exception()

    async def _begin(self, timeout: float) -> WatchStream:
        # A watch from a future revision just waits; only a read shows that this etcd has reached the revision.
        try:
            await self._connection.txn(success=[messages.get(self._keys.start, self.revision)], timeout=timeout)
        except CallFailed as failure:
            raise map_revision_error(failure) from None
        return await self._connection.watch(self._keys, self.revision + 1, timeout=timeout)

    async def _answer(self, seconds: float) -> WatchMessage | None:
        """The next message, or one with a refusal if the stream broke; None after `seconds`."""
        if self._stream is None:
            raise RuntimeError("the watch stream is not open")
        if self._reading is None:
            self._reading = asyncio.create_task(self._stream.read())
        # Not asyncio.timeout, because a cancelled read ends the stream.
        done, _ = await asyncio.wait({self._reading}, timeout=seconds)
        if not done:
            return None
        reading, self._reading = self._reading, None
        try:
            return reading.result()
        except CallFailed as failure:
            if not failure.retryable:
                raise
            return WatchMessage(changes=(), fragment=False, compacted=0, refusal=str(failure))

    def _add(self, answer: WatchMessage) -> None:
        self._partial += answer.changes
        # Revisions arrive in order, and only fragments split a revision.
        batches = [
            RevisionChanges(revision, tuple(changes))
            for revision, changes in groupby(self._partial, lambda change: change.revision)
        ]
        self._partial.clear()
        if answer.fragment and batches:
            self._partial += batches.pop().changes
        self._ready += batches


def map_revision_error(failure: CallFailed) -> RevisionUnavailable | CallFailed:
    """RevisionUnavailable if a read failed because of its revision, else `failure`."""
    return RevisionUnavailable() if failure.code == "OUT_OF_RANGE" else failure
