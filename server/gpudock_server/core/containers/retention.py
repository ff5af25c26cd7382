"""Periodic pruning: revisions that are too old, and files that no container's history names any more.

A change prunes old revisions itself (`containers.history`). Between changes, revisions become too old, and a daemon
that was killed leaves unfinished snapshots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection

import structlog

from gpudock_server.core.containers.commands import DeleteRevision
from gpudock_server.core.containers.history import History, prunable_revisions
from gpudock_server.core.containers.operation_history import read_operation_history
from gpudock_server.core.listings import read_all_pages
from gpudock_server.core.operations.commands import Commands
from gpudock_server.errors import ContainerBusy, ContainerNotFound, GpudockError, RevisionIsCurrent, RevisionNotFound
from gpudock_server.ports import ContainerView, RevisionBackupStore, SnapshotStore, Store

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class Retention:
    """Prunes the history of this node's containers periodically."""

    def __init__(
        self,
        history: History,
        containers: Commands,
        *,
        store: Store,
        snapshots: SnapshotStore,
        revision_backups: RevisionBackupStore,
        node: str,
        interval: float,
    ) -> None:
        """`interval`: seconds between two passes."""
        self._history = history
        self._store = store
        self._revision_backups = revision_backups
        self._snapshots = snapshots
        self._containers = containers
        self._node = node
        self._interval = interval

    async def run(self) -> None:
        """Prune history periodically until cancelled."""
        while True:
            try:
                await self.prune_once()
            except GpudockError as error:
                log.warning("history pruning failed; will retry", detail=error.message)
            await asyncio.sleep(self._interval)

    async def prune_once(self) -> None:
        """Prune revisions that are too old, and remove files of deleted containers and unfinished snapshots."""
        # Files are listed before the containers, so that a container created in between is not taken for a deleted one.
        backup_uids = await self._revision_backups.uids()
        snapshots = await self._snapshots.find()
        partials = await self._snapshots.partials()
        views = (await read_all_pages(self._store.containers)).items
        uids = {view.container.uid for view in views}
        await self._remove_deleted(set(backup_uids) - uids, {key.uid for key in snapshots})
        for key, operation_id in partials:
            stored = await self._store.operation(operation_id)
            if key.uid in uids and (stored is None or stored.value.state.ended):
                await self._snapshots.discard(key, operation_id)
        for view in views:
            await self._prune(view)

    async def _remove_deleted(self, unknown: Collection[str], with_files: Collection[str]) -> None:
        """Remove the files of containers that are known to be deleted.

        The store may have lost the record of the others: reconcile restores it, or reports their files.
        """
        if not unknown:
            return
        history = await read_operation_history(self._store, unknown)
        for uid in unknown:
            if uid in history.deleted or (history.is_known_gone(uid) and uid not in with_files):
                log.warning("removing files of deleted container", uid=uid)
                await self._snapshots.remove_all(uid)
                await self._revision_backups.delete_all(uid)

    async def _prune(self, view: ContainerView) -> None:
        """Prune by the same operation as DeleteContainerRevision, which locks the container."""
        container = view.container
        if container.node != self._node or view.operation_id:
            return
        for old in prunable_revisions(
            await self._history.revisions(container.uid), self._history.limits(container.spec)
        ):
            command = DeleteRevision(name=container.name, revision=old.revision.revision, etag=container.etag)
            try:
                await self._containers.run_to_end(command, None)
            except (ContainerBusy, ContainerNotFound, RevisionIsCurrent, RevisionNotFound):
                # Another operation holds the lock or changed the container; the next pass tries again.
                return
