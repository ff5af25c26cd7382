"""Operations that run as a step of another operation."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Step
from gpudock_server.errors import (
    ShuttingDown,
    StoreFull,
)
from gpudock_server.model.operation import OperationState
from gpudock_server.model.store_changes import PutContainer, PutOperation, StoreChange

from tests.rig.patience import limit
from tests.unit.model_node import TIMEOUT_SECONDS, ModelNode
from tests.unit.scripted_saga import REFUSED, ScriptedSaga, do_nothing, draft_of, failing

pytestmark = pytest.mark.usefixtures("no_backoff")


async def parent_of(model: ModelNode, child: ScriptedSaga) -> ScriptedSaga:
    """Return a saga for container `b` whose step runs `child` on container `a`."""
    await model.create_container(
        "b", model.container().spec.changed(ports=(), gpus=model.container().spec.gpus.model_copy(update={"count": 0}))
    )

    async def work(run: OperationRun) -> None:
        await run.run_child("child", lambda: draft_of(model, lambda _: child))

    return ScriptedSaga(model, [Step("work", work)])


async def begin_saga_on_b(model: ModelNode, saga: ScriptedSaga) -> str:
    """Begin an operation on container `b`; return its id."""
    stored = model.store.container_records["b"]
    put = PutContainer(stored.value, expect=stored.version)
    draft = replace(await draft_of(model, lambda _: saga), target=stored.value.target, target_record=put)

    async def drafted() -> OperationDraft:
        return draft

    return await model.operations.begin(drafted, None)


async def test_a_parent_waits_for_its_child_operation(model: ModelNode) -> None:
    parent = await parent_of(model, ScriptedSaga(model, [Step("child step", do_nothing)]))
    operation = await model.ended_operation(await begin_saga_on_b(model, parent))
    assert operation.state is OperationState.SUCCEEDED
    (child,) = [stored.value for stored in model.store.journal.values() if stored.value.request_id]
    assert child.state is OperationState.SUCCEEDED
    assert child.target.name == "a"


async def test_a_parent_fails_with_the_error_of_its_child(model: ModelNode) -> None:
    work, _ = failing(REFUSED)
    operation = await model.ended_operation(
        await begin_saga_on_b(model, await parent_of(model, ScriptedSaga(model, [Step("child step", work)])))
    )
    assert operation.error is not None
    assert operation.error.metadata == REFUSED.metadata


async def test_a_caller_of_a_parent_gets_an_error_while_its_child_waits_for_a_full_store(model: ModelNode) -> None:
    parent = await parent_of(model, ScriptedSaga(model, [Step("child step", do_nothing)]))
    space = asyncio.Event()

    def before(changes: Sequence[StoreChange]) -> None:
        for change in changes:
            if (
                isinstance(change, PutOperation)
                and change.expect
                and change.operation.target.name == "a"
                and not space.is_set()
            ):
                raise StoreFull("no space")

    model.store.before_apply = before
    operation_id = await begin_saga_on_b(model, parent)
    with pytest.raises(StoreFull):
        await model.operations.result(operation_id)
    space.set()
    assert (await model.ended_operation(operation_id)).state is OperationState.SUCCEEDED
    assert await model.operations.result(operation_id) == model.container("b")


async def test_children_of_one_parent_are_different_operations(model: ModelNode) -> None:
    parent = await parent_of(model, ScriptedSaga(model, []))
    (step,) = parent.steps

    async def both(run: OperationRun) -> None:
        await step.do(run)
        await run.run_child("other", lambda: draft_of(model, lambda _: ScriptedSaga(model, [])))

    parent._steps = (Step("work", both),)
    assert (await model.ended_operation(await begin_saga_on_b(model, parent))).state is OperationState.SUCCEEDED
    assert len([stored for stored in model.store.journal.values() if stored.value.request_id]) == 2


async def test_a_caller_can_wait_for_a_parent_again_after_its_child_waited_for_a_full_store(model: ModelNode) -> None:
    parent, child_ended, gate = await parent_of(model, ScriptedSaga(model, [])), asyncio.Event(), asyncio.Event()
    (step,) = parent.steps

    async def child_then_gate(run: OperationRun) -> None:
        await step.do(run)
        child_ended.set()
        await gate.wait()

    parent._steps = (Step("work", child_then_gate),)

    def parent_is_blocked() -> bool:
        return any(
            running.record.target.name == "b" and running.blocked for running in model.operations._running.values()
        )

    def before(changes: Sequence[StoreChange]) -> None:
        for change in changes:
            ends = isinstance(change, PutOperation) and change.expect and change.operation.target.name == "a"
            if ends and not parent_is_blocked():
                raise StoreFull("no space")

    model.store.before_apply = before
    operation_id = await begin_saga_on_b(model, parent)
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        await child_ended.wait()
    # The blocked write of the child's last record has succeeded.
    assert not parent_is_blocked()
    waiting = asyncio.create_task(model.operations.result(operation_id))
    await asyncio.sleep(0)
    gate.set()
    assert await waiting == model.container("b")


async def test_a_child_that_would_begin_during_a_shutdown_is_left_to_the_next_process(model: ModelNode) -> None:
    parent = await parent_of(model, ScriptedSaga(model, []))
    (step,) = parent.steps
    gate = asyncio.Event()

    async def begin_late(run: OperationRun) -> None:
        await gate.wait()
        await step.do(run)

    parent._steps = (Step("work", begin_late),)
    operation_id = await begin_saga_on_b(model, parent)
    draining = asyncio.create_task(model.operations.drain(TIMEOUT_SECONDS))
    await asyncio.sleep(0)
    gate.set()
    await draining
    assert model.store.journal[operation_id].value.state is OperationState.RUNNING
    with pytest.raises(ShuttingDown):
        await model.operations.result(operation_id)
