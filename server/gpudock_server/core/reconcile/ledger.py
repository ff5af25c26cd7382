"""The ledger against the store: what is new is written to it, and what the store lost is written again from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import structlog

from gpudock_server.core.containers.ledger import ledger_entry
from gpudock_server.core.containers.operation_history import OperationHistory, read_operation_history
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


class LedgerReconciler:
    """The rules for histories, and for containers of which nothing but their history is left."""

    def __init__(
        self, store: Store, engine: Engine, snapshots: SnapshotStore, ledger: RevisionBackupStore, node: str
    ) -> None:
        self._store = store
        self._engine = engine
        self._snapshots = snapshots
        self._ledger = ledger
        self._node = node
        # The version of each head with which all of this was found in order, by uid.
        self._verified: dict[str, int] = {}

    # -- histories of containers that have a record ------------------------------------------------------------------

    async def compare(self, records: ContainerRecords, report_drift: ReportDrift) -> None:
        """Bring each history to the disk, and back from it. Raises StoreUnavailable, EngineUnavailable."""
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
            # The copy is for a day that may never come: nothing else waits for it.
            log.warning("histories and the ledger were not compared", detail=error.message)

    async def _compare(self, view: ContainerView, sealed: Collection[int], report_drift: ReportDrift) -> None:
        container = view.container
        history = {one.revision.revision: one for one in await self._store.history(container.uid)}
        entries = {one.number: one for one in await self._ledger.read(container.uid)}
        await self._write(container, history, entries)
        # What is newer than the head was never recorded, or was by a store that has been put back.
        missing = [one for number, one in sorted(entries.items()) if number < container.revision]
        changes: dict[int, list[StoreChange]] = {}
        for entry in missing:
            if entry.number not in history:
                changes[entry.number] = [PutRevision(entry.revision)]
        for number in sorted({*history, *changes}):
            known = history[number].snapshot if number in history else None
            if known is None and (found := await self._snapshot(container.uid, number, entries.get(number), sealed)):
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
        self, container: Container, history: Mapping[int, RevisionView], entries: Mapping[int, RevisionBackup]
    ) -> None:
        for number, one in history.items():
            wanted, kept = ledger_entry(container, one.revision, one.snapshot), entries.get(number)
            if number != container.revision:
                wanted = wanted.model_copy(update={"engine": kept.engine if kept else None})
            if kept is not None and one.snapshot is None:
                wanted = wanted.model_copy(update={"snapshot": kept.snapshot})
            if wanted != kept:
                await self._ledger.write(wanted)

    async def _snapshot(
        self, uid: str, number: int, entry: RevisionBackup | None, sealed: Collection[int]
    ) -> Snapshot | None:
        """What is still there of a revision's files."""
        if number in sealed:
            return await self._snapshots.sealed(SnapshotKey(uid=uid, revision=number))
        kept = entry.snapshot if entry else None
        if kept is None or kept.kind is not SnapshotKind.IMAGE:
            return None
        image = await self._engine.image(kept.reference)
        return kept if image is not None and image.id == kept.image_id else None

    async def _apply(self, view: ContainerView, changes: Mapping[int, Sequence[StoreChange]]) -> list[int]:
        """One revision at a time, each only while nothing has been done to the container; which were written."""
        version, done = view.version, []
        for number, each in changes.items():
            try:
                version = await self._store.apply([PutContainer(view.container, expect=version), *each])
            except StoreConflict:
                # Something is at work on it; the next pass finds it as it is then.
                break
            done.append(number)
        return done

    # -- containers of which only the ledger is left -----------------------------------------------------------------

    async def adopt(
        self, records: ContainerRecords, seen: Mapping[str, EngineContainer], report_drift: ReportDrift
    ) -> bool:
        """Write the records of containers that have neither a record nor an engine container; whether any was."""
        as_engine_policy = {EngineContainerLabels.of(one).uid for one in seen.values()}
        try:
            lost = [uid for uid in await self._ledger.uids() if uid not in records.uids and uid not in as_engine_policy]
            if not lost:
                return False
            history = await read_operation_history(self._store, lost)
            return any([await self._adopt(uid, records, history, report_drift) for uid in lost])
        except StoreUnavailable:
            raise
        except GpudockError as error:
            log.warning("the ledger was not looked through", detail=error.message)
            return False

    async def _adopt(
        self, uid: str, records: ContainerRecords, history: OperationHistory, report_drift: ReportDrift
    ) -> bool:
        if history.is_known_gone(uid):
            # What is left of it is removed by the retention.
            return False
        entries = await self._ledger.read(uid)
        last = entries[-1] if entries else None
        if last is None or last.engine is None or last.revision.container in records.views:
            report_drift(_unknown_owner_drift(uid, last))
            return False
        if last.revision.container in records.unreadable_names:
            return False
        # One that is in the engine after all was made again, or is of another node: what it says of itself counts.
        if await self._engine.inspect(last.engine.engine_id) is not None or not await self._record(last):
            return False
        name = last.revision.container
        report_drift(
            Drift(
                kind=DriftKind.RECORD_LOST,
                remedy=DriftRemedy.REPAIRED,
                container=name,
                uid=uid,
                message=f"container {name} has neither a record nor an engine container; its history is on the disk",
                plan="it has its record again and is FAILED: roll it back to a revision that has files, or delete it",
            )
        )
        return True

    async def _record(self, last: RevisionBackup) -> bool:
        known = {one.revision.revision for one in await self._store.history(last.revision.uid)}
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
        message=f"the store had lost what it knew of {_numbers(numbers)} of {container.name}",
        plan="it was written again from the disk",
    )


def _unknown_files_drift(container: Container, numbers: Sequence[int]) -> Drift:
    return Drift(
        kind=DriftKind.SNAPSHOT_UNKNOWN,
        remedy=DriftRemedy.REPORTED,
        container=container.name,
        uid=container.uid,
        actual=_numbers(numbers),
        message=f"the files of {_numbers(numbers)} of {container.name} are kept, and no record says what it was",
        plan=f"nothing is removed: they are in the snapshot folder, below {container.uid}; they go with the container",
    )


def _unknown_owner_drift(uid: str, last: RevisionBackup | None) -> Drift:
    name = last.revision.container if last else ""
    why = f"another container is called {name}" if name else "nothing says what it was called"
    if last is not None and last.engine is None:
        why = "nothing says what engine container it had"
    return Drift(
        kind=DriftKind.SNAPSHOT_UNKNOWN,
        remedy=DriftRemedy.REPORTED,
        container=name,
        uid=uid,
        message=f"files of container {name or uid} are kept, which has no record and no engine container: {why}",
        plan=f"nothing is removed: they are in the snapshot folder, below {uid}; remove that when it is of no use",
    )
