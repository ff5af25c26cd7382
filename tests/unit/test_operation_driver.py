"""How an operation handles steps and stores that fail: retried, undone, reported, or left to another process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import SupportsIndex

import pytest
import structlog
from gpudock_server.core.operations import engine as operations
from gpudock_server.core.operations import journal
from gpudock_server.core.operations.saga import OperationRun, Step
from gpudock_server.errors import (
    EngineUnavailable,
    OperationCancelled,
    OperationFailed,
    StoreFull,
    StoreUnavailable,
)
from gpudock_server.model.claims import ClaimKey, GpuKey, PortKey
from gpudock_server.model.operation import OperationKind, OperationState, StageState
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.spec import Protocol
from gpudock_server.model.store_changes import Claim, ConfirmClaim, PutOperation, StoreChange
from gpudock_server.ports import Versioned

from tests.rig.patience import limit
from tests.unit.model_node import HOST, NODE, TIMEOUT_SECONDS, ModelNode
from tests.unit.scripted_saga import REFUSED, ScriptedSaga, begin_saga, do_nothing, failing

AWAY = EngineUnavailable(call="work", detail="away")
GPU, PORT = GpuKey("GPU-7"), PortKey(Protocol.UDP, 20009)


class RecordedPauses(list[float]):
    """Backoffs of zero seconds that record which of them were taken."""

    def __init__(self) -> None:
        super().__init__([0.0] * 5)
        self.taken: list[SupportsIndex | slice] = []

    def __getitem__(self, index: SupportsIndex | slice) -> float:  # type: ignore[override]  # an index past the end is the last
        self.taken.append(index)
        return 0.0


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[SupportsIndex | slice]:
    """The indices of the backoffs that were taken."""
    pauses = RecordedPauses()
    monkeypatch.setattr(journal, "_BACKOFF_SECONDS", pauses)
    monkeypatch.setattr(operations, "_RESUME_POLL_SECONDS", 0.001)
    return pauses.taken


async def test_what_a_step_logs_names_its_operation(model: ModelNode) -> None:
    contexts: list[dict[str, object]] = []

    async def work(_: OperationRun) -> None:
        contexts.append(structlog.contextvars.get_contextvars())

    operation_id = await begin_saga(model, ScriptedSaga(model, [Step("work", work)]))
    await model.ended_operation(operation_id)
    assert contexts == [{"operation_id": operation_id, "kind": "RESTART", "target": "a"}]


async def test_an_unexpected_exception_is_undone_and_reported_by_an_error_id(model: ModelNode) -> None:
    undone: list[str] = []

    async def undo(_: OperationRun) -> None:
        undone.append("work")

    work, _ = failing(AssertionError("a secret"))
    before = model.container()
    operation = await model.ended_operation(
        await begin_saga(
            model,
            ScriptedSaga(model, [Step("first", do_nothing, undo), Step("work", work, undo), Step("last", work, undo)]),
        )
    )
    assert operation.state is OperationState.FAILED
    assert operation.error is not None
    assert (operation.error.code, operation.error.reason) == (13, "INTERNAL")
    error_id = operation.error.metadata["error_id"]
    assert operation.error.message == f"internal error, id {error_id}"
    assert len(error_id) == 12
    assert undone == ["work", "work"]
    assert [stage.state for stage in operation.stages] == [
        StageState.UNDONE,
        StageState.UNDONE,
        StageState.PENDING,
        StageState.PENDING,
    ]
    assert not operation.committed
    assert not operation.cancel_requested
    assert model.container() == before


async def test_the_error_of_a_step_is_recorded(model: ModelNode) -> None:
    work, _ = failing(REFUSED)
    operation = await model.ended_operation(await begin_saga(model, ScriptedSaga(model, [Step("work", work)])))
    assert operation.error is not None
    assert operation.error.code == REFUSED.code
    assert operation.error.reason == "ENGINE_REJECTED"
    assert operation.error.message == REFUSED.message
    assert operation.error.metadata == REFUSED.metadata
    recorded = OperationFailed(recorded_code=7, recorded_reason="R", recorded_message="m", recorded_metadata={"k": "v"})
    work, _ = failing(recorded)
    operation = await model.ended_operation(await begin_saga(model, ScriptedSaga(model, [Step("work", work)])))
    assert operation.error is not None
    assert (operation.error.code, operation.error.reason, operation.error.message) == (7, "R", "m")
    assert operation.error.metadata == {"k": "v"}


@pytest.mark.parametrize(("errors", "message"), [(3, ""), (4, f"step tidy failed after the commit: {REFUSED}")])
async def test_a_step_that_is_refused_after_the_commit_is_retried_and_then_reported_in_the_message(
    model: ModelNode, pauses: list[SupportsIndex | slice], errors: int, message: str
) -> None:
    work, left = failing(*[REFUSED] * errors)
    operation = await model.ended_operation(
        await begin_saga(model, ScriptedSaga(model, [], [Step("tidy", work), Step("more", do_nothing)]))
    )
    assert operation.state is OperationState.SUCCEEDED
    assert operation.message == message
    assert not left
    assert pauses == [0, 1, 2]
    assert [stage.state for stage in operation.stages] == [StageState.DONE] * 3
    assert all(stage.end_time is not None for stage in operation.stages)


async def test_a_step_after_the_commit_waits_for_an_unavailable_engine(
    model: ModelNode, pauses: list[SupportsIndex | slice]
) -> None:
    work, left = failing(*[AWAY] * 7)
    operation = await model.ended_operation(await begin_saga(model, ScriptedSaga(model, [], [Step("tidy", work)])))
    assert operation.state is OperationState.SUCCEEDED
    assert not operation.message
    assert not left
    assert pauses == [0, 1, 2, 3, 4, 4, 4]


@pytest.mark.parametrize(
    ("errors", "message", "taken"),
    [
        ([REFUSED] * 3, "", [0, 1, 2]),
        ([REFUSED] * 4, f"undo of step first failed: {REFUSED}", [0, 1, 2]),
        ([AWAY] * 7, "", [0, 1, 2, 3, 4, 4, 4]),
    ],
)
async def test_an_undo_is_retried(
    model: ModelNode, pauses: list[SupportsIndex | slice], errors: list[Exception], message: str, taken: list[int]
) -> None:
    undo, left = failing(*errors)
    work, _ = failing(REFUSED)
    operation = await model.ended_operation(
        await begin_saga(model, ScriptedSaga(model, [Step("first", do_nothing, undo), Step("work", work)]))
    )
    assert operation.state is OperationState.FAILED
    assert operation.message == message
    assert not left
    assert pauses == taken


async def test_a_failure_is_recorded_once_the_engine_is_available(
    model: ModelNode, pauses: list[SupportsIndex | slice]
) -> None:
    saga, (work, _) = ScriptedSaga(model, []), failing(REFUSED)
    saga._steps = (Step("work", work),)
    errors = [AWAY] * 3
    failure_changes = saga.failure_changes

    async def fail_first(*args: object) -> Sequence[StoreChange]:
        if errors:
            raise errors.pop()
        return await failure_changes(*args)  # type: ignore[arg-type]  # passes its arguments on

    saga.failure_changes = fail_first  # type: ignore[method-assign, assignment]
    operation = await model.ended_operation(await begin_saga(model, saga))
    assert operation.state is OperationState.FAILED
    assert pauses == [0, 1, 2]


async def test_an_operation_waits_for_an_unavailable_store(
    model: ModelNode, pauses: list[SupportsIndex | slice]
) -> None:
    saga, store = ScriptedSaga(model, [Step("work", do_nothing)]), model.store
    store.failures.extend([None, *[StoreUnavailable("away")] * 6, None, StoreUnavailable("away"), None])
    operation_id = await begin_saga(model, saga)
    waiting = asyncio.create_task(model.operations.result(operation_id))
    operation = await model.ended_operation(operation_id)
    assert operation.state is OperationState.SUCCEEDED
    assert pauses == [0, 1, 2, 3, 4, 4, 0]
    assert not store.failures
    # Callers wait as well, unlike for a full store.
    assert await waiting == model.container()


async def test_reading_the_target_from_an_unavailable_store_is_retried(
    model: ModelNode, pauses: list[SupportsIndex | slice]
) -> None:
    saga = ScriptedSaga(model, [])
    errors = [StoreUnavailable("away")] * 3
    read_target = saga.read_target

    async def fail_first(run: OperationRun) -> object:
        if errors:
            raise errors.pop()
        return await read_target(run)

    saga.read_target = fail_first  # type: ignore[method-assign, assignment]
    assert (await model.ended_operation(await begin_saga(model, saga))).state is OperationState.SUCCEEDED
    assert pauses == [0, 1, 2]


async def test_an_operation_waits_for_a_full_store_and_its_callers_get_an_error(model: ModelNode) -> None:
    store, space = model.store, asyncio.Event()

    def before(changes: Sequence[StoreChange]) -> None:
        if not space.is_set() and not any(
            isinstance(change, PutOperation) and change.expect == 0 for change in changes
        ):
            raise StoreFull("no space")

    store.before_apply = before
    operation_id = await begin_saga(model, ScriptedSaga(model, [Step("work", do_nothing)]))
    with pytest.raises(StoreFull) as full:
        await model.operations.result(operation_id)
    assert full.value.metadata == {"detail": "no space", "operation_id": operation_id}
    assert full.value.message.endswith(
        f"no space; operation {operation_id} waits at its last recorded step and continues when there is space"
    )
    space.set()
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        await model.operations.wait_until_ended([operation_id])
    assert await model.operations.result(operation_id) == model.container()


async def test_an_operation_whose_record_another_process_has_written_is_left_to_that_process(model: ModelNode) -> None:
    async def work(run: OperationRun) -> None:
        stored = model.store.journal[run.operation.id]
        model.store.journal[run.operation.id] = Versioned(stored.value, stored.version + 100)

    operation_id = await begin_saga(
        model, ScriptedSaga(model, [Step("work", work), Step("never", failing(AssertionError())[0])])
    )
    operation = await model.ended_operation(operation_id)
    assert operation.state is OperationState.RUNNING
    assert [stage.state for stage in operation.stages] == [StageState.PENDING] * 3
    assert not model.operations.active


async def test_an_operation_without_its_target_is_left_running(model: ModelNode) -> None:
    async def work(_: OperationRun) -> None:
        model.store.container_records.clear()

    operation = await model.ended_operation(await begin_saga(model, ScriptedSaga(model, [Step("work", work)])))
    assert (operation.state, operation.committed) == (OperationState.RUNNING, False)


async def test_a_target_that_changed_before_the_commit_is_read_again(model: ModelNode) -> None:
    store, times = model.store, 3

    def change_target(changes: Sequence[StoreChange]) -> None:
        nonlocal times
        if times and any(isinstance(change, PutOperation) and change.operation.committed for change in changes):
            times -= 1
            model.store.put(model.container().changed(owner=f"owner {times}"))

    store.before_apply = change_target
    before = model.container().generation
    assert (
        await model.ended_operation(await begin_saga(model, ScriptedSaga(model, [])))
    ).state is OperationState.SUCCEEDED
    assert (model.container().owner, model.container().generation) == ("owner 0", before + 1)


async def test_a_target_that_changes_64_times_fails_the_operation(model: ModelNode) -> None:
    tries = 0

    def change_target(changes: Sequence[StoreChange]) -> None:
        nonlocal tries
        if any(isinstance(change, PutOperation) and change.operation.committed for change in changes):
            tries += 1
            model.store.put(model.container())

    model.store.before_apply = change_target
    operation = await model.ended_operation(await begin_saga(model, ScriptedSaga(model, [])))
    assert operation.error is not None
    assert operation.error.reason == "STORE_UNAVAILABLE"
    assert operation.error.metadata == {"detail": "the record of a was changed 64 times during one write"}
    assert tries == 64


async def test_an_operation_that_lost_its_lock_still_ends(model: ModelNode) -> None:
    async def work(_: OperationRun) -> None:
        model.store.locks[ResourceKind.CONTAINER, "a"] = "other"

    operation = await model.ended_operation(await begin_saga(model, ScriptedSaga(model, [Step("work", work)])))
    assert operation.state is OperationState.SUCCEEDED
    assert model.store.locks == {(ResourceKind.CONTAINER, "a"): "other"}


async def begin_with_claim(model: ModelNode, key: ClaimKey, meanwhile: Callable[[], None]) -> str:
    """Begin an operation that claims `key` and calls `meanwhile` in its step; return its id."""
    holder = model.core.claims.holder(model.container())

    async def work(run: OperationRun) -> None:
        assert model.store.holders[HOST][key] == holder.model_copy(update={"operation_id": run.operation.id})
        meanwhile()

    saga = ScriptedSaga(model, [Step("work", work)])
    saga.changes = lambda _: [ConfirmClaim(HOST, key, holder)]
    return await begin_saga(model, saga, claims=[Claim(HOST, key, holder)])


async def test_a_claim_that_was_removed_is_written_again(model: ModelNode) -> None:
    operation = await model.ended_operation(await begin_with_claim(model, GPU, model.store.holders[HOST].clear))
    assert operation.state is OperationState.SUCCEEDED
    assert model.store.holders[HOST][GPU] == model.core.claims.holder(model.container())


@pytest.mark.parametrize(
    ("key", "reason", "metadata"),
    [
        (GPU, "GPU_BUSY", {"uuid": "GPU-7", "container": "thief"}),
        (PORT, "PORT_IN_USE", {"host_port": "20009", "protocol": "udp", "holder": "thief"}),
    ],
)
async def test_an_operation_fails_if_another_container_holds_its_claim(
    model: ModelNode, key: ClaimKey, reason: str, metadata: dict[str, str]
) -> None:
    thief = model.core.claims.holder(model.container()).model_copy(update={"container": "thief", "uid": "thief"})
    operation = await model.ended_operation(
        await begin_with_claim(model, key, lambda: model.store.holders[HOST].update({key: thief}))
    )
    assert operation.error is not None
    assert (operation.error.reason, operation.error.metadata) == (reason, metadata)
    assert model.store.holders[HOST][key] == thief


async def resume_in_another_process(
    model: ModelNode, operation_id: str, saga: ScriptedSaga, *, reached: asyncio.Event
) -> None:
    """End this process once `reached` is set, and have another one complete the operation."""
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        await reached.wait()
        await model.operations.drain(0)
        sagas = {OperationKind.RESTART: lambda _: saga}
        model.operations = operations.Operations(model.store, NODE, [model.core.container_resource], sagas)
        assert await model.operations.resume() == (operation_id,)
        await model.operations.wait_until_ended([operation_id])


async def test_a_resumed_undo_repeats_no_step(model: ModelNode) -> None:
    reached, done = asyncio.Event(), list[str]()

    async def first(_: OperationRun) -> None:
        done.append("first")

    async def undo(_: OperationRun) -> None:
        done.append("undo")
        if not reached.is_set():
            reached.set()
            await asyncio.Event().wait()

    saga = ScriptedSaga(model, [Step("first", first, undo), Step("work", failing(REFUSED)[0])])
    operation_id = await begin_saga(model, saga)
    await resume_in_another_process(model, operation_id, saga, reached=reached)
    assert done == ["first", "undo", "undo"]
    assert model.store.journal[operation_id].value.state is OperationState.FAILED


async def test_a_resumed_operation_is_not_committed_twice(model: ModelNode) -> None:
    reached, before = asyncio.Event(), model.container().generation

    async def tidy(_: OperationRun) -> None:
        if not reached.is_set():
            reached.set()
            await asyncio.Event().wait()

    saga = ScriptedSaga(model, [Step("work", do_nothing)], [Step("tidy", tidy)])
    operation_id = await begin_saga(model, saga)
    await resume_in_another_process(model, operation_id, saga, reached=reached)
    assert model.store.journal[operation_id].value.state is OperationState.SUCCEEDED
    assert model.container().generation == before + 1


async def test_messages_of_steps_are_recorded(model: ModelNode) -> None:
    async def work(run: OperationRun) -> None:
        run.add_message("one")
        run.add_message("two")

    operation = await model.ended_operation(
        await begin_saga(model, ScriptedSaga(model, [Step("work", work), Step("more", do_nothing)]))
    )
    assert operation.message == "one; two"


async def test_a_cancel_between_two_steps_takes_effect_before_the_second(model: ModelNode) -> None:
    ids: list[str] = []

    async def work(_: OperationRun) -> None:
        # The request alone; the task of the step is not cancelled.
        running = model.operations._running[ids[0]]
        running.cancel_requested = True

    operation_id = await begin_saga(
        model, ScriptedSaga(model, [Step("work", work), Step("never", failing(AssertionError())[0])])
    )
    ids.append(operation_id)
    operation = await model.ended_operation(operation_id)
    assert operation.state is OperationState.CANCELLED
    assert operation.error is not None
    assert operation.error.reason == OperationCancelled.reason
    assert operation.error.metadata == {"operation_id": operation_id}
    assert operation.stages[1].state is StageState.PENDING
