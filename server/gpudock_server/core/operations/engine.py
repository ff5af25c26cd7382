"""Begins operations, drives their sagas, and lets callers watch and cancel them.

The rules, each covered by a test:

- An operation is recorded with its locks and claims before its first step runs and before a caller gets its id.
- Steps run one at a time; the result of a step is recorded before the next step begins.
- Operations run in tasks of `Operations`, never in a caller's task: disconnecting only stops watching.
- Before the commit, a failure or a cancel undoes the steps in reverse order. After the commit, steps only go forward.
- A step begins only when everything before it is recorded: while the store does not answer, operations wait.
- At a shutdown, an unfinished operation is suspended at a recorded step; the next daemon resumes it there.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import structlog

from gpudock_server.core.operations.active_operation import ActiveOperation, OperationView
from gpudock_server.core.operations.driver import Driver
from gpudock_server.core.operations.journal import Journal, OperationSuspended
from gpudock_server.core.operations.resource import Resource
from gpudock_server.core.operations.saga import COMMIT_STAGE, OperationDraft, Saga, SagaBuilder
from gpudock_server.errors import (
    GpudockError,
    OperationFailed,
    OperationNotCancellable,
    OperationNotFound,
    OperationResultGone,
    OperationWaitsForSpace,
    Recovering,
    RequestIdReused,
    ShuttingDown,
    StoreFull,
    StoreUnavailable,
)
from gpudock_server.model.operation import (
    Operation,
    OperationKind,
    OperationState,
    RequestRecord,
    Result,
    Stage,
    new_operation_id,
)
from gpudock_server.model.record import now
from gpudock_server.model.store_changes import (
    Claim,
    Lock,
    PutOperation,
    PutRequest,
    RequireUnlocked,
    StoreChange,
)
from gpudock_server.ports import Page, Store, StoreConflict

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# How often an operation is drafted again because another call took a resource that the draft had picked. Each time
# that other call succeeded, so this bounds unfairness and not progress.
_CONTENTION_TRIES = 64
# How long a cancelled task may take to end before it is cancelled again.
_CANCEL_GRACE_SECONDS = 0.5
# Interval of polls for an operation that is still to be resumed.
_RESUME_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class RequestKey:
    """A caller's `request_id` and a digest of everything else in the request."""

    id: str
    digest: str


class Operations:
    """Begins, drives, shows and cancels operations of one node."""

    def __init__(
        self,
        store: Store,
        node: str,
        resources: Sequence[Resource[Any]],
        sagas: Mapping[OperationKind, SagaBuilder],
        *,
        recovering: bool = False,
    ) -> None:
        """`sagas` has the function that builds the saga of a recorded operation, by kind of operation.

        `recovering`: new operations are refused until `allow_new_operations`, because claims and records may not agree
        with the engine yet.
        """
        self._store = store
        self._node = node
        self._resources = {resource.kind: resource for resource in resources}
        self._sagas = sagas
        self._running: dict[str, ActiveOperation] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._draining = asyncio.Event()
        self._driver = Driver(Journal(store, self._draining))
        # Calls that lost a race retry one at a time, so that they race only other processes. The first try takes no
        # lock: a draft that waits for a slow engine must not block all other calls.
        self._retry_lock = asyncio.Lock()
        # Ids of operations that may be in the store already and have no task yet.
        self._beginning_ids: set[str] = set()
        self._recovering = recovering
        self._store_full: StoreFull | None = None
        # Set, and replaced, when an operation starts or resumes, when new operations are allowed, and at a drain.
        self._state_changed = asyncio.Event()

    def allow_new_operations(self) -> None:
        """End the recovery: new operations may begin."""
        self._recovering = False
        self._notify_state_change()

    def _notify_state_change(self) -> None:
        self._state_changed.set()
        self._state_changed = asyncio.Event()

    def set_recovery_blocked(self, error: StoreFull | None) -> None:
        """Record that the recovery waits for space in the store, for an unknown time; None: no longer."""
        self._store_full = error

    def _recovery_error(self) -> GpudockError:
        return StoreFull(self._store_full.detail) if self._store_full is not None else Recovering()

    # -- beginning ---------------------------------------------------------------------------------------------------

    async def begin(
        self,
        draft: Callable[[], Awaitable[OperationDraft]],
        request: RequestKey | None,
        *,
        during_recovery: bool = False,
    ) -> str:
        """Record the operation of a draft, start it, and return its id.

        `draft` is called again when another call took a resource that the draft had picked. A `request` that was used
        before begins nothing and returns the id of its operation. Raises the errors of `draft`, RequestIdReused, the
        resource's errors for a name that is taken or locked, StoreUnavailable, ShuttingDown; and Recovering, or
        StoreFull where the recovery waits for space, unless `during_recovery`: the operation is a child of a resumed
        operation, or a repair of the first full pass.
        """
        for attempt in range(_CONTENTION_TRIES):
            async with self._retry_lock if attempt else nullcontext():
                if self._draining.is_set():
                    raise ShuttingDown
                if (first := await self._find_request(request)) is not None:
                    return first
                if self._recovering and not during_recovery:
                    raise self._recovery_error()
                try:
                    drafted = await draft()
                    try:
                        return await self._begin(drafted, request)
                    except StoreConflict as conflict:
                        self._raise_conflict_error(drafted, conflict)
                except GpudockError:
                    # The same request, sent twice at once, may have failed only because the other call succeeded.
                    if (first := await self._find_request(request)) is not None:
                        return first
                    raise
        raise StoreUnavailable(detail=f"lost {_CONTENTION_TRIES} races against other calls")

    async def _find_request(self, request: RequestKey | None) -> str | None:
        record = await self._store.request(request.id) if request is not None else None
        if request is None or record is None:
            return None
        if record.digest != request.digest:
            raise RequestIdReused(request_id=request.id)
        return record.operation_id

    async def _begin(self, draft: OperationDraft, request: RequestKey | None) -> str:
        moment = now()
        operation = Operation(
            id=new_operation_id(),
            kind=draft.kind,
            target=draft.target,
            locks=tuple(draft.locks),
            node=self._node,
            state=OperationState.RUNNING,
            arguments=draft.arguments,
            plan=draft.plan,
            request_id=request.id if request else "",
            request_digest=request.digest if request else "",
            create_time=moment,
            update_time=moment,
        )
        saga = draft.build(operation)
        operation = operation.changed(stages=stages_of(saga))
        changes: list[StoreChange] = []
        if request is not None:
            changes.append(PutRequest(request.id, RequestRecord(operation_id=operation.id, digest=request.digest)))
        changes += [
            draft.target_record,
            *(Lock(ref.kind, ref.name, operation.id) for ref in operation.locked),
            *draft.conditions,
            *(
                Claim(claim.host, claim.key, claim.holder.model_copy(update={"operation_id": operation.id}))
                for claim in draft.claims
            ),
            PutOperation(operation, expect=0),
        ]
        self._beginning_ids.add(operation.id)
        try:
            version = await self._store.apply(changes)
            self._launch(ActiveOperation(operation, version, saga, self._run_child))
        finally:
            self._beginning_ids.discard(operation.id)
        return operation.id

    async def _run_child(self, parent: Operation, name: str, draft: Callable[[], Awaitable[OperationDraft]]) -> None:
        """See `OperationRun.run_child`. The child is found again by a request id that its parent's id determines."""
        child_path = f"{parent.id}/{name}"
        try:
            key = RequestKey(str(uuid.uuid5(uuid.NAMESPACE_OID, child_path)), child_path)
            child_id = await self.begin(draft, key, during_recovery=True)
        except ShuttingDown:
            raise OperationSuspended from None
        while not (snapshot := await self.get(child_id)).operation.state.ended:
            if (running := self._running.get(child_id)) is not None:
                changed = running.changed
                self._running[parent.id].block(running.blocked)
                await self._wait_for_change(child_id, changed)
            else:
                # After a restart the parent may be resumed before its child is.
                await asyncio.sleep(_RESUME_POLL_SECONDS)
            if self._draining.is_set() and child_id not in self._tasks:
                raise OperationSuspended
        self._running[parent.id].block(None)
        raise_operation_error(snapshot.operation)

    def _raise_conflict_error(self, draft: OperationDraft, conflict: StoreConflict) -> None:
        """Raise the error for a locked or existing name; return where the draft is only out of date."""
        match conflict.change:
            case Lock(kind=kind, name=name) | RequireUnlocked(kind=kind, name=name):
                raise self._resources[kind].busy_error(name, str(conflict.found)) from None
            case change if change == draft.target_record and draft.creates_target:
                raise self._resources[draft.target.kind].exists_error(draft.target.name) from None
            case _:
                return

    # -- watching ----------------------------------------------------------------------------------------------------

    async def get(self, operation_id: str) -> OperationView:
        """An operation and its progress as of now. Raises OperationNotFound, StoreUnavailable."""
        if (running := self._running.get(operation_id)) is not None:
            return running.view
        stored = await self._store.operation(operation_id)
        if stored is None:
            raise OperationNotFound(operation_id=operation_id)
        return OperationView(stored.value)

    async def list(self, *, page_size: int, page_token: str) -> Page[Operation]:
        """A page of the recorded operations of every node."""
        return await self._store.operations(page_size=page_size, page_token=page_token)

    async def watch(self, operation_id: str) -> AsyncGenerator[OperationView, None]:
        """Stream views of an operation until it has ended; the last view is that of the ended operation.

        A slow reader gets the latest view and misses those in between. Raises OperationNotFound, StoreUnavailable;
        ShuttingDown when this daemon stops first: the next daemon resumes the operation; OperationWaitsForSpace when
        the store is full: the operation continues when there is space.
        """
        while True:
            while (running := self._running.get(operation_id)) is not None:
                changed = running.changed
                snapshot = running.view
                yield snapshot
                if snapshot.operation.state.ended:
                    return
                if running.blocked is not None:
                    raise OperationWaitsForSpace(running.blocked.detail, operation_id)
                await self._wait_for_change(operation_id, changed)
            recovering = self._recovering
            snapshot = await self.get(operation_id)
            yield snapshot
            if snapshot.operation.state.ended or snapshot.operation.node != self._node:
                return
            if self._draining.is_set():
                raise ShuttingDown
            if not recovering:
                raise RuntimeError(
                    f"operation {operation_id} was stopped by an internal error; the daemon's log has it"
                )
            await self._wait_until_resumed(operation_id)

    async def _wait_until_resumed(self, operation_id: str) -> None:
        """Wait until an operation is resumed, the recovery ends, or this daemon stops."""
        while self._recovering and operation_id not in self._running and not self._draining.is_set():
            await self._state_changed.wait()

    async def _wait_for_change(self, operation_id: str, changed: asyncio.Event) -> None:
        task = self._tasks.get(operation_id)
        if task is None:
            return
        waiter = asyncio.ensure_future(changed.wait())
        try:
            await asyncio.wait((task, waiter), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()

    async def result(self, operation_id: str) -> Result:
        """Wait for the end of an operation and return its result. Raises as `watch` and `result_of`."""
        return await self.result_of(await self._wait_for_end(operation_id))

    async def done(self, operation_id: str) -> None:
        """Wait for the end of an operation. Raises the error that it ended with, and as `watch`."""
        raise_operation_error(await self._wait_for_end(operation_id))

    async def _wait_for_end(self, operation_id: str) -> Operation:
        final: OperationView | None = None
        async for snapshot in self.watch(operation_id):
            final = snapshot
        if final is None:
            raise OperationNotFound(operation_id=operation_id)
        return final.operation

    async def result_of(self, operation: Operation) -> Result:
        """The result of an ended operation. Raises the error that it ended with, OperationResultGone.

        Where a result is no longer kept for lack of space, the resource as of now is returned (AIP-155).
        """
        raise_operation_error(operation)
        if operation.result is not None:
            return operation.result
        resource = self._resources[operation.target.kind]
        view = await resource.view_of(operation.target)
        if operation.kind is OperationKind.COMMIT or view is None:
            raise OperationResultGone(operation_id=operation.id)
        return resource.record(view)

    # -- cancelling --------------------------------------------------------------------------------------------------

    async def cancel(self, operation_id: str) -> OperationView:
        """Cancel an operation. Returns once the cancel is recorded; the undo may take longer.

        Raises OperationNotFound, OperationNotCancellable, WrongNode, Recovering, OperationWaitsForSpace, StoreFull.
        """
        running = self._running.get(operation_id)
        if running is None:
            snapshot = await self.get(operation_id)
            if snapshot.operation.cancel_requested:
                return snapshot
            await self._require_own_node(snapshot.operation)
            if self._recovering and not snapshot.operation.state.ended:
                raise self._recovery_error()
            raise OperationNotCancellable(operation_id=operation_id, state=snapshot.operation.state.value)
        if not running.saga.cancellable:
            raise OperationNotCancellable(operation_id=operation_id, state=running.record.state.value)
        while not running.record.committed and running.record.state is OperationState.RUNNING:
            changed = running.changed
            running.cancel_requested = True
            if running.step_task is not None:
                running.step_task.cancel()
            await self._wait_for_change(operation_id, changed)
            if operation_id not in self._tasks and not running.record.state.ended:
                raise ShuttingDown
            if running.blocked is not None:
                # The request stays in memory and is honoured before the next step.
                raise OperationWaitsForSpace(running.blocked.detail, operation_id)
        if not running.record.cancel_requested:
            raise OperationNotCancellable(operation_id=operation_id, state=running.record.state.value)
        return running.view

    async def _require_own_node(self, operation: Operation) -> None:
        if operation.node == self._node or operation.state.ended:
            return
        nodes = await self._store.nodes()
        address = next((node.address for node in nodes if node.node == operation.node), "")
        raise self.wrong_node_error(operation, address)

    def wrong_node_error(self, operation: Operation, address: str = "") -> GpudockError:
        """The error for an operation that another node drives."""
        target = operation.target
        return self._resources[target.kind].wrong_node_error(target.name, operation.node, address)

    def preview(self, draft: OperationDraft) -> Operation:
        """The operation that a draft would begin, in state PLANNED and without an id. Changes nothing."""
        moment = now()
        operation = Operation(
            id="",
            kind=draft.kind,
            target=draft.target.model_copy(update={"uid": ""}) if draft.creates_target else draft.target,
            node=self._node,
            state=OperationState.PLANNED,
            arguments=draft.arguments,
            plan=draft.plan,
            create_time=moment,
            update_time=moment,
        )
        return operation.changed(stages=stages_of(draft.build(operation)))

    # -- resume and shutdown -----------------------------------------------------------------------------------------

    async def resume(self, excluded: Collection[str] = ()) -> tuple[str, ...]:
        """Resume the unfinished operations of this node that no task drives, and return their ids.

        `excluded` are ids of operations that must not be resumed.
        """
        resumed: list[str] = []
        for stored in await self._store.unfinished(self._node):
            operation_id = stored.value.id
            # Read again: the operation may have ended since the list was read.
            current = await self._store.operation(operation_id)
            if current is None or current.value.state.ended or self._draining.is_set():
                continue
            if operation_id in self.driven or operation_id in excluded:
                continue
            log.info("operation resumed", operation_id=operation_id, kind=current.value.kind.value)
            saga = self._sagas[current.value.kind](current.value)
            self._launch(ActiveOperation(current.value, current.version, saga, self._run_child))
            resumed.append(operation_id)
        return tuple(resumed)

    async def wait_until_ended(self, operation_ids: Sequence[str]) -> None:
        """Wait until each of these operations has ended or is no longer driven."""
        tasks = [self._tasks[operation_id] for operation_id in operation_ids if operation_id in self._tasks]
        if tasks:
            await asyncio.wait(tasks)

    async def wait_until_ended_or_interruptible(self, operation_ids: Sequence[str]) -> None:
        """Wait until each of these operations has ended, is no longer driven, or is in an interruptible step."""
        while tasks := [
            self._tasks[operation_id]
            for operation_id in operation_ids
            if operation_id in self._tasks and not self._running[operation_id].in_interruptible_step
        ]:
            await asyncio.wait(tasks, timeout=_RESUME_POLL_SECONDS)

    @property
    def active(self) -> frozenset[str]:
        """Ids of the operations that a task of this process drives."""
        return frozenset(self._tasks)

    @property
    def driven(self) -> frozenset[str]:
        """Ids of the operations that a task drives, or that are being recorded for the first time."""
        return frozenset((*self._tasks, *self._beginning_ids))

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new operations, and suspend the others at their next recorded step, within `grace_seconds`.

        Interruptible steps are cancelled at once, all others after `grace_seconds`.
        """
        self._draining.set()
        self._notify_state_change()
        for running in self._running.values():
            running.cancel_interruptible_step()
        tasks = list(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_seconds)
            for task in late:
                task.cancel()
            if late:
                # A task that waits for a call of the engine to end needs a second cancel to abandon that call.
                _, waiting = await asyncio.wait(late, timeout=_CANCEL_GRACE_SECONDS)
                for task in waiting:
                    task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _launch(self, running: ActiveOperation) -> None:
        operation_id = running.record.id
        self._running[operation_id] = running
        task = asyncio.create_task(self._driver.run(running), name=f"operation {operation_id}")
        self._tasks[operation_id] = task
        task.add_done_callback(lambda _: self._forget(operation_id))
        self._notify_state_change()

    def _forget(self, operation_id: str) -> None:
        self._tasks.pop(operation_id, None)
        self._running.pop(operation_id, None)


def stages_of(saga: Saga[Any]) -> tuple[Stage, ...]:
    """The stages of an operation: the steps, the commit, and the cleanup steps."""
    names = [*(step.name for step in saga.steps), COMMIT_STAGE, *(step.name for step in saga.cleanup_steps)]
    return tuple(Stage(name=name) for name in names)


def raise_operation_error(operation: Operation) -> None:
    """Raises the error that an ended operation ended with, if any."""
    if operation.error is not None:
        raise OperationFailed(
            recorded_code=operation.error.code,
            recorded_reason=operation.error.reason,
            recorded_message=operation.error.message,
            recorded_metadata=operation.error.metadata,
        )
