"""Backups of the history of containers, for the case that the store loses it."""

from __future__ import annotations

from typing import Protocol

from gpudock_server.model.revision_backup import RevisionBackup
from gpudock_server.model.snapshot import SnapshotKey


class RevisionBackupStore(Protocol):
    """Backups of the revisions of this node's containers, on its disk. Raises SnapshotFailed, DiskFull.

    The store is authoritative; the backups are read only if the store has lost records.
    """

    async def write(self, entry: RevisionBackup) -> None:
        """Add the backup of a revision, or replace it atomically."""
        ...

    async def read(self, uid: str) -> tuple[RevisionBackup, ...]:
        """Return the readable backups of a container, oldest first."""
        ...

    async def delete(self, key: SnapshotKey) -> None:
        """Delete the backup of one revision."""
        ...

    async def delete_all(self, uid: str) -> None:
        """Delete all backups of a container."""
        ...

    async def uids(self) -> tuple[str, ...]:
        """Return the uid of every container that has backups or snapshots."""
        ...
