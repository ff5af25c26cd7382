"""The ledger: a copy of containers' histories on the disk, beside the files that were kept of them."""

from __future__ import annotations

from datetime import datetime

from gpudock_server.model.container import ContainerRevision, EngineBinding
from gpudock_server.model.record import Record
from gpudock_server.model.snapshot import Snapshot, SnapshotKey


class RevisionBackup(Record):
    """One revision of a container, with what its container's record says that no revision does.

    `owner` and `create_time` are the container's. `engine` is what served it in this revision; None where the store
    did not say that any more when this was written. `snapshot` is what the store said of its files.
    """

    revision: ContainerRevision
    owner: str = ""
    create_time: datetime
    engine: EngineBinding | None = None
    snapshot: Snapshot | None = None

    @property
    def number(self) -> int:
        """The number of the revision."""
        return self.revision.revision

    @property
    def key(self) -> SnapshotKey:
        """Names it on the disk."""
        return SnapshotKey(uid=self.revision.uid, revision=self.revision.revision)
