"""Keeps locks and operations in agreement. They disagree only after an operator edited or restored the store."""

from __future__ import annotations

from gpudock_server.core.listings import read_all_pages
from gpudock_server.core.operations.engine import Operations
from gpudock_server.core.reconcile.drift import ReportDrift
from gpudock_server.errors import RecordUnreadable
from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy
from gpudock_server.model.operation import Operation
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.store_changes import Lock, PutOperation, Unlock
from gpudock_server.ports import Store, StoreConflict, Versioned


class LockReconciler:
    """Releases locks whose operation has ended or does not exist, and restores locks of unfinished operations."""

    def __init__(self, store: Store, node: str, operations: Operations) -> None:
        self._store = store
        self._node = node
        self._operations = operations
        # This reads every operation, so it is done once: later, this daemon knows its own operations.
        self._lost_locks_checked = False

    async def repair(self, report_drift: ReportDrift) -> None:
        """Repair locks. Call this before a resume, which finds operations by their locks. Raises StoreUnavailable."""
        locks = await self._store.list_locks()
        for lock in locks:
            if lock.operation_id not in self._operations.driven:
                await self._check(lock, report_drift)
        if not self._lost_locks_checked:
            await self._restore_lost_locks(locks, report_drift)
            self._lost_locks_checked = True

    async def _check(self, lock: Lock, report_drift: ReportDrift) -> None:
        # The lock was read before this. Its operation was recorded with it, and is kept long after its end.
        try:
            operation = await self._store.operation(lock.operation_id)
        except RecordUnreadable as error:
            report_drift(
                Drift(
                    kind=DriftKind.RECORD_UNREADABLE,
                    remedy=DriftRemedy.REPORTED,
                    container=lock.name,
                    operation_id=lock.operation_id,
                    key=error.key,
                    message=f"operation {lock.operation_id}, which holds the lock of {lock.name}, is unreadable",
                    plan="no automatic repair: restore the key from a backup, or delete it; then the lock is released",
                )
            )
            return
        if (operation is not None and not operation.value.state.ended) or not await self._is_ours(lock):
            return
        # Bytes in the key that are no UTF-8 are shown as question marks.
        operation_id = lock.operation_id.encode(errors="replace").decode()
        try:
            await self._store.apply([Unlock(lock.kind, lock.name, lock.operation_id)])
        except StoreConflict:
            return
        report_drift(
            Drift(
                kind=DriftKind.LOCK_STALE,
                remedy=DriftRemedy.REPAIRED,
                container=lock.name,
                operation_id=operation_id,
                message=f"stale lock of {lock.name}: operation {operation_id} "
                + ("has ended" if operation else "does not exist"),
                plan="lock released",
            )
        )

    async def _is_ours(self, lock: Lock) -> bool:
        """Whether the locked resource is of this node, or does not exist; true for every volume."""
        if lock.kind is not ResourceKind.CONTAINER:
            return True
        try:
            view = await self._store.container(lock.name)
        except RecordUnreadable:
            return False
        return view is None or view.container.node == self._node

    async def _restore_lost_locks(self, locks: tuple[Lock, ...], report_drift: ReportDrift) -> None:
        held = {(lock.kind, lock.name) for lock in locks if lock.operation_id}
        for operation in (await read_all_pages(self._store.operations)).items:
            ours = operation.node == self._node and not operation.state.ended
            if ours and operation.id not in self._operations.driven:
                await self._restore_locks_of(operation, held, {lock.operation_id for lock in locks}, report_drift)

    async def _restore_locks_of(
        self, listed: Operation, held: set[tuple[ResourceKind, str]], holders: set[str], report_drift: ReportDrift
    ) -> None:
        current = await self._store.operation(listed.id)
        if listed.id in holders or current is None or current.value.state.ended:
            return
        conflict = next((ref.name for ref in listed.locked if (ref.kind, ref.name) in held), "")
        if not conflict and await self._restore_locks(current):
            remedy, plan = DriftRemedy.REPAIRED, "locks restored; the operation continues"
        else:
            locked = f"{conflict} is" if conflict else "one of its resources is"
            remedy = DriftRemedy.REPORTED
            plan = f"no automatic repair: {locked} locked by another operation"
        report_drift(
            Drift(
                kind=DriftKind.LOCK_MISSING,
                remedy=remedy,
                container=listed.target.name,
                uid=listed.target.uid,
                operation_id=listed.id,
                message=f"unfinished operation {listed.id} on {listed.target.name} has lost its locks",
                plan=plan,
            )
        )

    async def _restore_locks(self, stored: Versioned[Operation]) -> bool:
        operation = stored.value
        locks = [Lock(ref.kind, ref.name, operation.id) for ref in operation.locked]
        try:
            await self._store.apply([PutOperation(operation, expect=stored.version), *locks])
        except StoreConflict:
            return False
        return True
