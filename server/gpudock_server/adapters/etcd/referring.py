"""Who refers to the objects of a watch: the objects of another kind that name them, as of the place told last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from gpudock_server.adapters.etcd.keys import KeyRange
from gpudock_server.adapters.etcd.wire import Entry, KeyChange


@dataclass(frozen=True, slots=True)
class Reference:
    """What one referrer says: its own name, and of the objects it refers to what tells their keys apart."""

    name: str
    to: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class Referring:
    """Where the referrers' heads are, and how one is read. One that cannot be read refers to nothing."""

    heads: KeyRange
    read: Callable[[Entry], Reference]


class Referrers:
    """The referrers of each object. Kept are those that refer to anything, and of them only names."""

    def __init__(self, referring: Referring | None) -> None:
        self._referring = referring
        self._said: dict[bytes, Reference] = {}
        self._names: defaultdict[bytes, set[str]] = defaultdict(set)

    def clear(self) -> None:
        """Know of none."""
        self._said.clear()
        self._names.clear()

    def take(self, heads: Iterable[Entry]) -> None:
        """Learn what these referrers say."""
        if self._referring is not None:
            for head in heads:
                self._say(head.key, self._referring.read(head))

    def of(self, rest: bytes) -> tuple[str, ...]:
        """Who refers to an object, by name."""
        return tuple(sorted(self._names.get(rest, ())))

    def follow(self, changes: Collection[KeyChange]) -> dict[bytes, tuple[str, ...]]:
        """Learn what one revision changed; who referred before to each object that is referred to otherwise now."""
        if self._referring is None:
            return {}
        before: dict[bytes, tuple[str, ...]] = {}
        for change in changes:
            if not self._referring.heads.holds(change.key):
                continue
            said = self._said.get(change.key, Reference(""))
            says = self._referring.read(change.after) if change.after else Reference("")
            for rest in said.to ^ says.to:
                before.setdefault(rest, self.of(rest))
            self._say(change.key, says)
        return before

    def _say(self, key: bytes, says: Reference) -> None:
        said = self._said.pop(key, Reference(""))
        for rest in said.to:
            self._names[rest].discard(said.name)
            if not self._names[rest]:
                del self._names[rest]
        if says.to:
            self._said[key] = says
        for rest in says.to:
            self._names[rest].add(says.name)
