"""The engine room of every mutation: begins operations, drives their sagas, lets callers watch and cancel.

The rules, each of which a test breaks a naive version with:

- An operation is durable, with its lock and its claims, before the first step; nobody is told of it earlier.
- One step at a time; what a step made is recorded before the next one begins.
- Work belongs to this class's tasks and never to a caller's: hanging up only stops watching.
- Before the point of no return a failure or a cancel undoes the steps in reverse; past it, only forward.
- What cannot be recorded is not acted on: while the store is away, operations wait.
- An operation that this process cannot bring to its end (it is told to stop) is left at a recorded step, and whoever
  starts next goes on from there.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

import structlog

from gpudock_server.core.saga import COMMIT_STAGE, Run, Saga, Step
from gpudock_server.errors import (
    Code,
    ContainerBusy,
    ContainerExists,
    EngineUnavailable,
    GpuBusy,
    GpudockError,
    OperationCancelled,
    OperationNotCancellable,
    OperationNotFound,
    PortInUse,
    Recorded,
    RequestIdReused,
    ShuttingDown,
    StoreUnavailable,
)
from gpudock_server.model.changes import (
    Change,
    Claim,
    Keep,
    LockContainer,
    PutContainer,
    PutOperation,
    PutRequest,
    UnlockContainer,
)
from gpudock_server.model.claims import GpuKey, Holder, PortKey
from gpudock_server.model.container import Container
from gpudock_server.model.operation import (
    Operation,
    OperationKind,
    OperationPlan,
    OperationState,
    RecordedError,
    RequestRecord,
    Stage,
    StageState,
)
from gpudock_server.model.record import JsonObject, now
from gpudock_server.ports import ContainerView, Page, Store, StoreConflict

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# How often a draft is made anew because another caller took what it had picked. Every loss means that someone else
# won, so this bounds unfairness and not progress.
_CONTENTION_TRIES = 64
_BACKOFF_SECONDS = (0.1, 0.2, 0.5, 1.0, 2.0)
# How often an undo whose engine call is refused (not unanswered) is tried before it is noted and left.
_REFUSED_UNDO_TRIES = 3


@dataclass(frozen=True, slots=True)
class RequestKey:
    """A caller's `request_id` and a digest of everything else in the request."""

    id: str
    digest: str


@dataclass(frozen=True, slots=True)
class Draft:
    """An operation that could begin: what its first transaction changes beside the operation itself."""

    kind: OperationKind
    container: Container
    expect: int
    arguments: JsonObject
    plan: OperationPlan
    # May know what is not recorded (a registry's password) and what a later process goes without.
    build: Callable[[Operation], Saga]
    claims: Sequence[Claim] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An operation as a watcher sees it, with the progress of its current stage."""

    operation: Operation
    current_bytes: int = 0
    total_bytes: int = 0


@dataclass(eq=False)
class _Running(Run):
    """An operation in this process. Only its own task writes its record."""

    record: Operation
    version: int
    saga: Saga
    current_bytes: int = 0
    total_bytes: int = 0
    notes: list[str] = field(default_factory=list)
    cancel_requested: bool = False
    step_task: asyncio.Task[JsonObject | None] | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def operation(self) -> Operation:
        return self.record

    def progress(self, current_bytes: int, total_bytes: int) -> None:
        self.current_bytes, self.total_bytes = current_bytes, total_bytes
        self.tell()

    def note(self, message: str) -> None:
        self.notes.append(message)

    @property
    def snapshot(self) -> Snapshot:
        return Snapshot(self.record, self.current_bytes, self.total_bytes)

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change; take it before looking."""
        return self._changed

    def tell(self) -> None:
        """Wake every watcher. Each looks at what is then current: what a slow one missed costs nothing."""
        self._changed.set()
        self._changed = asyncio.Event()


class _Parked(Exception):
    """The process is to stop; the operation stands at a recorded step."""


class _Lost(Exception):
    """Another process writes this operation's record."""


class Operations:
    """Begins, drives, shows and cancels operations of one node."""

    def __init__(self, store: Store, node: str, build: Callable[[Operation], Saga]) -> None:
        """`build` makes the saga of a recorded operation, by its kind."""
        self._store = store
        self._node = node
        self._build = build
        self._running: dict[str, _Running] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._draining = asyncio.Event()
        # Contenders in this process take turns, so that only other processes are raced through the store.
        self._begin_turn = asyncio.Lock()

    # -- beginning ---------------------------------------------------------------------------------------------------

    async def begin(self, draft: Callable[[], Awaitable[Draft]], request: RequestKey | None) -> str:
        """Make one durable operation of a draft and start it; its id.

        `draft` is asked again when what it picked was taken by someone else. With a `request` that was seen before,
        nothing begins and the first call's operation is named. Raises whatever `draft` raises, RequestIdReused,
        ContainerBusy, ContainerExists, StoreUnavailable, ShuttingDown.
        """
        for _ in range(_CONTENTION_TRIES):
            async with self._begin_turn:
                if self._draining.is_set():
                    raise ShuttingDown
                if (first := await self._first_call(request)) is not None:
                    return first
                try:
                    return await self._begin(await draft(), request)
                except StoreConflict as conflict:
                    await self._explain(conflict)
                except GpudockError:
                    # Perhaps only because the same call, through another daemon, has just done what was asked.
                    if (first := await self._first_call(request)) is not None:
                        return first
                    raise
        raise StoreUnavailable(detail="too many others take what this call picks")

    async def _first_call(self, request: RequestKey | None) -> str | None:
        record = await self._store.request(request.id) if request is not None else None
        if request is None or record is None:
            return None
        if record.digest != request.digest:
            raise RequestIdReused(request_id=request.id)
        return record.operation_id

    async def _begin(self, draft: Draft, request: RequestKey | None) -> str:
        moment = now()
        operation = Operation(
            id=str(uuid.uuid4()),
            kind=draft.kind,
            container=draft.container.name,
            container_uid=draft.container.uid,
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
        changes: list[Change] = []
        if request is not None:
            changes.append(PutRequest(request.id, RequestRecord(operation_id=operation.id, digest=request.digest)))
        changes += [
            PutContainer(draft.container, expect=draft.expect),
            LockContainer(operation.container, operation.id),
            *(
                Claim(claim.host, claim.key, claim.holder.model_copy(update={"operation_id": operation.id}))
                for claim in draft.claims
            ),
            PutOperation(operation, expect=0),
        ]
        version = await self._store.apply(changes)
        self._launch(_Running(operation, version, saga))
        return operation.id

    @staticmethod
    async def _explain(conflict: StoreConflict) -> None:
        """Raise what a caller can act on; return where the draft is merely out of date."""
        match conflict.change:
            case LockContainer(name=name):
                raise ContainerBusy(container=name, operation_id=str(conflict.found)) from None
            case PutContainer(container=container, expect=0):
                raise ContainerExists(container=container.name) from None
            case _:
                return

    # -- watching ----------------------------------------------------------------------------------------------------

    async def get(self, operation_id: str) -> Snapshot:
        """An operation as it is now. Raises OperationNotFound, StoreUnavailable."""
        if (running := self._running.get(operation_id)) is not None:
            return running.snapshot
        stored = await self._store.operation(operation_id)
        if stored is None:
            raise OperationNotFound(operation_id=operation_id)
        return Snapshot(stored.value)

    async def list(self, *, page_size: int, page_token: str) -> Page[Operation]:
        """Operations of every node, as they are recorded."""
        return await self._store.operations(page_size=page_size, page_token=page_token)

    async def watch(self, operation_id: str) -> AsyncIterator[Snapshot]:
        """Full snapshots until the operation has ended; the last one is the ended one.

        A slow reader is given the latest and misses what is between. Raises ShuttingDown when this daemon stops first:
        the operation then goes on with the next one.
        """
        while (running := self._running.get(operation_id)) is not None:
            changed = running.changed
            snapshot = running.snapshot
            yield snapshot
            if snapshot.operation.state.ended:
                return
            await self._changed_or_parked(operation_id, changed)
        snapshot = await self.get(operation_id)
        yield snapshot
        if not snapshot.operation.state.ended and snapshot.operation.node == self._node:
            if self._draining.is_set():
                raise ShuttingDown
            raise RuntimeError(f"operation {operation_id} is stuck; its log says why")

    async def _changed_or_parked(self, operation_id: str, changed: asyncio.Event) -> None:
        task = self._tasks.get(operation_id)
        if task is None:
            return
        waiter = asyncio.ensure_future(changed.wait())
        try:
            await asyncio.wait((task, waiter), return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()

    async def result(self, operation_id: str) -> Container:
        """Wait for the end; the container it left, or the error it ended with."""
        final: Snapshot | None = None
        async for snapshot in self.watch(operation_id):
            final = snapshot
        if final is None:
            raise OperationNotFound(operation_id=operation_id)
        return outcome_of(final.operation)

    # -- cancelling --------------------------------------------------------------------------------------------------

    async def cancel(self, operation_id: str) -> Snapshot:
        """Ask for an operation to be undone; returns once that is recorded, while the undoing goes on.

        Raises OperationNotFound, OperationNotCancellable.
        """
        running = self._running.get(operation_id)
        if running is None:
            snapshot = await self.get(operation_id)
            raise OperationNotCancellable(operation_id=operation_id, state=snapshot.operation.state.value)
        while not running.record.committed and running.record.state is OperationState.RUNNING:
            changed = running.changed
            running.cancel_requested = True
            if running.step_task is not None:
                running.step_task.cancel()
            await self._changed_or_parked(operation_id, changed)
            if operation_id not in self._tasks and not running.record.state.ended:
                raise ShuttingDown
        if not running.record.cancel_requested:
            raise OperationNotCancellable(operation_id=operation_id, state=running.record.state.value)
        return running.snapshot

    # -- life --------------------------------------------------------------------------------------------------------

    async def resume(self) -> tuple[str, ...]:
        """Take up every unfinished operation of this node that no task here drives; their ids."""
        taken = []
        # No begin may be half way: its operation could be in the store and not yet have its task.
        async with self._begin_turn:
            if self._draining.is_set():
                return ()
            # Nor may one that ended meanwhile be taken up from a record that is older than its end.
            driven = set(self._tasks)
            unfinished = await self._store.unfinished(self._node)
        for stored in unfinished:
            if stored.value.id not in driven:
                log.info("operation resumed", operation_id=stored.value.id, kind=stored.value.kind.value)
                self._launch(_Running(stored.value, stored.version, self._build(stored.value)))
                taken.append(stored.value.id)
        return tuple(taken)

    async def settle(self, operation_ids: Sequence[str]) -> None:
        """Wait until these operations have ended or were left."""
        tasks = [self._tasks[operation_id] for operation_id in operation_ids if operation_id in self._tasks]
        if tasks:
            await asyncio.wait(tasks)

    @property
    def active(self) -> frozenset[str]:
        """Ids of the operations that are driven here."""
        return frozenset(self._tasks)

    async def drain(self, grace_seconds: float) -> None:
        """Take no new work, bring what runs to a recorded step within `grace_seconds`, then let go of it."""
        self._draining.set()
        tasks = list(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    def _launch(self, running: _Running) -> None:
        operation_id = running.record.id
        self._running[operation_id] = running
        task = asyncio.create_task(self._run(running), name=f"operation {operation_id}")
        self._tasks[operation_id] = task
        task.add_done_callback(lambda _: self._forget(operation_id))

    def _forget(self, operation_id: str) -> None:
        self._tasks.pop(operation_id, None)
        self._running.pop(operation_id, None)

    # -- driving -----------------------------------------------------------------------------------------------------

    async def _run(self, running: _Running) -> None:
        with structlog.contextvars.bound_contextvars(
            operation_id=running.record.id, kind=running.record.kind.value, container=running.record.container
        ):
            try:
                await self._drive(running)
            except _Parked:
                log.info("operation left for the next daemon", stage=running.record.current_stage)
            except _Lost:
                log.warning("another process drives this operation; left to it")
            except Exception:
                # A defect of ours. The record stands where it stood; a restart tries again.
                log.exception("operation stuck")
            finally:
                running.tell()

    async def _drive(self, running: _Running) -> None:
        if running.record.state is OperationState.RUNNING and not running.record.committed:
            try:
                for index, step in enumerate(running.saga.steps):
                    await self._do(running, index, step)
                await self._commit(running)
            except (_Parked, _Lost):
                raise
            except Exception as error:  # noqa: BLE001 (a defect in a step must be undone like any other failure)
                await self._begin_undo(running, error)
        if running.record.state is OperationState.UNDOING:
            await self._undo(running)
        elif running.record.state is OperationState.RUNNING:
            await self._finish(running)

    async def _do(self, running: _Running, index: int, step: Step) -> None:
        if running.record.stages[index].state is StageState.DONE:
            return
        self._stop_here_if_told(running)
        running.record = running.record.with_stage(index, state=StageState.RUNNING, start_time=now())
        running.current_bytes = running.total_bytes = 0
        running.tell()
        running.step_task = asyncio.ensure_future(step.do(running))
        try:
            facts = await running.step_task
        except asyncio.CancelledError:
            if running.cancel_requested and running.step_task.cancelled():
                raise OperationCancelled(operation_id=running.record.id) from None
            raise
        finally:
            running.step_task.cancel()
            running.step_task = None
        done = running.record.with_stage(index, state=StageState.DONE, end_time=now(), facts=facts or {})
        await self._record(running, done)

    def _stop_here_if_told(self, running: _Running) -> None:
        if self._draining.is_set():
            raise _Parked
        if running.cancel_requested and not running.record.committed:
            raise OperationCancelled(operation_id=running.record.id)

    async def _commit(self, running: _Running) -> None:
        self._stop_here_if_told(running)
        index = len(running.saga.steps)
        starting = running.record.with_stage(index, state=StageState.RUNNING, start_time=now())
        running.record = starting

        async def changes(view: ContainerView) -> tuple[Operation, Sequence[Change]]:
            outcome = await running.saga.commit(running, view)
            committed = starting.with_stage(index, state=StageState.DONE, end_time=now()).changed(
                committed=True, result=outcome.container
            )
            if running.saga.after:
                return committed, outcome.changes
            return self._ended(committed, OperationState.SUCCEEDED, outcome.changes)

        await self._transact(running, changes)

    async def _finish(self, running: _Running) -> None:
        """Past the point of no return: whatever fails is tried again until it is done."""
        first = len(running.saga.steps) + 1
        for offset, step in enumerate(running.saga.after):
            await self._insist(running, first + offset, step)
        if not running.record.state.ended:

            async def changes(_: ContainerView) -> tuple[Operation, Sequence[Change]]:
                return self._ended(running.record, OperationState.SUCCEEDED, ())

            await self._transact(running, changes)

    async def _insist(self, running: _Running, index: int, step: Step) -> None:
        tries = 0
        while running.record.stages[index].state is not StageState.DONE:
            try:
                await self._do(running, index, step)
            except EngineUnavailable as error:
                await self._pause(tries, error)
            except GpudockError as error:
                if tries >= _REFUSED_UNDO_TRIES:
                    # The work is true already; what could not be tidied is left to reconcile, and said.
                    running.note(f"{step.name}: {error}")
                    await self._record(running, running.record.with_stage(index, state=StageState.DONE, end_time=now()))
                    return
                await self._pause(tries, error)
            tries += 1

    async def _begin_undo(self, running: _Running, error: Exception) -> None:
        if not isinstance(error, GpudockError):
            error_id = uuid.uuid4().hex[:12]
            log.error("step failed unexpectedly", error_id=error_id, stage=running.record.current_stage, exc_info=error)
            recorded = RecordedError(
                code=Code.INTERNAL,
                reason="INTERNAL",
                message=f"internal error, id {error_id}",
                metadata={"error_id": error_id},
            )
        else:
            log.info("operation is undone", reason=error.reason, detail=error.message)
            recorded = recorded_error(error)
        await self._record(
            running,
            running.record.changed(
                state=OperationState.UNDOING,
                error=recorded,
                cancel_requested=isinstance(error, OperationCancelled),
            ),
        )

    async def _undo(self, running: _Running) -> None:
        for index in range(len(running.saga.steps) - 1, -1, -1):
            stage = running.record.stages[index]
            if stage.state in (StageState.DONE, StageState.RUNNING):
                await self._undo_step(running, running.saga.steps[index])
                await self._record(running, running.record.with_stage(index, state=StageState.UNDONE))

        async def changes(view: ContainerView) -> tuple[Operation, Sequence[Change]]:
            state = OperationState.CANCELLED if running.record.cancel_requested else OperationState.FAILED
            left = await running.saga.abandon(running, view)
            return self._ended(running.record, state, left)

        await self._transact(running, changes)

    async def _undo_step(self, running: _Running, step: Step) -> None:
        if step.undo is None:
            return
        tries = 0
        while True:
            if self._draining.is_set():
                raise _Parked
            try:
                await step.undo(running)
            except EngineUnavailable as error:
                await self._pause(tries, error)
            except GpudockError as error:
                if tries >= _REFUSED_UNDO_TRIES:
                    running.note(f"undoing {step.name}: {error}")
                    return
                await self._pause(tries, error)
            else:
                return
            tries += 1

    async def _pause(self, tries: int, error: GpudockError) -> None:
        log.warning("will try again", reason=error.reason, detail=error.message)
        seconds = _BACKOFF_SECONDS[min(tries, len(_BACKOFF_SECONDS) - 1)]
        try:
            await asyncio.wait_for(self._draining.wait(), seconds)
        except TimeoutError:
            return
        raise _Parked

    # -- recording ---------------------------------------------------------------------------------------------------

    def _ended(
        self, operation: Operation, state: OperationState, changes: Sequence[Change]
    ) -> tuple[Operation, Sequence[Change]]:
        ended = operation.changed(state=state, end_time=now())
        more: list[Change] = [*changes, UnlockContainer(operation.container, operation.id)]
        if operation.request_id:
            record = RequestRecord(operation_id=operation.id, digest=operation.request_digest)
            more.append(PutRequest(operation.request_id, record, ended=True))
        return ended, more

    async def _record(self, running: _Running, operation: Operation, changes: Sequence[Change] = ()) -> None:
        """Put the record, and what belongs with it, in one transaction; wait for a store that is away."""
        operation = operation.changed(update_time=now(), message="; ".join(running.notes) or operation.message)
        tries = 0
        while True:
            try:
                version = await self._store.apply([*changes, PutOperation(operation, expect=running.version)])
            except StoreUnavailable as error:
                await self._pause(tries, error)
                tries += 1
            except StoreConflict as conflict:
                if isinstance(conflict.change, PutOperation):
                    raise _Lost from None
                raise
            else:
                running.record, running.version = operation, version
                running.tell()
                return

    async def _transact(
        self,
        running: _Running,
        changes: Callable[[ContainerView], Awaitable[tuple[Operation, Sequence[Change]]]],
    ) -> None:
        """Record an operation together with changes made from the current head, again where the head moved."""
        mended: list[tuple[Change, Change | None]] = []
        for _ in range(_CONTENTION_TRIES):
            view = await self._view(running)
            operation, wanted = await changes(view)
            try:
                await self._record(running, operation, [*_mend(wanted, mended)])
            except StoreConflict as conflict:
                match conflict.change:
                    case UnlockContainer():
                        # Someone edited the store by hand; say so, and do the rest.
                        log.warning("the lock is not as this operation left it", found=conflict.found)
                        mended.append((conflict.change, None))
                    case Keep():
                        log.warning("a claim is not as this operation left it", found=conflict.found)
                        mended.append((conflict.change, _claim_what_vanished(conflict.change, conflict.found)))
                    case _:
                        pass
            else:
                return
        raise StoreUnavailable(detail="the container's record keeps changing")

    async def _view(self, running: _Running) -> ContainerView:
        tries = 0
        while True:
            try:
                view = await self._store.container(running.record.container)
            except StoreUnavailable as error:
                await self._pause(tries, error)
                tries += 1
            else:
                if view is None or view.container.uid != running.record.container_uid:
                    raise _Lost
                return view


def _mend(changes: Sequence[Change], mended: Sequence[tuple[Change, Change | None]]) -> Iterator[Change]:
    for change in changes:
        final = next((new for old, new in mended if old == change), change)
        if final is not None:
            yield final


def _claim_what_vanished(change: Keep, found: object) -> Claim:
    """A claim that was there when the operation began is gone: take it again, unless another has it by now."""
    if not isinstance(found, Holder):
        return Claim(change.host, change.key, change.holder)
    match change.key:
        case GpuKey(uuid=gpu):
            raise GpuBusy(uuid=gpu, container=found.container)
        case PortKey(protocol=protocol, port=port):
            raise PortInUse(host_port=port, protocol=protocol.value, holder=found.container)


def stages_of(saga: Saga) -> tuple[Stage, ...]:
    """The stages that a watcher sees: the steps, the point of no return, and what comes after it."""
    names = [*(step.name for step in saga.steps), COMMIT_STAGE, *(step.name for step in saga.after)]
    return tuple(Stage(name=name) for name in names)


def recorded_error(error: GpudockError) -> RecordedError:
    """An error as its operation keeps it."""
    if isinstance(error, Recorded):
        return RecordedError(
            code=error.recorded_code,
            reason=error.recorded_reason,
            message=error.recorded_message,
            metadata=error.recorded_metadata,
        )
    return RecordedError(code=error.code, reason=error.reason, message=error.message, metadata=error.metadata)


def outcome_of(operation: Operation) -> Container:
    """The container that an ended operation left. Raises the error that it ended with."""
    if operation.error is not None:
        raise Recorded(
            recorded_code=operation.error.code,
            recorded_reason=operation.error.reason,
            recorded_message=operation.error.message,
            recorded_metadata=operation.error.metadata,
        )
    if operation.result is None:
        raise OperationNotFound(operation_id=operation.id)
    return operation.result
