"""How operations are cancelled, resumed by another process, and left by a shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from gpudock_server.core.operations import engine as operations_module
from gpudock_server.core.operations.saga import OperationRun, Step
from gpudock_server.errors import (
    GpudockError,
    OperationNotCancellable,
    OperationNotFound,
    Recovering,
    ShuttingDown,
    StoreFull,
    VolumeOnOtherNode,
    WrongNode,
)
from gpudock_server.model.operation import (
    Operation,
    OperationKind,
    OperationState,
    Stage,
    StageState,
)
from gpudock_server.model.resource import ResourceKind, ResourceRef
from gpudock_server.ports import Versioned

from tests.rig.patience import limit
from tests.unit.failing_store import node_record
from tests.unit.model_node import TIMEOUT_SECONDS, ModelNode
from tests.unit.operation_examples import ID, record_operation, start_recovering_daemon
from tests.unit.scripted_saga import ScriptedSaga, UncancellableSaga, begin_saga, do_nothing


async def cancel_error(model: ModelNode, operation_id: str = ID) -> GpudockError:
    with pytest.raises(GpudockError) as refused:
        await model.operations.cancel(operation_id)
    return refused.value


async def test_why_an_operation_cannot_be_cancelled(model: ModelNode) -> None:
    assert isinstance(await cancel_error(model), OperationNotFound)
    record_operation(model, state=OperationState.SUCCEEDED, node="other")
    ended = await cancel_error(model)
    assert isinstance(ended, OperationNotCancellable)
    assert ended.metadata == {"operation_id": ID, "state": "SUCCEEDED"}
    record_operation(model, node="other")
    wrong_node = await cancel_error(model)
    assert isinstance(wrong_node, WrongNode)
    assert (wrong_node.container, wrong_node.node, wrong_node.address) == ("a", "other", "")
    model.store.node_records = [node_record("third", "t:1"), node_record("other", "o:1")]
    wrong_node = await cancel_error(model)
    assert isinstance(wrong_node, WrongNode)
    assert wrong_node.address == "o:1"
    record_operation(model)
    stuck = await cancel_error(model)
    assert isinstance(stuck, OperationNotCancellable)
    assert stuck.metadata == {"operation_id": ID, "state": "RUNNING"}
    start_recovering_daemon(model)
    assert isinstance(await cancel_error(model), Recovering)
    model.operations.set_recovery_blocked(StoreFull("no space"))
    assert isinstance(await cancel_error(model), StoreFull)
    record_operation(model, state=OperationState.FAILED)
    assert isinstance(await cancel_error(model), OperationNotCancellable)


async def test_a_cancelled_operation_can_be_cancelled_again(model: ModelNode) -> None:
    operation = record_operation(model, cancel_requested=True, node="other")
    assert (await model.operations.cancel(ID)).operation == operation


def test_the_wrong_node_error_of_a_volume_operation_names_the_volume(model: ModelNode) -> None:
    target = ResourceRef(kind=ResourceKind.VOLUME, name="data", uid=ID)
    error = model.operations.wrong_node_error(record_operation(model, target=target, node="other"), "o:1")
    assert isinstance(error, VolumeOnOtherNode)
    assert (error.volume, error.node, error.address) == ("data", "other", "o:1")


async def test_an_uncancellable_operation_continues(model: ModelNode) -> None:
    gate = asyncio.Event()

    async def work(_: OperationRun) -> None:
        await gate.wait()

    operation_id = await begin_saga(model, UncancellableSaga(model, [Step("work", work)]))
    await asyncio.sleep(0)
    refused = await cancel_error(model, operation_id)
    assert isinstance(refused, OperationNotCancellable)
    assert refused.metadata == {"operation_id": operation_id, "state": "RUNNING"}
    gate.set()
    assert (await model.ended_operation(operation_id)).state is OperationState.SUCCEEDED


async def test_a_cancel_is_recorded_before_the_undo(model: ModelNode) -> None:
    undoing, may_undo = asyncio.Event(), asyncio.Event()

    async def work(_: OperationRun) -> None:
        await asyncio.Event().wait()

    async def undo(_: OperationRun) -> None:
        undoing.set()
        await may_undo.wait()

    operation_id = await begin_saga(model, ScriptedSaga(model, [Step("work", work, undo)]))
    await asyncio.sleep(0)
    view = await model.operations.cancel(operation_id)
    assert view.operation.cancel_requested
    assert view.operation.state is OperationState.UNDOING
    await undoing.wait()
    assert (await model.operations.cancel(operation_id)).operation.cancel_requested
    may_undo.set()
    operation = await model.ended_operation(operation_id)
    assert operation.state is OperationState.CANCELLED
    assert [stage.state for stage in operation.stages] == [StageState.UNDONE, StageState.PENDING]


async def test_a_cancel_that_cannot_be_recorded_fails_and_still_takes_effect(model: ModelNode) -> None:
    started = asyncio.Event()

    async def work(_: OperationRun) -> None:
        started.set()
        await asyncio.Event().wait()

    operation_id = await begin_saga(model, ScriptedSaga(model, [Step("work", work)]))
    await started.wait()
    model.store.failures.append(StoreFull("no space"))
    refused = await cancel_error(model, operation_id)
    assert isinstance(refused, StoreFull)
    assert refused.detail == "no space"
    assert (await model.ended_operation(operation_id)).state is OperationState.CANCELLED


async def test_unfinished_operations_of_this_node_are_resumed_once(model: ModelNode) -> None:
    left = [f"{number}{ID[1:]}" for number in range(4)]
    record_operation(model, node="other")
    for operation_id in left:
        record_operation(
            model,
            id=operation_id,
            stages=[Stage(name="pause"), Stage(name="commit")],
            kind=OperationKind.PAUSE,
            arguments={"engine_id": model.engine_id(), "freeze": True},
        )
    ended = model.store.journal[left[0]]
    unfinished = model.store.unfinished

    async def end_two_while_listing(node: str) -> tuple[Versioned[Operation], ...]:
        found = await unfinished(node)
        model.store.journal[left[0]] = Versioned(ended.value.changed(state=OperationState.SUCCEEDED), ended.version)
        model.store.journal.pop(left[1], None)
        return found

    model.store.unfinished = end_two_while_listing  # type: ignore[method-assign]  # this call alone differs
    assert await model.operations.resume([left[2]]) == (left[3],)
    assert model.operations.active == model.operations.driven == {left[3]}
    assert await model.operations.resume([left[2]]) == ()
    assert (await model.ended_operation(left[3])).state is OperationState.SUCCEEDED
    assert await model.operations.resume() == (left[2],)
    await model.operations.wait_until_ended([left[2], ID])
    assert model.store.journal[left[2]].value.state is OperationState.SUCCEEDED
    assert not model.operations.active
    await model.operations.drain(0)
    model.store.journal[left[3]] = Versioned(ended.value.changed(id=left[3]), 1)
    assert await model.operations.resume() == ()


@pytest.fixture
def short_resume_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations_module, "_RESUME_POLL_SECONDS", 0.001)


@pytest.mark.usefixtures("short_resume_poll")
async def test_a_starting_daemon_waits_for_all_steps_that_are_not_interruptible(model: ModelNode) -> None:
    short, long = asyncio.Event(), asyncio.Event()

    def wait(event: asyncio.Event) -> Callable[[OperationRun], asyncio.Future[None]]:
        async def work(_: OperationRun) -> None:
            await event.wait()

        return work  # type: ignore[return-value]  # a step must return an awaitable

    script = ScriptedSaga(model, [Step("short", wait(short)), Step("long", wait(long), interruptible=True)])
    operation_id = await begin_saga(model, script)
    waiting = asyncio.create_task(model.operations.wait_until_ended_or_interruptible([operation_id, ID]))
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert not waiting.done()
    short.set()
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        await waiting
    assert operation_id in model.operations.active
    assert model.store.journal[operation_id].value.stages[0].state is StageState.DONE
    await model.operations.drain(TIMEOUT_SECONDS)
    stages = model.store.journal[operation_id].value.stages
    assert [stage.state for stage in stages] == [StageState.DONE, StageState.PENDING, StageState.PENDING]
    assert not long.is_set()


async def test_a_shutdown_waits_for_the_current_step(model: ModelNode) -> None:
    gate = asyncio.Event()

    async def work(_: OperationRun) -> None:
        await gate.wait()

    operation_id = await begin_saga(model, ScriptedSaga(model, [Step("work", work), Step("rest", do_nothing)]))
    draining = asyncio.create_task(model.operations.drain(TIMEOUT_SECONDS))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not draining.done()
    gate.set()
    await draining
    stages = model.store.journal[operation_id].value.stages
    assert [stage.state for stage in stages] == [StageState.DONE, StageState.PENDING, StageState.PENDING]


async def test_a_shutdown_leaves_a_step_that_does_not_end_in_time(model: ModelNode) -> None:
    async def work(_: OperationRun) -> None:
        await asyncio.Event().wait()

    operation_id = await begin_saga(model, ScriptedSaga(model, [Step("work", work)]))
    await asyncio.sleep(0)
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        await model.operations.drain(0)
    assert not model.operations.active
    operation = model.store.journal[operation_id].value
    assert operation.state is OperationState.RUNNING
    assert {stage.state for stage in operation.stages} == {StageState.PENDING}
    with pytest.raises(ShuttingDown):
        await model.operations.result(operation_id)
