"""Writing a container's history into the ledger as it is made, so that it outlives the store."""

from __future__ import annotations

import structlog

from gpudock_server.errors import GpudockError
from gpudock_server.model.container import Container, ContainerRevision
from gpudock_server.model.revision_backup import RevisionBackup
from gpudock_server.model.snapshot import Snapshot
from gpudock_server.ports import RevisionBackupStore

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def ledger_entry(container: Container, revision: ContainerRevision, snapshot: Snapshot | None) -> RevisionBackup:
    """The entry of a container's current revision."""
    return RevisionBackup(
        revision=revision,
        owner=container.owner,
        create_time=container.create_time,
        engine=container.engine,
        snapshot=snapshot,
    )


async def write_ledger_entry(
    ledger: RevisionBackupStore,
    container: Container,
    revision: ContainerRevision,
    ended: tuple[int, Snapshot] | None = None,
) -> None:
    """Write the revision that a container is about to come to, and what was kept of the one that ends.

    Called right before the transaction that records them, which does not depend on it: what cannot be written now is
    written by reconcile. A number that is not recorded after all is written again by the next change.
    """
    try:
        if ended is not None:
            number, snapshot = ended
            entries = [one for one in await ledger.read(container.uid) if one.number == number]
            for entry in entries:
                await ledger.write(entry.model_copy(update={"snapshot": snapshot}))
        await ledger.write(ledger_entry(container, revision, None))
    except GpudockError as error:
        log.warning("a revision is not in the ledger yet", container=container.name, detail=error.message)
