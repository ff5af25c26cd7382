"""A copy of containers' histories that outlives the store."""

from __future__ import annotations

from typing import Protocol

from gpudock_server.model.revision_backup import RevisionBackup
from gpudock_server.model.snapshot import SnapshotKey


class RevisionBackupStore(Protocol):
    """Keeps entries on the disk of this node, for its own containers alone. Raises SnapshotFailed, DiskFull.

    The store is the truth and this the copy: it is read only where the store has lost something.
    """

    async def write(self, entry: RevisionBackup) -> None:
        """Add an entry, or replace the one of its container and number, atomically."""
        ...

    async def read(self, uid: str) -> tuple[RevisionBackup, ...]:
        """What is kept of a container, oldest first; what cannot be read is left out."""
        ...

    async def delete(self, key: SnapshotKey) -> None:
        """Remove one entry."""
        ...

    async def delete_all(self, uid: str) -> None:
        """Remove all entries of a container."""
        ...

    async def uids(self) -> tuple[str, ...]:
        """Every container of which there are entries or snapshots."""
        ...
