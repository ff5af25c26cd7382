"""The referrers of watched objects: objects of another kind that name them, such as containers that mount a volume."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from gpudock_server.adapters.etcd.keys import KeyRange
from gpudock_server.adapters.etcd.messages import KeyChange, KeyValue


@dataclass(frozen=True, slots=True)
class Reference:
    """A referrer's name, and the objects it refers to (`KeyRange.rest` of their keys)."""

    name: str
    to: frozenset[bytes] = frozenset()


@dataclass(frozen=True, slots=True)
class ReferenceSource:
    """Where the heads of referrers are, and how to read one; an unreadable one must be read as no reference."""

    heads: KeyRange
    read: Callable[[KeyValue], Reference]


class Referrers:
    """The names of the referrers of each object, at the position of the last event of a watch."""

    def __init__(self, referring: ReferenceSource | None) -> None:
        self._reference_source = referring
        self._references: dict[bytes, Reference] = {}
        self._names: defaultdict[bytes, set[str]] = defaultdict(set)

    def clear(self) -> None:
        """Forget all referrers."""
        self._references.clear()
        self._names.clear()

    def add(self, heads: Iterable[KeyValue]) -> None:
        """Add the referrers with these heads."""
        if self._reference_source is not None:
            for head in heads:
                self._record(head.key, self._reference_source.read(head))

    def of(self, rest: bytes) -> tuple[str, ...]:
        """The names of an object's referrers, sorted."""
        return tuple(sorted(self._names.get(rest, ())))

    def apply_changes(self, changes: Collection[KeyChange]) -> dict[bytes, tuple[str, ...]]:
        """Apply the changes of one revision; returns the previous referrers of each object whose referrers changed."""
        if self._reference_source is None:
            return {}
        before: dict[bytes, tuple[str, ...]] = {}
        for change in changes:
            if not self._reference_source.heads.holds(change.key):
                continue
            old = self._references.get(change.key, Reference(""))
            new = self._reference_source.read(change.after) if change.after else Reference("")
            for rest in old.to ^ new.to:
                before.setdefault(rest, self.of(rest))
            self._record(change.key, new)
        return before

    def _record(self, key: bytes, new: Reference) -> None:
        old = self._references.pop(key, Reference(""))
        for rest in old.to:
            self._names[rest].discard(old.name)
            if not self._names[rest]:
                del self._names[rest]
        if new.to:
            self._references[key] = new
        for rest in new.to:
            self._names[rest].add(new.name)
