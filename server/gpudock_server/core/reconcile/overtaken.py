"""Ends operations that a store, restored to an earlier state, has as unfinished, although newer work exists."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

from gpudock_server.core.operations.driver import recorded_error
from gpudock_server.core.operations.engine import Operations
from gpudock_server.core.operations.journal import Journal
from gpudock_server.core.reconcile.adoption import ClaimConflict, OrphanReconciler
from gpudock_server.core.reconcile.drift import ReportDrift
from gpudock_server.core.reconcile.records import EngineContainerLabels, created_by_gpudock
from gpudock_server.errors import ContainerNotFound, GpudockError, OperationOvertaken, RecordUnreadable
from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy
from gpudock_server.model.engine import EngineContainer
from gpudock_server.model.operation import Operation, OperationKind, OperationState
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.store_changes import PutOperation
from gpudock_server.ports import ContainerView, Store, StoreConflict, Versioned


class OvertakenOperations:
    """The rules for overtaken operations; docs/reconcile.md describes them."""

    def __init__(self, store: Store, node: str, operations: Operations, orphans: OrphanReconciler) -> None:
        """`orphans` writes the record of the newer engine container."""
        self._store = store
        self._node = node
        self._operations = operations
        self._orphans = orphans

    async def end(self, engine_containers: Mapping[str, EngineContainer], report_drift: ReportDrift) -> frozenset[str]:
        """End operations that were finished or outdated before the store was restored to an earlier state.

        To drive one of them would stop and remove the running container. Returns the ids of operations that cannot be
        ended, and must not be resumed.
        """
        blocked: set[str] = set()
        for stored in await self._store.unfinished(self._node):
            operation = stored.value
            if operation.id in self._operations.driven or operation.target.kind is not ResourceKind.CONTAINER:
                continue
            try:
                view = await self._store.container(operation.target.name)
                if view is None or view.container.uid != operation.target.uid:
                    await self._end_without_target(operation.id, report_drift)
                elif not operation.committed and not await self._end_overtaken(
                    stored, view, engine_containers, report_drift
                ):
                    blocked.add(operation.id)
            except RecordUnreadable:
                blocked.add(operation.id)
        return frozenset(blocked)

    async def _end_without_target(self, operation_id: str, report_drift: ReportDrift) -> None:
        """End an operation whose container has no record. An engine container that it created is an orphan."""
        stored = await self._store.operation(operation_id)
        if stored is None or stored.value.state.ended:
            return
        operation = stored.value
        failed = operation.changed(error=recorded_error(ContainerNotFound(container=operation.target.name)))
        ended, changes = Journal.close_record(failed, OperationState.FAILED, ())
        try:
            await self._store.apply([*changes, PutOperation(ended, expect=stored.version)])
        except StoreConflict:
            return
        report_drift(
            _overtaken_drift(
                operation,
                f"the store has no record of {operation.target.name}",
                DriftRemedy.REPAIRED,
                "operation ended",
            )
        )

    async def _end_overtaken(
        self,
        stored: Versioned[Operation],
        view: ContainerView,
        engine_containers: Mapping[str, EngineContainer],
        report_drift: ReportDrift,
    ) -> bool:
        """End an operation if it was overtaken. False where it was, and cannot be ended."""
        operation, engine = stored.value, view.container.engine
        if engine is not None and engine.engine_id in engine_containers:
            return True
        candidates = [candidate async for candidate in self._newer(operation, view, engine_containers)]
        if not candidates:
            return True
        if len(candidates) > 1:
            names = ", ".join(candidate.name for candidate in candidates)
            report_drift(
                _overtaken_drift(
                    operation,
                    f"several newer engine containers: {names}",
                    DriftRemedy.REPORTED,
                    "no automatic repair: remove all but one of them",
                )
            )
            return False
        (newer,) = candidates
        labels = EngineContainerLabels.of(newer)
        made_by_operation = labels.operation_id == operation.id or operation.kind is OperationKind.CREATE
        try:
            ending = stored if made_by_operation else _with_overtaken_error(stored, labels)
            ended = await self._orphans.write_record(newer, view, ending)
        except ClaimConflict as conflict:
            plan = f"no automatic repair while {conflict}: stop or delete the holder"
            report_drift(_overtaken_drift(operation, str(conflict), DriftRemedy.REPORTED, plan))
            return False
        if ended:
            reason = f"engine container {newer.name} is newer than the one that it changes"
            plan = f"operation ended; record restored at revision {labels.revision}"
            report_drift(_overtaken_drift(operation, reason, DriftRemedy.REPAIRED, plan))
        return ended

    async def _newer(
        self, operation: Operation, view: ContainerView, engine_containers: Mapping[str, EngineContainer]
    ) -> AsyncIterator[EngineContainer]:
        """The engine containers of an operation's container that are newer than its record."""
        for candidate in created_by_gpudock(engine_containers):
            labels = EngineContainerLabels.of(candidate)
            if labels.uid != operation.target.uid or labels.revision <= view.container.revision:
                continue
            if candidate.spec is None:
                continue
            if labels.operation_id == operation.id:
                # A resumed create finds the engine container that it made. Of other operations, a start shows that the
                # files were transferred before.
                if operation.kind is not OperationKind.CREATE and candidate.start_time is not None:
                    yield candidate
            elif await self._store.operation(labels.operation_id) is None:
                yield candidate


def _with_overtaken_error(stored: Versioned[Operation], labels: EngineContainerLabels) -> Versioned[Operation]:
    error: GpudockError = OperationOvertaken(
        operation_id=stored.value.id, container=stored.value.target.name, revision=labels.revision
    )
    return Versioned(stored.value.changed(error=recorded_error(error)), stored.version)


def _overtaken_drift(operation: Operation, reason: str, remedy: DriftRemedy, plan: str) -> Drift:
    return Drift(
        kind=DriftKind.OPERATION_OVERTAKEN,
        remedy=remedy,
        container=operation.target.name,
        uid=operation.target.uid,
        operation_id=operation.id,
        message=f"operation {operation.id} on {operation.target.name} was overtaken: {reason}",
        plan=plan,
    )
