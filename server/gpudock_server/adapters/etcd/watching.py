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

from gpudock_server.adapters.etcd import wire
from gpudock_server.adapters.etcd.connection import CallFailed, EtcdConnection
from gpudock_server.adapters.etcd.keys import KeyRange, WatchedKeys
from gpudock_server.adapters.etcd.range_watch import HistoryLost, RangeWatch, Step, lost_or
from gpudock_server.adapters.etcd.referring import Referrers, Referring
from gpudock_server.adapters.etcd.wire import Entry, KeyChange, RangeAnswer
from gpudock_server.errors import FieldViolation, InvalidArgument, ResumeTokenExpired
from gpudock_server.ports import Seen

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

V = TypeVar("V")

_MAX_REVISION = 2**63 - 1
# How many heads of the first list are held at a time.
_LIST_PAGE = 50

# What is shown of an object: its head, its lock, and who refers to it.
View = Callable[[Entry, Entry | None, tuple[str, ...]], V]


class _Sort(StrEnum):
    LIST = "list"
    TOLD = "told"


@dataclass(frozen=True, slots=True)
class _Place:
    """See above. `key` is the start of the range where nothing, or everything, of it was told."""

    sort: _Sort
    revision: int
    key: bytes

    def base(self, heads: KeyRange) -> int:
        """The revision of which all was told, and on which what comes next is built."""
        # Of a revision that was told in part the rest comes with all of it, and what was told is left out.
        partly = self.sort is _Sort.TOLD and self.key != heads.start
        return self.revision - 1 if partly else self.revision

    def token(self) -> str:
        """As a caller keeps it."""
        text = json.dumps([self.sort.value, self.revision, self.key.decode("ascii")])
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def told_token(keys: WatchedKeys, revision: int) -> str:
    """The token of what comes behind `revision`."""
    return _Place(_Sort.TOLD, revision, keys.heads.start).token()


class Pulse:
    """Moves idle watches on: see `idle` in keys.py. One for all watches of a kind in this daemon."""

    def __init__(self, connection: EtcdConnection, key: bytes) -> None:
        self._connection = connection
        self._key = key
        self._putting = asyncio.Lock()
        self._put = 0

    async def beat(self, heard: int) -> int:
        """Have every watch hear of a revision above `heard`; that revision. Raises CallFailed."""
        async with self._putting:
            # Watches fall silent together: the first one's beat is heard by all the others.
            if self._put <= heard:
                self._put = (await self._connection.txn(success=[wire.put(self._key, b"")])).revision
            return self._put


class HeadWatch(Generic[V]):
    """One watch. `view` makes what is shown of an object; something is said at least every `idle`."""

    def __init__(
        self,
        connection: EtcdConnection,
        keys: WatchedKeys,
        pulse: Pulse,
        view: View[V],
        *,
        referring: Referring | None = None,
        patience: timedelta,
        idle: timedelta,
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._pulse = pulse
        self._view = view
        self._patience = patience
        self._idle_seconds = idle.total_seconds()
        # Those that are held at the place that was told last, by the name that they share with the head.
        self._locks: dict[bytes, Entry] = {}
        self._referring = referring
        self._referrers = Referrers(referring)
        self._beaten = 0

    async def run(self, token: str, *, listing: bool) -> AsyncGenerator[Seen[V], None]:
        """See `ports.Store.watch_containers`. Raises CallFailed in the place of StoreUnavailable."""
        place = _opened(token, self._keys) if token else await self._here(listing=listing)
        lists = place.sort is _Sort.LIST
        try:
            await self._learn_referrers(place.base(self._keys.heads))
            while place.sort is _Sort.LIST:
                for told in await self._page(place):
                    place = told.place
                    yield told.seen()
            watch = await self._begin(place)
            try:
                # Says that the watch has begun; after a list, its completion says so.
                if not lists:
                    yield _Told(place).seen()
                while True:
                    for told in await self._next(watch, place):
                        place = told.place
                        yield told.seen()
            finally:
                await watch.drop()
        except HistoryLost:
            raise ResumeTokenExpired(place.token()) from None

    async def _here(self, *, listing: bool) -> _Place:
        answer = await self._connection.read(wire.get(self._keys.idle), patience=self._patience)
        return _Place(_Sort.LIST if listing else _Sort.TOLD, answer.revision, self._keys.heads.start)

    async def _learn_referrers(self, revision: int) -> None:
        if self._referring is None:
            return
        self._referrers.clear()
        keys, more = self._referring.heads, True
        while more:
            (found,) = await self._read_at(revision, wire.get_range(keys, limit=_LIST_PAGE, revision=revision))
            self._referrers.take(found.entries)
            more = found.more
            keys = keys.after(found.entries[-1].key) if found.entries else keys

    async def _page(self, place: _Place) -> Iterator[_Told[V]]:
        """What comes next in the list, and last that it is complete."""
        heads, locks = await self._read_at(
            place.revision,
            wire.get_range(self._keys.heads.after(place.key), limit=_LIST_PAGE, revision=place.revision),
            wire.get_range(self._keys.locks, revision=place.revision),
        )
        held = self._by_name(locks)
        told = [
            _Told(replace(place, key=head.key), None, self._view(head, held.get(rest), self._referrers.of(rest)))
            for head in heads.entries
            for rest in [self._keys.heads.rest(head.key)]
        ]
        if not heads.more:
            told.append(_Told(_Place(_Sort.TOLD, place.revision, self._keys.heads.start), list_complete=True))
        return iter(told)

    async def _begin(self, place: _Place) -> RangeWatch:
        revision = place.base(self._keys.heads)
        (locks,) = await self._read_at(revision, wire.get_range(self._keys.locks, revision=revision))
        self._locks = self._by_name(locks)
        watch = RangeWatch(self._connection, self._keys.span, revision, self._patience)
        await watch.open()
        return watch

    async def _next(self, watch: RangeWatch, place: _Place) -> list[_Told[V]]:
        """What happened next: of several objects, where one revision changed several; of none, where it did not."""
        # Daemons that fall silent at once need not all speak at once.
        step = await watch.next(self._idle_seconds * random.uniform(0.7, 1))  # noqa: S311 - spreads load, no secret
        if step is not None:
            return await self._told(step, place)
        if watch.revision < self._beaten:
            log.warning("a watch of etcd is stuck; making it anew", revision=watch.revision, put=self._beaten)
            await watch.drop()
            return []
        try:
            self._beaten = await self._pulse.beat(watch.revision)
        except CallFailed as failure:
            log.info("an idle watch could not be moved on", reason=str(failure))
            return [_Told(place)]
        return []

    async def _told(self, step: Step, place: _Place) -> list[_Told[V]]:
        heads = {self._keys.heads.rest(one.key): one for one in step.changes if self._keys.heads.holds(one.key)}
        locks = {self._keys.locks.rest(one.key): one for one in step.changes if self._keys.locks.holds(one.key)}
        referred = self._referrers.follow(step.changes)
        told: list[_Told[V]] = []
        for name in sorted(heads.keys() | locks.keys() | referred.keys()):
            lock_before, lock_after = self._locks.get(name), self._lock_after(name, locks.get(name))
            here = _Place(_Sort.TOLD, step.revision, self._keys.heads.start + name)
            if step.revision == place.revision and here.key <= place.key:
                continue
            before, after = await self._heads(here, heads.get(name))
            referrers = self._referrers.of(name)
            if before is not None or after is not None:
                told.append(
                    _Told(
                        here,
                        self._view(before, lock_before, referred.get(name, referrers)) if before else None,
                        self._view(after, lock_after, referrers) if after else None,
                    )
                )
        all_of_it = _Place(_Sort.TOLD, step.revision, self._keys.heads.start)
        return [*told[:-1], replace(told[-1], place=all_of_it)] if told else [_Told(all_of_it)]

    def _lock_after(self, name: bytes, change: KeyChange | None) -> Entry | None:
        if change is None:
            return self._locks.get(name)
        if change.after is None:
            self._locks.pop(name, None)
        else:
            self._locks[name] = change.after
        return change.after

    async def _heads(self, here: _Place, change: KeyChange | None) -> tuple[Entry | None, Entry | None]:
        """The head before and after; the same where only what is beside it has changed. Raises HistoryLost."""
        if change is None:
            (found,) = await self._read_at(here.revision, wire.get(here.key, here.revision))
            return found.only, found.only
        if change.before is None and not change.made:
            raise HistoryLost
        return change.before, change.after

    async def _read_at(self, revision: int, *reads: wire.Do) -> tuple[RangeAnswer, ...]:
        """Reads at a revision of the past. Raises HistoryLost, CallFailed."""
        try:
            return (await self._connection.read(*reads, patience=self._patience)).ranges
        except CallFailed as failure:
            log.debug("a watch looks for what etcd does not have", revision=revision, reason=str(failure))
            raise lost_or(failure) from None

    def _by_name(self, locks: RangeAnswer) -> dict[bytes, Entry]:
        return {self._keys.locks.rest(lock.key): lock for lock in locks.entries}


@dataclass(frozen=True, slots=True)
class _Told(Generic[V]):
    """What is to be told, and the place behind it."""

    place: _Place
    before: V | None = None
    after: V | None = None
    list_complete: bool = False

    def seen(self) -> Seen[V]:
        return Seen(self.before, self.after, self.place.token(), self.list_complete)


def _opened(token: str, keys: WatchedKeys) -> _Place:
    try:
        padded = token + "=" * (-len(token) % 4)
        sort, revision, text = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
        place = _Place(_Sort(sort), revision, text.encode("ascii"))
    except (binascii.Error, UnicodeError, ValueError, TypeError, AttributeError, RecursionError):
        raise _no_token() from None
    # The first revision of a key is 2: 1 is an etcd in which nothing was ever put.
    if type(revision) is not int or not 1 < revision <= _MAX_REVISION:
        raise _no_token()
    if not (place.key == keys.heads.start or keys.heads.holds(place.key)):
        raise _no_token()
    return place


def _no_token() -> InvalidArgument:
    return InvalidArgument((FieldViolation("resume_token", "it is not a token of this watch"),))
