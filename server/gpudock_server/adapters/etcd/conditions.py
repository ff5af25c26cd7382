"""Conditions of changes on their keys.

Each condition has two forms: `compare`, which etcd checks in the transaction, and `holds`, which finds out afterwards
which change made a transaction fail.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from typing_extensions import override

from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.messages import Compare, KeyValue
from gpudock_server.adapters.etcd.values import decode
from gpudock_server.errors import RecordUnreadable
from gpudock_server.model.claims import UNREADABLE_HOLDER, Holder


class Condition(ABC):
    """A condition on a key."""

    # Whether `compare` needs the key's current entry.
    needs_read: ClassVar[bool] = False

    @abstractmethod
    def holds(self, entry: KeyValue | None) -> bool:
        """Whether the condition holds for an entry; None means that the key does not exist."""

    @abstractmethod
    def compare(self, key: bytes, entry: KeyValue | None) -> Compare | None:
        """The comparison for a transaction based on `entry`; None if none is needed."""


@dataclass(frozen=True)
class VersionIs(Condition):
    """The key has this version; 0 means that it does not exist."""

    version: int

    @override
    def holds(self, entry: KeyValue | None) -> bool:
        return (entry.version if entry else 0) == self.version

    @override
    def compare(self, key: bytes, entry: KeyValue | None) -> Compare | None:
        return messages.version_is(key, self.version)


@dataclass(frozen=True)
class ValueIs(Condition):
    """The key has this value."""

    value: bytes

    @override
    def holds(self, entry: KeyValue | None) -> bool:
        return entry is not None and entry.value == self.value

    @override
    def compare(self, key: bytes, entry: KeyValue | None) -> Compare | None:
        return messages.value_is(key, self.value)


@dataclass(frozen=True)
class HeldBy(Condition):
    """The claim is held by the container `uid`."""

    uid: str
    needs_read = True

    @override
    def holds(self, entry: KeyValue | None) -> bool:
        return is_holder(self.uid, entry)

    @override
    def compare(self, key: bytes, entry: KeyValue | None) -> Compare | None:
        return messages.version_is(key, entry.version if entry else 0)


@dataclass(frozen=True)
class IfHeldBy(Condition):
    """Always holds; but a claim that the container `uid` holds must still be held by it when it is deleted."""

    uid: str
    needs_read = True

    @override
    def holds(self, entry: KeyValue | None) -> bool:
        return True

    @override
    def compare(self, key: bytes, entry: KeyValue | None) -> Compare | None:
        return messages.version_is(key, entry.version) if entry and is_holder(self.uid, entry) else None


@dataclass(frozen=True)
class Always(Condition):
    """No condition."""

    @override
    def holds(self, entry: KeyValue | None) -> bool:
        return True

    @override
    def compare(self, key: bytes, entry: KeyValue | None) -> Compare | None:
        return None


def is_holder(uid: str, entry: KeyValue | None) -> bool:
    """Whether `entry` is a claim held by the container `uid`."""
    return entry is not None and holder_of(entry).uid == uid


def holder_of(entry: KeyValue) -> Holder:
    """The holder of a claim; UNREADABLE_HOLDER for an unreadable one, which counts as held."""
    try:
        return decode(Holder, entry.key, entry.value)
    except RecordUnreadable:
        return UNREADABLE_HOLDER
