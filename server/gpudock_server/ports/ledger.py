"""A copy of containers' histories that outlives the store."""

from __future__ import annotations

from typing import Protocol

from gpudock_server.model.ledger import LedgerEntry
from gpudock_server.model.snapshot import SnapshotKey


class Ledger(Protocol):
    """Keeps entries on the disk of this node, for its own containers alone. Raises SnapshotFailed, DiskFull.

    The store is the truth and this the copy: it is read only where the store has lost something.
    """

    async def write(self, entry: LedgerEntry) -> None:
        """Add an entry, or replace the one of its container and number, atomically."""
        ...

    async def read(self, uid: str) -> tuple[LedgerEntry, ...]:
        """What is kept of a container, oldest first; what cannot be read is left out."""
        ...

    async def forget(self, key: SnapshotKey) -> None:
        """Remove one entry."""
        ...

    async def forget_all(self, uid: str) -> None:
        """Remove all entries of a container."""
        ...

    async def uids(self) -> tuple[str, ...]:
        """Every container of which there are entries or snapshots."""
        ...
