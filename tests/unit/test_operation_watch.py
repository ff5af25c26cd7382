"""What callers read of an operation: its progress, its end and its result."""

from __future__ import annotations

import asyncio

import pytest
from gpudock_server.core.containers.commands import Restart, Stop
from gpudock_server.core.operations import active_operation as running_module
from gpudock_server.core.operations.active_operation import OperationView
from gpudock_server.core.operations.saga import OperationRun, Step
from gpudock_server.core.volumes import commands as volume_commands
from gpudock_server.errors import (
    OperationFailed,
    OperationNotFound,
    OperationResultGone,
    ShuttingDown,
)
from gpudock_server.model.operation import (
    OperationKind,
    OperationState,
    RecordedError,
)
from gpudock_server.ports import Versioned

from tests.rig.patience import limit
from tests.unit.model_node import TIMEOUT_SECONDS, ModelNode
from tests.unit.operation_examples import ID, record_operation, start_recovering_daemon
from tests.unit.scripted_saga import ScriptedSaga, begin_saga


async def watched_views(model: ModelNode, operation_id: str) -> list[OperationView]:
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        return [view async for view in model.operations.watch(operation_id)]


async def test_a_watch_shows_each_stage_and_the_end(model: ModelNode) -> None:
    async def work(run: OperationRun) -> None:
        run.set_stage_message("copying")
        run.progress(1, 3)
        await asyncio.sleep(0)
        run.progress(3, 3)
        await asyncio.sleep(0)

    async def rest(_: OperationRun) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    views = await watched_views(
        model, await begin_saga(model, ScriptedSaga(model, [Step("work", work), Step("rest", rest)]))
    )
    shown = {(view.operation.current_stage, view.current_bytes, view.total_bytes, view.message) for view in views}
    assert ("work", 3, 3, "copying") in shown
    assert ("rest", 0, 0, "") in shown
    assert views[-1].operation.state is OperationState.SUCCEEDED
    assert views[-1].operation.stages[0].current_bytes == views[-1].operation.stages[0].total_bytes == 3


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.0, {(1, 3), (2, 3), (3, 3)}), (1e12, {(3, 3)})],
    ids=["without an interval", "within one interval"],
)
async def test_progress_is_shown_once_an_interval_and_at_its_end(
    model: ModelNode, monkeypatch: pytest.MonkeyPatch, seconds: float, expected: set[tuple[int, int]]
) -> None:
    monkeypatch.setattr(running_module, "_PROGRESS_INTERVAL_SECONDS", seconds)

    async def work(run: OperationRun) -> None:
        # No progress at first, so that the watch has begun.
        for done in (0, 1, 2, 3):
            if done:
                run.progress(done, 3)
            for _ in range(10):
                await asyncio.sleep(0)

    views = await watched_views(model, await begin_saga(model, ScriptedSaga(model, [Step("work", work)])))
    shown = {(view.current_bytes, view.total_bytes) for view in views if view.operation.current_stage == "work"}
    assert shown - {(0, 0)} == expected


async def test_a_watch_of_an_ended_operation_shows_it_once(model: ModelNode) -> None:
    operation = await model.run_ok(Stop("a"))
    assert [view.operation for view in await watched_views(model, operation.id)] == [operation]
    assert (await model.operations.get(operation.id)).operation == operation
    with pytest.raises(OperationNotFound) as unknown:
        await model.operations.get(ID)
    assert unknown.value.operation_id == ID


async def test_a_watch_of_an_operation_of_another_node_shows_its_record_once(model: ModelNode) -> None:
    operation = record_operation(model, node="other")
    assert [view.operation for view in await watched_views(model, ID)] == [operation]


async def test_a_watch_of_an_operation_without_a_driver_fails(model: ModelNode) -> None:
    record_operation(model)
    with pytest.raises(RuntimeError, match=ID):
        await watched_views(model, ID)
    model.operations._draining.set()
    with pytest.raises(ShuttingDown):
        await watched_views(model, ID)


async def test_a_watch_waits_until_its_operation_is_resumed(model: ModelNode) -> None:
    operation_id = await model.begin(Restart("a"))
    await model.operations.drain(0)
    operations = start_recovering_daemon(model)
    watching = asyncio.create_task(watched_views(model, operation_id))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not watching.done()
    assert await operations.resume() == (operation_id,)
    assert (await watching)[-1].operation.state is OperationState.SUCCEEDED


@pytest.mark.parametrize("outcome", ["recovered", "stopped"])
async def test_a_watch_ends_when_its_operation_is_not_resumed(model: ModelNode, outcome: str) -> None:
    record_operation(model)
    operations = start_recovering_daemon(model)
    watching = asyncio.create_task(watched_views(model, ID))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not watching.done()
    if outcome == "recovered":
        model.store.journal[ID] = Versioned(record_operation(model).changed(state=OperationState.FAILED), 2)
        operations.allow_new_operations()
        assert (await watching)[-1].operation.state is OperationState.FAILED
    else:
        await operations.drain(0)
        with pytest.raises(ShuttingDown):
            await watching


async def test_operations_are_listed_in_pages_latest_first(model: ModelNode) -> None:
    await model.run_ok(Restart("a"))
    first = await model.operations.list(page_size=1, page_token="")
    second = await model.operations.list(page_size=1, page_token=first.next_token)
    assert [operation.kind for operation in (*first.items, *second.items)] == [
        OperationKind.RESTART,
        OperationKind.CREATE,
    ]


async def test_a_missing_result_is_replaced_by_the_current_record(model: ModelNode) -> None:
    await model.run_ok(volume_commands.Create("data", size_bytes=1 << 20))
    operations, over = model.operations, {"state": OperationState.SUCCEEDED, "result": None}
    assert await operations.result_of(record_operation(model, **over)) == model.container()
    assert await operations.result_of(record_operation(model, target=model.volume().target, **over)) == model.volume()
    assert await operations.result(ID) == model.volume()
    gone: list[dict[str, object]] = [
        {"kind": OperationKind.COMMIT},
        {"target": model.container().target.model_copy(update={"uid": ID})},
        {"target": model.volume().target.model_copy(update={"name": "other"})},
        {"target": model.container().target.model_copy(update={"name": "data"})},
    ]
    for changes in gone:
        with pytest.raises(OperationResultGone) as refused:
            await operations.result_of(record_operation(model, **over, **changes))
        assert refused.value.operation_id == ID


async def test_the_result_of_a_failed_operation_is_its_error(model: ModelNode) -> None:
    error = RecordedError(code=5, reason="R", message="m", metadata={"k": "v"})
    failed = record_operation(model, state=OperationState.FAILED, error=error)
    for call in (model.operations.result_of(failed), model.operations.result(ID), model.operations.done(ID)):
        with pytest.raises(OperationFailed) as raised:
            await call
        found = raised.value
        assert (found.recorded_code, found.recorded_reason, found.recorded_message) == (5, "R", "m")
        assert found.recorded_metadata == {"k": "v"}
