"""Who refers to the objects of a watch: the objects of another kind that name them, as of the place told last."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from gpudock_server.adapters.etcd.keys import KeyRange
from gpudock_server.adapters.etcd.messages import KeyChange, KeyValue


@dataclass(frozen=True, slots=True)
class Reference:
    """What one referrer says: its own name, and of the objects it refers to what tells their keys apart."""

    name: str
    to: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class ReferenceSource:
    """Where the referrers' heads are, and how one is read. One that cannot be read refers to nothing."""

    heads: KeyRange
    read: Callable[[KeyValue], Reference]


class Referrers:
    """The referrers of each object. Kept are those that refer to anything, and of them only names."""

    def __init__(self, referring: ReferenceSource | None) -> None:
        self._reference_source = referring
        self._references: dict[bytes, Reference] = {}
        self._names: defaultdict[bytes, set[str]] = defaultdict(set)

    def clear(self) -> None:
        """Know of none."""
        self._references.clear()
        self._names.clear()

    def take(self, heads: Iterable[KeyValue]) -> None:
        """Learn what these referrers say."""
        if self._reference_source is not None:
            for head in heads:
                self._record(head.key, self._reference_source.read(head))

    def of(self, rest: bytes) -> tuple[str, ...]:
        """Who refers to an object, by name."""
        return tuple(sorted(self._names.get(rest, ())))

    def apply_changes(self, changes: Collection[KeyChange]) -> dict[bytes, tuple[str, ...]]:
        """Learn what one revision changed; who referred before to each object that is referred to otherwise now."""
        if self._reference_source is None:
            return {}
        before: dict[bytes, tuple[str, ...]] = {}
        for change in changes:
            if not self._reference_source.heads.holds(change.key):
                continue
            said = self._references.get(change.key, Reference(""))
            says = self._reference_source.read(change.after) if change.after else Reference("")
            for rest in said.to ^ says.to:
                before.setdefault(rest, self.of(rest))
            self._record(change.key, says)
        return before

    def _record(self, key: bytes, says: Reference) -> None:
        said = self._references.pop(key, Reference(""))
        for rest in said.to:
            self._names[rest].discard(said.name)
            if not self._names[rest]:
                del self._names[rest]
        if says.to:
            self._references[key] = says
        for rest in says.to:
            self._names[rest].add(says.name)
