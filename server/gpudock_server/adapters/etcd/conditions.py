"""What a change needs to find at its key.

Each condition is written twice: as the comparison that etcd makes, which guards the transaction, and as `holds`, which
tells afterwards which change a refused transaction failed on.
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
    """What must hold of a key."""

    # Whether the comparison is made from what the key was read to be.
    needs_read: ClassVar[bool] = False

    @abstractmethod
    def holds(self, entry: KeyValue | None) -> bool:
        """Whether it holds of what was read; None is "there is none"."""

    @abstractmethod
    def compare(self, key: bytes, entry: KeyValue | None) -> Compare | None:
        """The comparison that guards a transaction built on `entry`; None where nothing needs a guard."""


@dataclass(frozen=True)
class VersionIs(Condition):
    """The key has this version; 0: it does not exist."""

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
    """The claim is held by this container, whatever else its holder says."""

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
    """Holds always; but what is deleted because this container holds it must be held by it still."""

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
    """Whether `entry` is a claim that the container `uid` holds."""
    return entry is not None and holder_of(entry).uid == uid


def holder_of(entry: KeyValue) -> Holder:
    """Who holds the claim that `entry` is. One that cannot be read is held all the same: by nobody that is known."""
    try:
        return decode(Holder, entry.key, entry.value)
    except RecordUnreadable:
        return UNREADABLE_HOLDER
