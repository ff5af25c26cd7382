"""Writes each new revision into the revision_backups, the copy of the history on the disk that outlives the store."""

from __future__ import annotations

import structlog

from gpudock_server.errors import GpudockError
from gpudock_server.model.container import Container, ContainerRevision
from gpudock_server.model.revision_backup import RevisionBackup
from gpudock_server.model.snapshot import Snapshot
from gpudock_server.ports import RevisionBackupStore

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def backup_of_revision(container: Container, revision: ContainerRevision, snapshot: Snapshot | None) -> RevisionBackup:
    """The backup of a container's current revision."""
    return RevisionBackup(
        revision=revision,
        owner=container.owner,
        create_time=container.create_time,
        engine=container.engine,
        snapshot=snapshot,
    )


async def write_revision_backup(
    revision_backups: RevisionBackupStore,
    container: Container,
    revision: ContainerRevision,
    ended: tuple[int, Snapshot] | None = None,
) -> None:
    """Write a container's new revision, and with `ended` the snapshot of the revision before.

    Called right before the transaction that records both, which does not depend on it: after an error, reconcile writes
    the entries. If the transaction fails, the next change overwrites the entry of the same number.
    """
    try:
        if ended is not None:
            number, snapshot = ended
            entries = [entry for entry in await revision_backups.read(container.uid) if entry.number == number]
            for entry in entries:
                await revision_backups.write(entry.model_copy(update={"snapshot": snapshot}))
        await revision_backups.write(backup_of_revision(container, revision, None))
    except GpudockError as error:
        log.warning(
            "revision backup was not written; reconcile will retry", container=container.name, detail=error.message
        )
