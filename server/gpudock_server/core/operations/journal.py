"""Writes operation records to the store, and retries while the store does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence

import structlog

from gpudock_server.core.operations.active_operation import ActiveOperation
from gpudock_server.errors import GpuBusy, GpudockError, PortInUse, StoreFull, StoreUnavailable
from gpudock_server.model.claims import GpuKey, Holder, PortKey
from gpudock_server.model.operation import Operation, OperationState, RequestRecord
from gpudock_server.model.record import now
from gpudock_server.model.store_changes import Claim, ConfirmClaim, PutOperation, PutRequest, StoreChange, Unlock
from gpudock_server.ports import Store, StoreConflict

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# A record that changes this often under one transaction is being changed without end.
_MAX_CONFLICTS = 64
_BACKOFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)


class OperationSuspended(Exception):
    """The daemon is shutting down; the operation stays at a recorded step."""


class OwnershipLost(Exception):
    """Another process writes the record of this operation, or the target is gone."""


class Journal:
    """Writes the records of the operations that this process drives."""

    def __init__(self, store: Store, draining: asyncio.Event) -> None:
        """`draining` is set when the daemon shuts down: waits then raise OperationSuspended."""
        self._store = store
        self._draining = draining

    def raise_if_draining(self) -> None:
        """Raises OperationSuspended when the daemon shuts down."""
        if self._draining.is_set():
            raise OperationSuspended

    async def wait_before_retry(self, tries: int, error: GpudockError) -> None:
        """Wait before retry number `tries`. Raises OperationSuspended as soon as the daemon shuts down."""
        log.warning("retrying", reason=error.reason, detail=error.message)
        seconds = _BACKOFF_SECONDS[min(tries, len(_BACKOFF_SECONDS) - 1)]
        try:
            await asyncio.wait_for(self._draining.wait(), seconds)
        except TimeoutError:
            return
        raise OperationSuspended

    @staticmethod
    def close_record(
        operation: Operation, state: OperationState, changes: Sequence[StoreChange]
    ) -> tuple[Operation, Sequence[StoreChange]]:
        """The record of an ended operation, with the changes that release its locks and end its request id."""
        ended = operation.changed(state=state, end_time=now())
        more: list[StoreChange] = [*changes, *(Unlock(ref.kind, ref.name, operation.id) for ref in operation.locked)]
        if operation.request_id:
            record = RequestRecord(operation_id=operation.id, digest=operation.request_digest)
            more.append(PutRequest(operation.request_id, record, ended=True))
        return ended, more

    async def record(self, running: ActiveOperation, operation: Operation, changes: Sequence[StoreChange] = ()) -> None:
        """Write a record and `changes` in one transaction, and retry while the store does not answer.

        Raises OwnershipLost, OperationSuspended; StoreConflict where one of `changes` fails.
        """
        operation = operation.changed(update_time=now(), message="; ".join(running.messages) or operation.message)
        tries = 0
        while True:
            try:
                version = await self._store.apply([*changes, PutOperation(operation, expect=running.version)])
            except StoreUnavailable as error:
                # An outage ends, and callers have deadlines. A full store needs an operator, so callers get an error
                # and the operation continues when there is space.
                running.block(error if isinstance(error, StoreFull) else None)
                await self.wait_before_retry(tries, error)
                tries += 1
            except StoreConflict as conflict:
                if isinstance(conflict.change, PutOperation):
                    raise OwnershipLost from None
                raise
            else:
                running.record, running.version = operation, version
                running.blocked = None
                running.notify_watchers()
                return

    async def transact(
        self,
        running: ActiveOperation,
        changes: Callable[[object], Awaitable[tuple[Operation, Sequence[StoreChange]]]],
    ) -> None:
        """Write the record with `changes` of the current target; again from the new target after a conflict.

        Raises as `record`, and StoreUnavailable after too many conflicts.
        """
        replacements: list[tuple[StoreChange, StoreChange | None]] = []
        for _ in range(_MAX_CONFLICTS):
            view = await self._read_target(running)
            operation, requested = await changes(view)
            try:
                await self.record(running, operation, [*_with_replacements(requested, replacements)])
            except StoreConflict as conflict:
                match conflict.change:
                    case Unlock():
                        # An operator edited the store. The operation can end without its lock.
                        log.warning("lock changed outside gpudock", found=conflict.found)
                        replacements.append((conflict.change, None))
                    case ConfirmClaim():
                        log.warning("claim changed outside gpudock", found=conflict.found)
                        replacements.append((conflict.change, _claim_again(conflict.change, conflict.found)))
                    case _:
                        pass
            else:
                return
        detail = f"the record of {running.record.target.name} was changed {_MAX_CONFLICTS} times during one write"
        raise StoreUnavailable(detail=detail)

    async def _read_target(self, running: ActiveOperation) -> object:
        tries = 0
        while True:
            try:
                view = await running.saga.read_target(running)
            except StoreUnavailable as error:
                await self.wait_before_retry(tries, error)
                tries += 1
            else:
                if view is None:
                    raise OwnershipLost
                return view


def _with_replacements(
    changes: Sequence[StoreChange], replacements: Sequence[tuple[StoreChange, StoreChange | None]]
) -> Iterator[StoreChange]:
    for change in changes:
        final = next((new for old, new in replacements if old == change), change)
        if final is not None:
            yield final


def _claim_again(change: ConfirmClaim, found: object) -> Claim:
    """The change that restores a claim which the operation had and lost. Raises GpuBusy, PortInUse."""
    if not isinstance(found, Holder):
        return Claim(change.host, change.key, change.holder)
    match change.key:
        case GpuKey(uuid=gpu):
            raise GpuBusy(uuid=gpu, container=found.container)
        case PortKey(protocol=protocol, port=port):
            raise PortInUse(host_port=port, protocol=protocol.value, holder=found.container)
