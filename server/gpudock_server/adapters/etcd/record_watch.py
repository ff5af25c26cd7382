"""Watches of one kind of object: its heads and locks before and after each change, starting from a token.

A token is a position in etcd's history: a revision, and the last key of which an event was sent. There are two phases,
the initial list and the changes after it, and a watch can be resumed in either:

    ["list", 120, ".../containers/b"]     the list at revision 120, after b
    ["told", 125, ".../containers/b"]     the changes of revision 125, after b
    ["told", 125, ".../containers/"]      the changes after revision 125

A watch keeps the held locks in memory, as many as there are running operations. If objects of another kind refer to the
watched objects, it also keeps these references: a change of the referrers is an event of the object. etcd sends the
previous value of an object with every change; if only the lock or the referrers have changed, the head is read at that
revision.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from enum import StrEnum
from typing import Generic, TypeVar

import structlog

from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.connection import CallFailed, EtcdConnection
from gpudock_server.adapters.etcd.keys import KeyRange, WatchKeys
from gpudock_server.adapters.etcd.messages import KeyChange, KeyValue, RangeResponse
from gpudock_server.adapters.etcd.range_watch import (
    RangeWatch,
    RevisionChanges,
    RevisionUnavailable,
    map_revision_error,
)
from gpudock_server.adapters.etcd.references import ReferenceSource, Referrers
from gpudock_server.errors import FieldViolation, InvalidArgument, ResumeTokenExpired
from gpudock_server.ports import StoreEvent
from gpudock_server.tokens import decode_position, encode_position

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

V = TypeVar("V")

# Heads per read of the initial list.
_LIST_PAGE = 50

# Makes what an event shows of an object from its head, its lock and the names of its referrers.
View = Callable[[KeyValue, KeyValue | None, tuple[str, ...]], V]


class _Phase(StrEnum):
    LIST = "list"
    # Callers hold tokens of earlier versions, so the value cannot change.
    CHANGES = "told"


@dataclass(frozen=True, slots=True)
class _Position:
    """A position as described above. `key` is the start of the heads' range before the first and after the last event.

    In phase LIST it stands for the beginning of the list, in phase CHANGES for the end of the revision.
    """

    phase: _Phase
    revision: int
    key: bytes

    def base(self, heads: KeyRange) -> int:
        """The last revision of which all events were sent, from which a watch starts."""
        # A partly sent revision is read again as a whole, without the events already sent.
        partly_sent = self.phase is _Phase.CHANGES and self.key != heads.start
        return self.revision - 1 if partly_sent else self.revision

    def token(self) -> str:
        """The token for callers."""
        return encode_position(self.phase, revision=self.revision, key=self.key)


def resume_token_after(keys: WatchKeys, revision: int) -> str:
    """The token for the changes after `revision`."""
    return _Position(_Phase.CHANGES, revision, keys.heads.start).token()


class IdleNotifier:
    """Puts the idle key for idle watches: see `idle` in keys.py. Shared by all watches of a kind in this daemon."""

    def __init__(self, connection: EtcdConnection, key: bytes) -> None:
        self._connection = connection
        self._key = key
        self._putting = asyncio.Lock()
        self._put = 0

    async def notify(self, seen_revision: int) -> int:
        """Make sure that every watch reads a revision above `seen_revision`, and return it. Raises CallFailed."""
        async with self._putting:
            # Watches become idle together: the put of one reaches all.
            if self._put <= seen_revision:
                self._put = (await self._connection.txn(success=[messages.put(self._key, b"")])).revision
            return self._put


class RecordWatch(Generic[V]):
    """One watch. `view` makes what an event shows; without changes there is an empty event every `idle`."""

    def __init__(
        self,
        connection: EtcdConnection,
        keys: WatchKeys,
        idle_notifier: IdleNotifier,
        view: View[V],
        *,
        referring: ReferenceSource | None = None,
        retry_for: timedelta,
        idle: timedelta,
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._idle_notifier = idle_notifier
        self._view = view
        self._retry_for = retry_for
        self._idle_seconds = idle.total_seconds()
        # The locks held at the position of the last event, by the part of the key that they share with the head.
        self._locks: dict[bytes, KeyValue] = {}
        self._reference_source = referring
        self._referrers = Referrers(referring)
        self._notified = 0

    async def run(self, token: str, *, listing: bool) -> AsyncGenerator[StoreEvent[V], None]:
        """See `ports.Store.watch_containers`. Raises CallFailed instead of StoreUnavailable."""
        position = _parse_token(token, self._keys) if token else await self._current_position(listing=listing)
        lists = position.phase is _Phase.LIST
        try:
            await self._load_referrers(position.base(self._keys.heads))
            while position.phase is _Phase.LIST:
                for pending in await self._page(position):
                    position = pending.position
                    yield pending.event()
            watch = await self._begin(position)
            try:
                # An event without a change reports that the watch has begun; after a list, list_complete does.
                if not lists:
                    yield _PendingEvent(position).event()
                while True:
                    for pending in await self._next(watch, position):
                        position = pending.position
                        yield pending.event()
            finally:
                await watch.close_stream()
        except RevisionUnavailable:
            raise ResumeTokenExpired(position.token()) from None

    async def _current_position(self, *, listing: bool) -> _Position:
        answer = await self._connection.read(messages.get(self._keys.idle), retry_for=self._retry_for)
        return _Position(_Phase.LIST if listing else _Phase.CHANGES, answer.revision, self._keys.heads.start)

    async def _load_referrers(self, revision: int) -> None:
        if self._reference_source is None:
            return
        self._referrers.clear()
        keys, more = self._reference_source.heads, True
        while more:
            (found,) = await self._read_at(revision, messages.get_range(keys, limit=_LIST_PAGE, revision=revision))
            self._referrers.add(found.entries)
            more = found.more
            keys = keys.after(found.entries[-1].key) if found.entries else keys

    async def _page(self, position: _Position) -> Iterator[_PendingEvent[V]]:
        """The next events of the initial list; the last event of the list has list_complete."""
        heads, locks = await self._read_at(
            position.revision,
            messages.get_range(self._keys.heads.after(position.key), limit=_LIST_PAGE, revision=position.revision),
            messages.get_range(self._keys.locks, revision=position.revision),
        )
        held = self._by_name(locks)
        pending = [
            _PendingEvent(
                replace(position, key=head.key), None, self._view(head, held.get(rest), self._referrers.of(rest))
            )
            for head in heads.entries
            for rest in [self._keys.heads.rest(head.key)]
        ]
        if not heads.more:
            pending.append(
                _PendingEvent(_Position(_Phase.CHANGES, position.revision, self._keys.heads.start), list_complete=True)
            )
        return iter(pending)

    async def _begin(self, position: _Position) -> RangeWatch:
        revision = position.base(self._keys.heads)
        (locks,) = await self._read_at(revision, messages.get_range(self._keys.locks, revision=revision))
        self._locks = self._by_name(locks)
        watch = RangeWatch(self._connection, self._keys.span, revision, self._retry_for)
        await watch.open()
        return watch

    async def _next(self, watch: RangeWatch, position: _Position) -> list[_PendingEvent[V]]:
        """The events of the next revision, which may change several objects or none."""
        # The random factor spreads the puts of daemons whose watches become idle together.
        batch = await watch.next(self._idle_seconds * random.uniform(0.7, 1))  # noqa: S311 - spreads load, no secret
        if batch is not None:
            return await self._events_of(batch, position)
        if watch.revision < self._notified:
            log.warning("etcd watch stalled; restarting it", revision=watch.revision, put=self._notified)
            await watch.close_stream()
            return []
        try:
            self._notified = await self._idle_notifier.notify(watch.revision)
        except CallFailed as failure:
            log.info("idle watch notification failed", reason=str(failure))
            return [_PendingEvent(position)]
        return []

    async def _events_of(self, batch: RevisionChanges, position: _Position) -> list[_PendingEvent[V]]:
        heads = {
            self._keys.heads.rest(change.key): change for change in batch.changes if self._keys.heads.holds(change.key)
        }
        locks = {
            self._keys.locks.rest(change.key): change for change in batch.changes if self._keys.locks.holds(change.key)
        }
        old_referrers = self._referrers.apply_changes(batch.changes)
        pending: list[_PendingEvent[V]] = []
        for name in sorted(heads.keys() | locks.keys() | old_referrers.keys()):
            lock_before, lock_after = self._locks.get(name), self._lock_after(name, locks.get(name))
            event_position = _Position(_Phase.CHANGES, batch.revision, self._keys.heads.start + name)
            if batch.revision == position.revision and event_position.key <= position.key:
                continue
            before, after = await self._heads(event_position, heads.get(name))
            referrers = self._referrers.of(name)
            if before is not None or after is not None:
                pending.append(
                    _PendingEvent(
                        event_position,
                        self._view(before, lock_before, old_referrers.get(name, referrers)) if before else None,
                        self._view(after, lock_after, referrers) if after else None,
                    )
                )
        end = _Position(_Phase.CHANGES, batch.revision, self._keys.heads.start)
        return [*pending[:-1], replace(pending[-1], position=end)] if pending else [_PendingEvent(end)]

    def _lock_after(self, name: bytes, change: KeyChange | None) -> KeyValue | None:
        if change is None:
            return self._locks.get(name)
        if change.after is None:
            self._locks.pop(name, None)
        else:
            self._locks[name] = change.after
        return change.after

    async def _heads(self, position: _Position, change: KeyChange | None) -> tuple[KeyValue | None, KeyValue | None]:
        """The head before and after; the same if only lock or referrers have changed. Raises RevisionUnavailable."""
        if change is None:
            (found,) = await self._read_at(position.revision, messages.get(position.key, position.revision))
            return found.only, found.only
        if change.before is None and not change.made:
            raise RevisionUnavailable
        return change.before, change.after

    async def _read_at(self, revision: int, *reads: messages.TxnOperation) -> tuple[RangeResponse, ...]:
        """Do `reads`, which are at `revision`. Raises RevisionUnavailable, CallFailed."""
        try:
            return (await self._connection.read(*reads, retry_for=self._retry_for)).ranges
        except CallFailed as failure:
            log.debug("watch read failed", revision=revision, reason=str(failure))
            raise map_revision_error(failure) from None

    def _by_name(self, locks: RangeResponse) -> dict[bytes, KeyValue]:
        return {self._keys.locks.rest(lock.key): lock for lock in locks.entries}


@dataclass(frozen=True, slots=True)
class _PendingEvent(Generic[V]):
    """An event to send, and the position after it."""

    position: _Position
    before: V | None = None
    after: V | None = None
    list_complete: bool = False

    def event(self) -> StoreEvent[V]:
        return StoreEvent(self.before, self.after, self.position.token(), self.list_complete)


def _parse_token(token: str, keys: WatchKeys) -> _Position:
    try:
        (phase,), revision, key = decode_position(token)
        position = _Position(_Phase(phase), revision, key)
    except ValueError:
        raise _invalid_token() from None
    if not (position.key == keys.heads.start or keys.heads.holds(position.key)):
        raise _invalid_token()
    return position


def _invalid_token() -> InvalidArgument:
    return InvalidArgument((FieldViolation("resume_token", "must be a resume_token of the same kind of watch"),))
