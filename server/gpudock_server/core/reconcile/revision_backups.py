"""Keeps the backups of revision records up to date, and restores from them what the store has lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import structlog

from gpudock_server.core.containers.operation_history import OperationHistory, read_operation_history
from gpudock_server.core.containers.revision_backups import backup_of_revision
from gpudock_server.core.reconcile.drift import ReportDrift
from gpudock_server.core.reconcile.records import ContainerRecords, EngineContainerLabels
from gpudock_server.errors import GpudockError, StoreUnavailable
from gpudock_server.model.container import Container, ContainerState, ContainerStatus
from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy
from gpudock_server.model.engine import EngineContainer
from gpudock_server.model.record import now
from gpudock_server.model.revision_backup import RevisionBackup
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotKind
from gpudock_server.model.store_changes import PutContainer, PutRevision, PutSnapshot, StoreChange
from gpudock_server.ports import (
    ContainerView,
    Engine,
    RevisionBackupStore,
    RevisionView,
    SnapshotStore,
    Store,
    StoreConflict,
)

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class RevisionBackupReconciler:
    """The rules for histories, and for containers of which only the history is left."""

    def __init__(
        self, store: Store, engine: Engine, snapshots: SnapshotStore, revision_backups: RevisionBackupStore, node: str
    ) -> None:
        self._store = store
        self._engine = engine
        self._snapshots = snapshots
        self._revision_backups = revision_backups
        self._node = node
        # Versions of the records whose histories agreed with the backups, by uid.
        self._verified: dict[str, int] = {}

    # -- histories of containers that have a record ------------------------------------------------------------------

    async def compare(self, records: ContainerRecords, report_drift: ReportDrift) -> None:
        """Compare the history of each container with its revision backups, and write what either lacks.

        Raises StoreUnavailable, EngineUnavailable.
        """
        views = [view for view in records.of(self._node) if view.container.engine and not view.operation_id]
        self._verified = {
            view.container.uid: version
            for view in views
            if (version := self._verified.get(view.container.uid)) is not None
        }
        due = [view for view in views if self._verified.get(view.container.uid) != view.version]
        if not due:
            return
        try:
            sealed: defaultdict[str, set[int]] = defaultdict(set)
            for key in await self._snapshots.find():
                sealed[key.uid].add(key.revision)
            for view in due:
                await self._compare(view, sealed[view.container.uid], report_drift)
        except StoreUnavailable:
            raise
        except GpudockError as error:
            # Backups are for a lost store only, so the pass continues without them.
            log.warning("revision backup comparison failed; will retry", detail=error.message)

    async def _compare(self, view: ContainerView, sealed: Collection[int], report_drift: ReportDrift) -> None:
        container = view.container
        history = {view.revision.revision: view for view in await self._store.history(container.uid)}
        backups = {backup.number: backup for backup in await self._revision_backups.read(container.uid)}
        await self._write(container, history, backups)
        # Backups that are newer than the container's record are ignored: their revisions were never recorded, or only
        # before the store was restored.
        changes: dict[int, list[StoreChange]] = {}
        for number, backup in sorted(backups.items()):
            if number < container.revision and number not in history:
                changes[number] = [PutRevision(backup.revision)]
        for number in sorted({*history, *changes}):
            recorded = history[number].snapshot if number in history else None
            if recorded is None and (found := await self._snapshot(container.uid, number, backups.get(number), sealed)):
                changes.setdefault(number, []).append(PutSnapshot(container.uid, number, found))
        restored = await self._apply(view, changes)
        unknown = sorted(set(sealed) - set(history) - set(changes))
        if restored:
            report_drift(_restored_drift(container, restored))
        if unknown:
            report_drift(_unknown_files_drift(container, unknown))
        if not restored and not changes and not unknown:
            self._verified[container.uid] = view.version

    async def _write(
        self, container: Container, history: Mapping[int, RevisionView], backups: Mapping[int, RevisionBackup]
    ) -> None:
        for number, view in history.items():
            current, backup = backup_of_revision(container, view.revision, view.snapshot), backups.get(number)
            if number != container.revision:
                current = current.model_copy(update={"engine": backup.engine if backup else None})
            if backup is not None and view.snapshot is None:
                current = current.model_copy(update={"snapshot": backup.snapshot})
            if current != backup:
                await self._revision_backups.write(current)

    async def _snapshot(
        self, uid: str, number: int, backup: RevisionBackup | None, sealed: Collection[int]
    ) -> Snapshot | None:
        """The snapshot of a revision, if its files still exist."""
        if number in sealed:
            return await self._snapshots.sealed(SnapshotKey(uid=uid, revision=number))
        snapshot = backup.snapshot if backup else None
        if snapshot is None or snapshot.kind is not SnapshotKind.IMAGE:
            return None
        image = await self._engine.image(snapshot.reference)
        return snapshot if image is not None and image.id == snapshot.image_id else None

    async def _apply(self, view: ContainerView, changes: Mapping[int, Sequence[StoreChange]]) -> list[int]:
        """Write the changes of each revision, until the container's record changes; the revisions written."""
        version, written = view.version, []
        for number, revision_changes in changes.items():
            try:
                version = await self._store.apply([PutContainer(view.container, expect=version), *revision_changes])
            except StoreConflict:
                # An operation has changed the container; the next pass reads it again.
                break
            written.append(number)
        return written

    # -- containers of which only revision backups are left ----------------------------------------------------------

    async def adopt(
        self, records: ContainerRecords, engine_containers: Mapping[str, EngineContainer], report_drift: ReportDrift
    ) -> bool:
        """Adopt containers that have neither a record nor an engine container, as FAILED; whether any was adopted."""
        existing = {EngineContainerLabels.of(engine_container).uid for engine_container in engine_containers.values()}
        try:
            lost = [
                uid for uid in await self._revision_backups.uids() if uid not in records.uids and uid not in existing
            ]
            if not lost:
                return False
            history = await read_operation_history(self._store, lost)
            return any([await self._adopt(uid, records, history, report_drift) for uid in lost])
        except StoreUnavailable:
            raise
        except GpudockError as error:
            log.warning("revision backup scan failed; will retry", detail=error.message)
            return False

    async def _adopt(
        self, uid: str, records: ContainerRecords, history: OperationHistory, report_drift: ReportDrift
    ) -> bool:
        if history.is_known_gone(uid):
            # Retention removes what is left of it.
            return False
        backups = await self._revision_backups.read(uid)
        last = backups[-1] if backups else None
        if last is None or last.engine is None or last.revision.container in records.views:
            report_drift(_unknown_owner_drift(uid, last))
            return False
        if last.revision.container in records.unreadable_names:
            return False
        # An engine container that exists was created since, or is of another node: its labels decide, not the backup.
        if await self._engine.inspect(last.engine.engine_id) is not None or not await self._record(last):
            return False
        name = last.revision.container
        report_drift(
            Drift(
                kind=DriftKind.RECORD_LOST,
                remedy=DriftRemedy.REPAIRED,
                container=name,
                uid=uid,
                message=f"container {name} has no record and no engine container; its history is on the disk",
                plan="record restored as FAILED; roll back to a revision with a snapshot, or delete it",
            )
        )
        return True

    async def _record(self, last: RevisionBackup) -> bool:
        known = {view.revision.revision for view in await self._store.history(last.revision.uid)}
        changes: list[StoreChange] = [PutContainer(_failed_container(last, self._node), expect=0)]
        if last.number not in known:
            changes.append(PutRevision(last.revision))
        try:
            await self._store.apply(changes)
        except StoreConflict:
            return False
        return True


def _failed_container(last: RevisionBackup, node: str) -> Container:
    moment = now()
    return Container(
        name=last.revision.container,
        uid=last.revision.uid,
        node=node,
        owner=last.owner,
        generation=last.number + 1,
        revision=last.number,
        spec=last.revision.spec,
        status=ContainerStatus(
            state=ContainerState.FAILED, message="its engine container is gone; it was removed outside gpudock"
        ),
        engine=last.engine,
        create_time=last.create_time,
        update_time=moment,
    )


def _numbers(numbers: Sequence[int]) -> str:
    return f"revision{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _restored_drift(container: Container, numbers: Sequence[int]) -> Drift:
    return Drift(
        kind=DriftKind.REVISION_RECORD_LOST,
        remedy=DriftRemedy.REPAIRED,
        container=container.name,
        uid=container.uid,
        actual=_numbers(numbers),
        message=f"records of {_numbers(numbers)} of {container.name} were missing",
        plan="restored from the backups",
    )


def _unknown_files_drift(container: Container, numbers: Sequence[int]) -> Drift:
    return Drift(
        kind=DriftKind.SNAPSHOT_UNKNOWN,
        remedy=DriftRemedy.REPORTED,
        container=container.name,
        uid=container.uid,
        actual=_numbers(numbers),
        message=f"snapshots of {_numbers(numbers)} of {container.name} have no record",
        plan=f"no automatic repair: kept in the snapshot folder, below {container.uid}, until the container is deleted",
    )


def _unknown_owner_drift(uid: str, last: RevisionBackup | None) -> Drift:
    name = last.revision.container if last else ""
    reason = f"the name {name} is taken" if name else "its name is unknown"
    if last is not None and last.engine is None:
        reason = "its engine container is unknown"
    return Drift(
        kind=DriftKind.SNAPSHOT_UNKNOWN,
        remedy=DriftRemedy.REPORTED,
        container=name,
        uid=uid,
        message=f"container {name or uid} has files on the disk, but no record and no engine container: {reason}",
        plan=f"no automatic repair: remove the folder {uid} in the snapshot folder when it is no longer needed",
    )
