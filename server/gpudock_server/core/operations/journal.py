"""Puts what an operation has reached into the store, and waits for a store that is away."""

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

# A head that loses this many races in a row is no race any more.
_MAX_CONFLICTS = 64
_BACKOFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)


class OperationSuspended(Exception):
    """The process is to stop; the operation stands at a recorded step."""


class OwnershipLost(Exception):
    """Another process writes this operation's record."""


class Journal:
    """Writes the records of the operations that are driven here."""

    def __init__(self, store: Store, draining: asyncio.Event) -> None:
        """Once `draining` is set, whoever would have to wait is parked instead."""
        self._store = store
        self._draining = draining

    def raise_if_draining(self) -> None:
        """Raises OperationSuspended when the process is to stop."""
        if self._draining.is_set():
            raise OperationSuspended

    async def wait_before_retry(self, tries: int, error: GpudockError) -> None:
        """Wait before the next try. Raises OperationSuspended as soon as the process is to stop."""
        log.warning("will try again", reason=error.reason, detail=error.message)
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
        """The record of an operation that has ended, and all that goes with its end: its lock, its request id."""
        ended = operation.changed(state=state, end_time=now())
        more: list[StoreChange] = [*changes, *(Unlock(one.kind, one.name, operation.id) for one in operation.locked)]
        if operation.request_id:
            record = RequestRecord(operation_id=operation.id, digest=operation.request_digest)
            more.append(PutRequest(operation.request_id, record, ended=True))
        return ended, more

    async def record(self, running: ActiveOperation, operation: Operation, changes: Sequence[StoreChange] = ()) -> None:
        """Put the record, and what belongs with it, in one transaction; wait for a store that is away."""
        operation = operation.changed(update_time=now(), message="; ".join(running.messages) or operation.message)
        tries = 0
        while True:
            try:
                version = await self._store.apply([*changes, PutOperation(operation, expect=running.version)])
            except StoreUnavailable as error:
                # A store that is away comes back, or its callers have a deadline. One that is full waits for an
                # operator: callers are told, and the operation goes on when there is room.
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
        """Record an operation together with changes made from its target as of now, again where that moved."""
        replacements: list[tuple[StoreChange, StoreChange | None]] = []
        for _ in range(_MAX_CONFLICTS):
            view = await self._read_target(running)
            operation, wanted = await changes(view)
            try:
                await self.record(running, operation, [*_with_replacements(wanted, replacements)])
            except StoreConflict as conflict:
                match conflict.change:
                    case Unlock():
                        # Someone edited the store by hand; say so, and do the rest.
                        log.warning("the lock is not as this operation left it", found=conflict.found)
                        replacements.append((conflict.change, None))
                    case ConfirmClaim():
                        log.warning("a claim is not as this operation left it", found=conflict.found)
                        replacements.append((conflict.change, _claim_again(conflict.change, conflict.found)))
                    case _:
                        pass
            else:
                return
        raise StoreUnavailable(detail=f"the record of {running.record.target.name} keeps changing")

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
    """A claim that was there when the operation began is gone: take it again, unless another has it by now."""
    if not isinstance(found, Holder):
        return Claim(change.host, change.key, change.holder)
    match change.key:
        case GpuKey(uuid=gpu):
            raise GpuBusy(uuid=gpu, container=found.container)
        case PortKey(protocol=protocol, port=port):
            raise PortInUse(host_port=port, protocol=protocol.value, holder=found.container)
