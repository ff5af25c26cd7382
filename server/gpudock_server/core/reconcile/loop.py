"""Runs reconcile: for one container at an event of the engine, and for everything in periodic full passes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import structlog

from gpudock_server.core.containers.commands import Start
from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.containers.history import History
from gpudock_server.core.containers.images import Images
from gpudock_server.core.operations.engine import Operations
from gpudock_server.core.operations.saga import OperationDraft
from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.core.reconcile.adoption import OrphanReconciler
from gpudock_server.core.reconcile.claims import ClaimReconciler
from gpudock_server.core.reconcile.containers import ContainerReconciler, DraftStop
from gpudock_server.core.reconcile.drift import DriftTracker, ReportDrift
from gpudock_server.core.reconcile.host_paths import release_unused_host_paths, repair_host_paths
from gpudock_server.core.reconcile.images import remove_unused_images
from gpudock_server.core.reconcile.locks import LockReconciler
from gpudock_server.core.reconcile.orphans import OrphanAction
from gpudock_server.core.reconcile.overtaken import OvertakenOperations
from gpudock_server.core.reconcile.records import ContainerRecords, read_container_records
from gpudock_server.core.reconcile.restarts import Restarts
from gpudock_server.core.reconcile.revision_backups import RevisionBackupReconciler
from gpudock_server.core.reconcile.volumes import VolumeReconciler
from gpudock_server.core.volumes.backends import VolumeBackends
from gpudock_server.core.volumes.engine_volumes import EngineVolumes
from gpudock_server.errors import EngineRejected, EngineUnavailable, GpudockError
from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy
from gpudock_server.model.engine import LABEL_NAME, LABEL_NODE, LABEL_UID, EngineContainer, NodeLimits
from gpudock_server.ports import ContainerView, Engine, HostPaths, RevisionBackupStore, SnapshotStore, Store

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_RECONNECT_SECONDS = 1.0


class Reconciler:
    """Follows the engine of this node, and repairs or reports drift."""

    def __init__(
        self,
        operations: Operations,
        drift: DriftTracker,
        *,
        store: Store,
        engine: Engine,
        snapshots: SnapshotStore,
        revision_backups: RevisionBackupStore,
        host_paths: HostPaths,
        engine_containers: EngineContainers,
        images: Images,
        history: History,
        claims: HostClaims,
        limits: NodeLimits,
        engine_volumes: EngineVolumes,
        backends: VolumeBackends,
        draft_start: Callable[[Start], Awaitable[OperationDraft]],
        draft_stop: DraftStop,
        interval: float,
        orphan_grace: float,
        start_retry_delays: tuple[float, float],
    ) -> None:
        """Drift is reported to `drift`. All times are in seconds.

        `interval`: between full passes. `orphan_grace`: see OrphanReconciler. `start_retry_delays`: from a failed start
        to the next try, the first and the longest.
        """
        self._store = store
        self._engine = engine
        self._host_paths = host_paths
        self._engine_containers = engine_containers
        self._images = images
        self._claims = claims
        self._operations = operations
        self._drift = drift
        self._interval = interval
        self._locks = LockReconciler(store, claims.node, operations)
        self._orphans = OrphanReconciler(
            operations,
            store=store,
            engine=engine,
            engine_containers=engine_containers,
            revision_backups=revision_backups,
            claims=claims,
            grace=orphan_grace,
        )
        self._overtaken = OvertakenOperations(store, claims.node, operations, self._orphans)
        first, longest = start_retry_delays
        self._restarts = Restarts(store, engine, operations, draft_start, first_delay=first, max_delay=longest)
        self._containers = ContainerReconciler(
            operations,
            self._restarts,
            store=store,
            engine=engine,
            history=history,
            claims=claims,
            limits=limits,
            draft_stop=draft_stop,
        )
        self._claim_rules = ClaimReconciler(store, engine, claims)
        self._volumes = VolumeReconciler(store, engine, engine_volumes, backends)
        self._revision_backups = RevisionBackupReconciler(store, engine, snapshots, revision_backups, claims.node)
        self._found_at_start: list[Drift] = []
        # One pass at a time: two passes would both repair the same drift.
        self._pass_lock = asyncio.Lock()
        # Views of containers with an operation, to be refreshed when that operation has ended.
        self._busy: asyncio.Queue[ContainerView] = asyncio.Queue()
        self._awaited: set[str] = set()
        # Whether the event stream of the engine has ended and no full pass has completed since.
        self._engine_was_away = False
        # Where the event stream begins. Full passes cover earlier events.
        self._since = time.time_ns()

    async def run(self) -> None:
        """Follow the engine's events until cancelled; run a full pass whenever events may have been missed."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow_events())
            tasks.create_task(self._run_passes())
            tasks.create_task(self._restarts.run(self._attempt_refresh))
            while True:
                tasks.create_task(self._refresh_after_operation(await self._busy.get()))

    def _refresh_later(self, view: ContainerView) -> None:
        """Refresh the container when its operation has ended, since events meanwhile are ignored."""
        if view.operation_id in self._operations.driven and view.operation_id not in self._awaited:
            self._awaited.add(view.operation_id)
            self._busy.put_nowait(view)

    async def _refresh_after_operation(self, view: ContainerView) -> None:
        await self._operations.wait_until_ended((view.operation_id,))
        self._awaited.discard(view.operation_id)
        await self._attempt_refresh(view.container.name, view.container.uid)

    async def _follow_events(self) -> None:
        while True:
            try:
                async for event in self._engine.events(self._since):
                    self._since = event.time_nanos + 1
                    await self._attempt_refresh(event.labels.get(LABEL_NAME, ""), event.labels.get(LABEL_UID, ""))
            except EngineUnavailable as error:
                log.warning("engine event stream ended", detail=error.message)
            self._engine_was_away = True
            # A restarted engine has lost its earlier events, so only a full pass finds what they would have reported.
            completed = False
            while not completed:
                await asyncio.sleep(_RECONNECT_SECONDS)
                completed = await self._attempt_pass()

    async def _run_passes(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._attempt_pass()

    async def _attempt_refresh(self, name: str, uid: str) -> None:
        try:
            view = await self._store.container(name)
            if view is not None and view.operation_id and view.operation_id not in self._operations.driven:
                # The operation may have ended since, and then no later event would refresh the container.
                view = await self._store.container(name)
            if view is not None and view.container.uid == uid:
                self._refresh_later(view)
                await self._containers.refresh(view, self._drift.report_drift, engine_was_away=self._engine_was_away)
        except GpudockError as error:
            log.warning("container refresh failed", container=name, detail=error.message)

    async def _attempt_pass(self) -> bool:
        try:
            await self.full_pass()
        except GpudockError as error:
            log.warning("reconcile pass aborted", detail=error.message)
            return False
        return True

    async def recover(self) -> tuple[str, ...]:
        """Resume the operations that the previous daemon suspended, except overtaken ones, and return their ids.

        Raises EngineUnavailable, StoreUnavailable.
        """
        async with self._pass_lock:
            return await self._resume(await self._find_engine_containers(), self._found_at_start.append)

    async def pass_after(self, operation_ids: Sequence[str]) -> None:
        """Run a full pass when these resumed operations have ended, for what the previous daemon left behind."""
        if operation_ids:
            await self._operations.wait_until_ended(operation_ids)
            await self._attempt_pass()

    async def full_pass(self) -> None:
        """Compare everything once, and repair or report the drift. Raises EngineUnavailable, StoreUnavailable."""
        async with self._pass_lock:
            with self._drift.full_pass() as report_drift:
                await self._pass(report_drift)
                self._engine_was_away = False
                # The drift found by `recover` is reported with that of the first pass.
                for drift in self._found_at_start:
                    report_drift(drift)
                self._found_at_start.clear()

    async def _pass(self, report_drift: ReportDrift) -> None:
        # The order matters: what was read before the records either has a record, or has lost it.
        engine_containers = await self._find_engine_containers()
        claims = await self._store.claims(self._claims.host)
        await self._resume(engine_containers, report_drift)
        # Before containers: a change of an adopted container needs the records of its volumes.
        await self._volumes.adopt(engine_containers, report_drift)
        records = await read_container_records(self._store)
        _report_unreadable(records, report_drift)
        orphans = await self._orphans.classify(engine_containers, records)
        # Before a container without its engine container becomes FAILED: its record may only be older than its orphan.
        if await self._orphans.adopt(orphans, records, OrphanAction.NEWER, report_drift):
            records = await read_container_records(self._store)
        for view in records.of(self._claims.node):
            await self._refresh_container(view, engine_containers, report_drift)
        records = await read_container_records(self._store)
        await self._claim_rules.release_stale(claims, records, orphans, report_drift)
        await self._claim_rules.restore_missing(records, report_drift)
        await self._orphans.adopt(orphans, records, OrphanAction.LOST, report_drift)
        # After containers with records, which have precedence over orphans.
        await self._claim_rules.claim_for_orphans(orphans, report_drift)
        await self._revision_backups.adopt(records, engine_containers, report_drift)
        await self._revision_backups.compare(await read_container_records(self._store), report_drift)
        await self._orphans.remove(orphans, report_drift)
        await remove_unused_images(self._store, self._engine, self._images)
        await release_unused_host_paths(self._store, self._engine, self._host_paths, self._claims.node)

    async def _find_engine_containers(self) -> dict[str, EngineContainer]:
        found = await self._engine.find({LABEL_NODE: self._claims.node})
        return {engine_container.id: engine_container for engine_container in found}

    async def _resume(
        self, engine_containers: dict[str, EngineContainer], report_drift: ReportDrift
    ) -> tuple[str, ...]:
        await self._locks.repair(report_drift)
        blocked = await self._overtaken.end(engine_containers, report_drift)
        return await self._operations.resume(blocked)

    async def _refresh_container(
        self, view: ContainerView, engine_containers: dict[str, EngineContainer], report_drift: ReportDrift
    ) -> None:
        engine = view.container.engine
        self._refresh_later(view)
        try:
            engine_container = engine_containers.get(engine.engine_id) if engine else None
            await self._containers.refresh(view, report_drift, engine_container, engine_was_away=self._engine_was_away)
            if engine_container is not None:
                await repair_host_paths(self._engine_containers, view, engine_container, report_drift)
        except EngineRejected as error:
            # The engine answers, so the pass continues with the next container.
            log.warning("container repair failed", container=view.container.name, detail=error.message)


def _report_unreadable(records: ContainerRecords, report_drift: ReportDrift) -> None:
    for unreadable in records.unreadable:
        report_drift(
            Drift(
                kind=DriftKind.RECORD_UNREADABLE,
                remedy=DriftRemedy.REPORTED,
                container=unreadable.name,
                key=unreadable.key,
                message=f"the record of {unreadable.name} is unreadable: {unreadable.detail}",
                plan="no automatic repair: restore the key from a backup, or delete it; its engine container is then"
                " adopted",
            )
        )
