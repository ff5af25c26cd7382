"""Watches of one kind of object: what its heads and locks were before and after each change, from a token on.

A token is a place in etcd's history: a revision, and the last key that was told of it. There are two sorts, those
within the list that a watch begins with and those behind it, so that either can be gone on with:

    ["list", 120, ".../containers/b"]     the list as it was at revision 120, behind b
    ["told", 125, ".../containers/b"]     what revision 125 changed, behind b
    ["told", 125, ".../containers/"]      all of it was told: what comes behind revision 125

What is kept for a watch are the locks that are held, which are as many as there are operations at work, and, where
objects of another kind refer to those that are watched, who refers to what: a change of that is told as a change of the
object. What an object was before comes from etcd with every change, and where only its lock or its referrers have
changed the head is read at that revision.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
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

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

V = TypeVar("V")

_MAX_REVISION = 2**63 - 1
# How many heads of the first list are held at a time.
_LIST_PAGE = 50

# What is shown of an object: its head, its lock, and who refers to it.
View = Callable[[KeyValue, KeyValue | None, tuple[str, ...]], V]


class _Phase(StrEnum):
    LIST = "list"
    TOLD = "told"


@dataclass(frozen=True, slots=True)
class _Position:
    """See above. `key` is the start of the range where nothing, or everything, of it was told."""

    sort: _Phase
    revision: int
    key: bytes

    def base(self, heads: KeyRange) -> int:
        """The revision of which all was told, and on which what comes next is built."""
        # Of a revision that was told in part the rest comes with all of it, and what was told is left out.
        partly = self.sort is _Phase.TOLD and self.key != heads.start
        return self.revision - 1 if partly else self.revision

    def token(self) -> str:
        """As a caller keeps it."""
        text = json.dumps([self.sort.value, self.revision, self.key.decode("ascii")])
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def resume_token_after(keys: WatchKeys, revision: int) -> str:
    """The token of what comes behind `revision`."""
    return _Position(_Phase.TOLD, revision, keys.heads.start).token()


class IdleNotifier:
    """Moves idle watches on: see `idle` in keys.py. One for all watches of a kind in this daemon."""

    def __init__(self, connection: EtcdConnection, key: bytes) -> None:
        self._connection = connection
        self._key = key
        self._putting = asyncio.Lock()
        self._put = 0

    async def notify(self, seen_revision: int) -> int:
        """Have every watch hear of a revision above `seen_revision`; that revision. Raises CallFailed."""
        async with self._putting:
            # Watches fall silent together: the first one's beat is heard by all the others.
            if self._put <= seen_revision:
                self._put = (await self._connection.txn(success=[messages.put(self._key, b"")])).revision
            return self._put


class RecordWatch(Generic[V]):
    """One watch. `view` makes what is shown of an object; something is said at least every `idle`."""

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
        # Those that are held at the place that was told last, by the name that they share with the head.
        self._locks: dict[bytes, KeyValue] = {}
        self._reference_source = referring
        self._referrers = Referrers(referring)
        self._notified = 0

    async def run(self, token: str, *, listing: bool) -> AsyncGenerator[StoreEvent[V], None]:
        """See `ports.Store.watch_containers`. Raises CallFailed in the place of StoreUnavailable."""
        position = _parse_token(token, self._keys) if token else await self._current_position(listing=listing)
        lists = position.sort is _Phase.LIST
        try:
            await self._load_referrers(position.base(self._keys.heads))
            while position.sort is _Phase.LIST:
                for told in await self._page(position):
                    position = told.position
                    yield told.seen()
            watch = await self._begin(position)
            try:
                # Says that the watch has begun; after a list, its completion says so.
                if not lists:
                    yield _PendingEvent(position).seen()
                while True:
                    for told in await self._next(watch, position):
                        position = told.position
                        yield told.seen()
            finally:
                await watch.close_stream()
        except RevisionUnavailable:
            raise ResumeTokenExpired(position.token()) from None

    async def _current_position(self, *, listing: bool) -> _Position:
        answer = await self._connection.read(messages.get(self._keys.idle), retry_for=self._retry_for)
        return _Position(_Phase.LIST if listing else _Phase.TOLD, answer.revision, self._keys.heads.start)

    async def _load_referrers(self, revision: int) -> None:
        if self._reference_source is None:
            return
        self._referrers.clear()
        keys, more = self._reference_source.heads, True
        while more:
            (found,) = await self._read_at(revision, messages.get_range(keys, limit=_LIST_PAGE, revision=revision))
            self._referrers.take(found.entries)
            more = found.more
            keys = keys.after(found.entries[-1].key) if found.entries else keys

    async def _page(self, position: _Position) -> Iterator[_PendingEvent[V]]:
        """What comes next in the list, and last that it is complete."""
        heads, locks = await self._read_at(
            position.revision,
            messages.get_range(self._keys.heads.after(position.key), limit=_LIST_PAGE, revision=position.revision),
            messages.get_range(self._keys.locks, revision=position.revision),
        )
        held = self._by_name(locks)
        told = [
            _PendingEvent(
                replace(position, key=head.key), None, self._view(head, held.get(rest), self._referrers.of(rest))
            )
            for head in heads.entries
            for rest in [self._keys.heads.rest(head.key)]
        ]
        if not heads.more:
            told.append(
                _PendingEvent(_Position(_Phase.TOLD, position.revision, self._keys.heads.start), list_complete=True)
            )
        return iter(told)

    async def _begin(self, position: _Position) -> RangeWatch:
        revision = position.base(self._keys.heads)
        (locks,) = await self._read_at(revision, messages.get_range(self._keys.locks, revision=revision))
        self._locks = self._by_name(locks)
        watch = RangeWatch(self._connection, self._keys.span, revision, self._retry_for)
        await watch.open()
        return watch

    async def _next(self, watch: RangeWatch, position: _Position) -> list[_PendingEvent[V]]:
        """What happened next: of several objects, where one revision changed several; of none, where it did not."""
        # Daemons that fall silent at once need not all speak at once.
        step = await watch.next(self._idle_seconds * random.uniform(0.7, 1))  # noqa: S311 - spreads load, no secret
        if step is not None:
            return await self._events_of(step, position)
        if watch.revision < self._notified:
            log.warning("a watch of etcd is stuck; making it anew", revision=watch.revision, put=self._notified)
            await watch.close_stream()
            return []
        try:
            self._notified = await self._idle_notifier.notify(watch.revision)
        except CallFailed as failure:
            log.info("an idle watch could not be moved on", reason=str(failure))
            return [_PendingEvent(position)]
        return []

    async def _events_of(self, step: RevisionChanges, position: _Position) -> list[_PendingEvent[V]]:
        heads = {self._keys.heads.rest(one.key): one for one in step.changes if self._keys.heads.holds(one.key)}
        locks = {self._keys.locks.rest(one.key): one for one in step.changes if self._keys.locks.holds(one.key)}
        referred = self._referrers.apply_changes(step.changes)
        told: list[_PendingEvent[V]] = []
        for name in sorted(heads.keys() | locks.keys() | referred.keys()):
            lock_before, lock_after = self._locks.get(name), self._lock_after(name, locks.get(name))
            here = _Position(_Phase.TOLD, step.revision, self._keys.heads.start + name)
            if step.revision == position.revision and here.key <= position.key:
                continue
            before, after = await self._heads(here, heads.get(name))
            referrers = self._referrers.of(name)
            if before is not None or after is not None:
                told.append(
                    _PendingEvent(
                        here,
                        self._view(before, lock_before, referred.get(name, referrers)) if before else None,
                        self._view(after, lock_after, referrers) if after else None,
                    )
                )
        all_of_it = _Position(_Phase.TOLD, step.revision, self._keys.heads.start)
        return [*told[:-1], replace(told[-1], position=all_of_it)] if told else [_PendingEvent(all_of_it)]

    def _lock_after(self, name: bytes, change: KeyChange | None) -> KeyValue | None:
        if change is None:
            return self._locks.get(name)
        if change.after is None:
            self._locks.pop(name, None)
        else:
            self._locks[name] = change.after
        return change.after

    async def _heads(self, here: _Position, change: KeyChange | None) -> tuple[KeyValue | None, KeyValue | None]:
        """The head before and after; the same where only what is beside it has changed. Raises RevisionUnavailable."""
        if change is None:
            (found,) = await self._read_at(here.revision, messages.get(here.key, here.revision))
            return found.only, found.only
        if change.before is None and not change.made:
            raise RevisionUnavailable
        return change.before, change.after

    async def _read_at(self, revision: int, *reads: messages.TxnOperation) -> tuple[RangeResponse, ...]:
        """Reads at a revision of the past. Raises RevisionUnavailable, CallFailed."""
        try:
            return (await self._connection.read(*reads, retry_for=self._retry_for)).ranges
        except CallFailed as failure:
            log.debug("a watch looks for what etcd does not have", revision=revision, reason=str(failure))
            raise map_revision_error(failure) from None

    def _by_name(self, locks: RangeResponse) -> dict[bytes, KeyValue]:
        return {self._keys.locks.rest(lock.key): lock for lock in locks.entries}


@dataclass(frozen=True, slots=True)
class _PendingEvent(Generic[V]):
    """What is to be told, and the place behind it."""

    position: _Position
    before: V | None = None
    after: V | None = None
    list_complete: bool = False

    def seen(self) -> StoreEvent[V]:
        return StoreEvent(self.before, self.after, self.position.token(), self.list_complete)


def _parse_token(token: str, keys: WatchKeys) -> _Position:
    try:
        padded = token + "=" * (-len(token) % 4)
        sort, revision, text = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        position = _Position(_Phase(sort), revision, text.encode("ascii"))
    except (binascii.Error, UnicodeError, ValueError, TypeError, AttributeError, RecursionError):
        raise _invalid_token() from None
    # The first revision of a key is 2: 1 is an etcd in which nothing was ever put.
    if type(revision) is not int or not 1 < revision <= _MAX_REVISION:
        raise _invalid_token()
    if not (position.key == keys.heads.start or keys.heads.holds(position.key)):
        raise _invalid_token()
    return position


def _invalid_token() -> InvalidArgument:
    return InvalidArgument((FieldViolation("resume_token", "it is not a token of this watch"),))
