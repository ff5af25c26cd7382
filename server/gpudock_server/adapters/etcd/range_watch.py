"""Every change in a range of keys, revision by revision, over any number of streams that break.

Nothing runs in the background: etcd's messages are read when someone asks for the next revision, and held back by
HTTP/2's flow control until then, so that a reader may be as slow as it likes. What it does not read waits in etcd's own
history, and is lost to it only when that is compacted.
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
    """What is asked for was compacted away, or is of a future that this etcd, restored from a backup, never had."""


@dataclass(frozen=True, slots=True)
class RevisionChanges:
    """All that one revision changed in the range."""

    revision: int
    changes: tuple[KeyChange, ...]


class RangeWatch:
    """Gives what happened in `keys` after `revision`, each revision once.

    A stream that breaks is made anew behind what was given out last; etcd may be away for `retry_for`.
    """

    def __init__(self, connection: EtcdConnection, keys: KeyRange, revision: int, retry_for: timedelta) -> None:
        self.revision = revision
        self._connection = connection
        self._keys = keys
        self._retry_for = retry_for
        self._stream: WatchStream | None = None
        self._reading: asyncio.Task[WatchMessage] | None = None
        # Whole revisions of the last message, and what is known of one that the next fragment goes on with.
        self._ready: deque[RevisionChanges] = deque()
        self._partial: list[KeyChange] = []

    async def open(self) -> None:
        """Begin to watch; `next` does it as well. Raises RevisionUnavailable, CallFailed."""
        if self._stream is None:
            self._stream = await self._connection.with_retries(self._begin, self._retry_for)

    async def next(self, seconds: float) -> RevisionChanges | None:
        """The next revision that changed something; None if there was none for `seconds`.

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
                # A member that has lost its leader, or is going down: another one may do.
                await self.close_stream()
            else:
                self._take(answer)
        step = self._ready.popleft()
        self.revision = step.revision
        return step

    async def close_stream(self) -> None:
        """Let go of the stream; `next` makes another. What was not given out yet comes again."""
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
                # Looked at, so that nobody complains of an error that was never retrieved.
                reading.exception()

    async def _begin(self, timeout: float) -> WatchStream:
        # A watch from a revision to come is one that waits: only a read shows that this etcd has come as far.
        try:
            await self._connection.txn(success=[messages.get(self._keys.start, self.revision)], timeout=timeout)
        except CallFailed as failure:
            raise map_revision_error(failure) from None
        return await self._connection.watch(self._keys, self.revision + 1, timeout=timeout)

    async def _answer(self, seconds: float) -> WatchMessage | None:
        """The next message, or an empty one if the stream broke; None after `seconds`."""
        if self._stream is None:
            raise RuntimeError("there is no stream to read from")
        if self._reading is None:
            self._reading = asyncio.create_task(self._stream.read())
        # Not asyncio.timeout: to cancel the reading would end the stream.
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

    def _take(self, answer: WatchMessage) -> None:
        self._partial += answer.changes
        # Revisions come in their order, and one may be cut in two only by fragments.
        steps = [
            RevisionChanges(revision, tuple(changes))
            for revision, changes in groupby(self._partial, lambda one: one.revision)
        ]
        self._partial.clear()
        if answer.fragment and steps:
            self._partial += steps.pop().changes
        self._ready += steps


def map_revision_error(failure: CallFailed) -> RevisionUnavailable | CallFailed:
    """What a read at a revision of the past failed with."""
    return RevisionUnavailable() if failure.code == "OUT_OF_RANGE" else failure
