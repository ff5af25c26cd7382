"""Revision backups: copies of the history of containers on disk, next to their snapshots."""

from __future__ import annotations

from datetime import datetime

from gpudock_server.model.container import ContainerRevision, EngineBinding
from gpudock_server.model.record import Record
from gpudock_server.model.snapshot import Snapshot, SnapshotKey


class RevisionBackup(Record):
    """One revision of a container, with the fields of the container's record that revisions do not have.

    `owner` and `create_time` are those of the container. `engine` is the engine container of this revision; None if the
    store no longer had it when this was written. `snapshot` is the record of the revision's snapshot.
    """

    revision: ContainerRevision
    owner: str = ""
    create_time: datetime
    engine: EngineBinding | None = None
    snapshot: Snapshot | None = None

    @property
    def number(self) -> int:
        """Return the number of the revision."""
        return self.revision.revision

    @property
    def key(self) -> SnapshotKey:
        """Return the key of the backup on disk."""
        return SnapshotKey(uid=self.revision.uid, revision=self.revision.revision)
