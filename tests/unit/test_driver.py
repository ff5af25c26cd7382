"""What an operation makes of steps and of a store that fail: tried again, undone, told, or left to another process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import SupportsIndex

import pytest
import structlog
from gpudock_server.core.operations import engine as operations
from gpudock_server.core.operations import journal
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Step
from gpudock_server.errors import (
    EngineRejected,
    EngineUnavailable,
    OperationCancelled,
    OperationFailed,
    ShuttingDown,
    StoreFull,
    StoreUnavailable,
)
from gpudock_server.model.claims import ClaimKey, GpuKey, PortKey
from gpudock_server.model.operation import OperationKind, OperationState, StageState
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.spec import Protocol
from gpudock_server.model.store_changes import Claim, ConfirmClaim, PutContainer, PutOperation, StoreChange
from gpudock_server.ports import Versioned

from tests.rig.patience import limit
from tests.unit.model_node import HOST, NODE, TIMEOUT_SECONDS, ModelNode
from tests.unit.scripted_saga import ScriptedSaga, begin_saga, do_nothing, draft_of

REFUSED = EngineRejected(call="work", status=500, detail="no")
AWAY = EngineUnavailable(call="work", detail="away")
CARD, PORT = GpuKey("GPU-7"), PortKey(Protocol.UDP, 20009)


class Pauses(list[float]):
    """Backoffs of no time, of which it is noted which ones were taken."""

    def __init__(self) -> None:
        super().__init__([0.0] * 5)
        self.taken: list[SupportsIndex | slice] = []

    def __getitem__(self, index: SupportsIndex | slice) -> float:  # type: ignore[override]  # an index past the end is the last
        self.taken.append(index)
        return 0.0


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[SupportsIndex | slice]:
    """Which pauses were made, as indices."""
    made = Pauses()
    monkeypatch.setattr(journal, "_BACKOFF_SECONDS", made)
    monkeypatch.setattr(operations, "_RESUME_POLL_SECONDS", 0.001)
    return made.taken


def failing(*errors: Exception) -> tuple[Callable[[OperationRun], Awaitable[None]], list[Exception]]:
    """A step that fails with these, one after the other; and those that are left."""
    left = list(errors)

    async def work(_: OperationRun) -> None:
        if left:
            raise left.pop(0)

    return work, left


async def test_what_a_step_logs_names_its_operation(model: ModelNode) -> None:
    seen: list[dict[str, object]] = []

    async def work(_: OperationRun) -> None:
        seen.append(structlog.contextvars.get_contextvars())

    operation_id = await begin_saga(model, ScriptedSaga(model, [Step("work", work)]))
    await model.ended_operation(operation_id)
    assert seen == [{"operation_id": operation_id, "kind": "RESTART", "target": "a"}]


async def test_a_defect_is_undone_and_told_by_an_id(model: ModelNode) -> None:
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


async def test_what_a_step_fails_with_is_recorded(model: ModelNode) -> None:
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


@pytest.mark.parametrize(("errors", "note"), [(3, ""), (4, f"step tidy failed after the commit: {REFUSED}")])
async def test_what_is_refused_past_the_point_of_no_return_is_tried_again_and_then_noted(
    model: ModelNode, pauses: list[SupportsIndex | slice], errors: int, note: str
) -> None:
    work, left = failing(*[REFUSED] * errors)
    operation = await model.ended_operation(
        await begin_saga(model, ScriptedSaga(model, [], [Step("tidy", work), Step("more", do_nothing)]))
    )
    assert operation.state is OperationState.SUCCEEDED
    assert operation.message == note
    assert not left
    assert pauses == [0, 1, 2]
    assert [stage.state for stage in operation.stages] == [StageState.DONE] * 3
    assert all(stage.end_time is not None for stage in operation.stages)


async def test_an_engine_that_is_away_past_the_point_of_no_return_is_waited_for(
    model: ModelNode, pauses: list[SupportsIndex | slice]
) -> None:
    work, left = failing(*[AWAY] * 7)
    operation = await model.ended_operation(await begin_saga(model, ScriptedSaga(model, [], [Step("tidy", work)])))
    assert operation.state is OperationState.SUCCEEDED
    assert not operation.message
    assert not left
    assert pauses == [0, 1, 2, 3, 4, 4, 4]


@pytest.mark.parametrize(
    ("errors", "note", "taken"),
    [
        ([REFUSED] * 3, "", [0, 1, 2]),
        ([REFUSED] * 4, f"undo of step first failed: {REFUSED}", [0, 1, 2]),
        ([AWAY] * 7, "", [0, 1, 2, 3, 4, 4, 4]),
    ],
)
async def test_an_undo_is_tried_again(
    model: ModelNode, pauses: list[SupportsIndex | slice], errors: list[Exception], note: str, taken: list[int]
) -> None:
    undo, left = failing(*errors)
    work, _ = failing(REFUSED)
    operation = await model.ended_operation(
        await begin_saga(model, ScriptedSaga(model, [Step("first", do_nothing, undo), Step("work", work)]))
    )
    assert operation.state is OperationState.FAILED
    assert operation.message == note
    assert not left
    assert pauses == taken


async def test_what_is_left_is_told_once_the_engine_shows_it(
    model: ModelNode, pauses: list[SupportsIndex | slice]
) -> None:
    script, (work, _) = ScriptedSaga(model, []), failing(REFUSED)
    script._steps = (Step("work", work),)
    errors = [AWAY] * 3
    abandon = script.failure_changes

    async def abandoned(*args: object) -> Sequence[StoreChange]:
        if errors:
            raise errors.pop()
        return await abandon(*args)  # type: ignore[arg-type]  # what it was given

    script.failure_changes = abandoned  # type: ignore[method-assign, assignment]
    operation = await model.ended_operation(await begin_saga(model, script))
    assert operation.state is OperationState.FAILED
    assert pauses == [0, 1, 2]


async def test_a_store_that_is_away_is_waited_for(model: ModelNode, pauses: list[SupportsIndex | slice]) -> None:
    script, store = ScriptedSaga(model, [Step("work", do_nothing)]), model.store
    store.failures.extend([None, *[StoreUnavailable("away")] * 6, None, StoreUnavailable("away"), None])
    operation_id = await begin_saga(model, script)
    waiting = asyncio.create_task(model.operations.result(operation_id))
    operation = await model.ended_operation(operation_id)
    assert operation.state is OperationState.SUCCEEDED
    assert pauses == [0, 1, 2, 3, 4, 4, 0]
    assert not store.failures
    # Unlike with one that is full, its callers wait, too.
    assert await waiting == model.container()


async def test_a_look_at_a_store_that_is_away_is_tried_again(
    model: ModelNode, pauses: list[SupportsIndex | slice]
) -> None:
    script = ScriptedSaga(model, [])
    errors = [StoreUnavailable("away")] * 3
    look = script.read_target

    async def looked(run: OperationRun) -> object:
        if errors:
            raise errors.pop()
        return await look(run)

    script.read_target = looked  # type: ignore[method-assign, assignment]
    assert (await model.ended_operation(await begin_saga(model, script))).state is OperationState.SUCCEEDED
    assert pauses == [0, 1, 2]


async def test_callers_do_not_wait_for_room_in_the_store_and_the_operation_does(model: ModelNode) -> None:
    store, room = model.store, asyncio.Event()

    def before(changes: Sequence[StoreChange]) -> None:
        if not room.is_set() and not any(isinstance(one, PutOperation) and one.expect == 0 for one in changes):
            raise StoreFull("no room")

    store.before_apply = before
    operation_id = await begin_saga(model, ScriptedSaga(model, [Step("work", do_nothing)]))
    with pytest.raises(StoreFull) as full:
        await model.operations.result(operation_id)
    assert full.value.metadata == {"detail": "no room", "operation_id": operation_id}
    assert full.value.message.endswith(
        f"no room; operation {operation_id} waits at its last recorded step and continues when there is space"
    )
    room.set()
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        await model.operations.wait_until_ended([operation_id])
    assert await model.operations.result(operation_id) == model.container()


async def test_whose_record_another_process_writes_is_left_to_it(model: ModelNode) -> None:
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


async def test_whose_target_is_gone_is_left(model: ModelNode) -> None:
    async def work(_: OperationRun) -> None:
        model.store.container_records.clear()

    operation = await model.ended_operation(await begin_saga(model, ScriptedSaga(model, [Step("work", work)])))
    assert (operation.state, operation.committed) == (OperationState.RUNNING, False)


async def test_a_head_that_moved_meanwhile_is_read_again(model: ModelNode) -> None:
    store, times = model.store, 3

    def move(changes: Sequence[StoreChange]) -> None:
        nonlocal times
        if times and any(isinstance(one, PutOperation) and one.operation.committed for one in changes):
            times -= 1
            model.store.put(model.container().changed(owner=f"owner {times}"))

    store.before_apply = move
    before = model.container().generation
    assert (
        await model.ended_operation(await begin_saga(model, ScriptedSaga(model, [])))
    ).state is OperationState.SUCCEEDED
    assert (model.container().owner, model.container().generation) == ("owner 0", before + 1)


async def test_a_head_that_keeps_moving_is_a_store_that_cannot_be_used(model: ModelNode) -> None:
    tries = 0

    def move(changes: Sequence[StoreChange]) -> None:
        nonlocal tries
        if any(isinstance(one, PutOperation) and one.operation.committed for one in changes):
            tries += 1
            model.store.put(model.container())

    model.store.before_apply = move
    operation = await model.ended_operation(await begin_saga(model, ScriptedSaga(model, [])))
    assert operation.error is not None
    assert operation.error.reason == "STORE_UNAVAILABLE"
    assert operation.error.metadata == {"detail": "the record of a was changed 64 times during one write"}
    assert tries == 64


async def test_a_lock_that_somebody_took_away_does_not_stop_the_end(model: ModelNode) -> None:
    async def work(_: OperationRun) -> None:
        model.store.locks[ResourceKind.CONTAINER, "a"] = "somebody"

    operation = await model.ended_operation(await begin_saga(model, ScriptedSaga(model, [Step("work", work)])))
    assert operation.state is OperationState.SUCCEEDED
    assert model.store.locks == {(ResourceKind.CONTAINER, "a"): "somebody"}


async def claimed(model: ModelNode, key: ClaimKey, meanwhile: Callable[[], None]) -> str:
    """Begin an operation that claims `key`, during which `meanwhile` happens; its id."""
    holder = model.core.claims.holder(model.container())

    async def work(run: OperationRun) -> None:
        assert model.store.holders[HOST][key] == holder.model_copy(update={"operation_id": run.operation.id})
        meanwhile()

    script = ScriptedSaga(model, [Step("work", work)])
    script.changes = lambda _: [ConfirmClaim(HOST, key, holder)]
    return await begin_saga(model, script, claims=[Claim(HOST, key, holder)])


async def test_a_claim_that_vanished_is_taken_again(model: ModelNode) -> None:
    operation = await model.ended_operation(await claimed(model, CARD, model.store.holders[HOST].clear))
    assert operation.state is OperationState.SUCCEEDED
    assert model.store.holders[HOST][CARD] == model.core.claims.holder(model.container())


@pytest.mark.parametrize(
    ("key", "reason", "metadata"),
    [
        (CARD, "GPU_BUSY", {"uuid": "GPU-7", "container": "thief"}),
        (PORT, "PORT_IN_USE", {"host_port": "20009", "protocol": "udp", "holder": "thief"}),
    ],
)
async def test_a_claim_that_another_has_by_now_is_lost(
    model: ModelNode, key: ClaimKey, reason: str, metadata: dict[str, str]
) -> None:
    thief = model.core.claims.holder(model.container()).model_copy(update={"container": "thief", "uid": "thief"})
    operation = await model.ended_operation(
        await claimed(model, key, lambda: model.store.holders[HOST].update({key: thief}))
    )
    assert operation.error is not None
    assert (operation.error.reason, operation.error.metadata) == (reason, metadata)
    assert model.store.holders[HOST][key] == thief


async def left_and_taken_up(
    model: ModelNode, operation_id: str, script: ScriptedSaga, *, at_work: asyncio.Event
) -> None:
    """Have this process left once it is `at_work`, and another one do the rest."""
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        await at_work.wait()
        await model.operations.drain(0)
        sagas = {OperationKind.RESTART: lambda _: script}
        model.operations = operations.Operations(model.store, NODE, [model.core.container_resource], sagas)
        assert await model.operations.resume() == (operation_id,)
        await model.operations.wait_until_ended([operation_id])


async def test_whoever_takes_up_an_undo_does_no_step_again(model: ModelNode) -> None:
    at_work, done = asyncio.Event(), list[str]()

    async def first(_: OperationRun) -> None:
        done.append("first")

    async def undo(_: OperationRun) -> None:
        done.append("undo")
        if not at_work.is_set():
            at_work.set()
            await asyncio.Event().wait()

    script = ScriptedSaga(model, [Step("first", first, undo), Step("work", failing(REFUSED)[0])])
    operation_id = await begin_saga(model, script)
    await left_and_taken_up(model, operation_id, script, at_work=at_work)
    assert done == ["first", "undo", "undo"]
    assert model.store.journal[operation_id].value.state is OperationState.FAILED


async def test_whoever_takes_up_what_is_committed_does_not_commit_it_again(model: ModelNode) -> None:
    at_work, before = asyncio.Event(), model.container().generation

    async def tidy(_: OperationRun) -> None:
        if not at_work.is_set():
            at_work.set()
            await asyncio.Event().wait()

    script = ScriptedSaga(model, [Step("work", do_nothing)], [Step("tidy", tidy)])
    operation_id = await begin_saga(model, script)
    await left_and_taken_up(model, operation_id, script, at_work=at_work)
    assert model.store.journal[operation_id].value.state is OperationState.SUCCEEDED
    assert model.container().generation == before + 1


async def test_notes_are_kept_with_the_record(model: ModelNode) -> None:
    async def work(run: OperationRun) -> None:
        run.add_message("one")
        run.add_message("two")

    operation = await model.ended_operation(
        await begin_saga(model, ScriptedSaga(model, [Step("work", work), Step("more", do_nothing)]))
    )
    assert operation.message == "one; two"


# -- parts -----------------------------------------------------------------------------------------------------------


async def whole_of(model: ModelNode, part: ScriptedSaga) -> ScriptedSaga:
    """An operation on container `b` with a part, which is one on `a`."""
    await model.create_container(
        "b", model.container().spec.changed(ports=(), gpus=model.container().spec.gpus.model_copy(update={"count": 0}))
    )

    async def work(run: OperationRun) -> None:
        await run.run_child("it", lambda: draft_of(model, lambda _: part))

    return ScriptedSaga(model, [Step("work", work)])


async def begin_saga_on_b(model: ModelNode, script: ScriptedSaga) -> str:
    """Begin it on container `b`; its id."""
    head = model.store.container_records["b"]
    put = PutContainer(head.value, expect=head.version)
    on_b = replace(await draft_of(model, lambda _: script), target=head.value.target, target_record=put)

    async def drafted() -> OperationDraft:
        return on_b

    return await model.operations.begin(drafted, None)


async def test_a_part_is_an_operation_that_is_waited_for(model: ModelNode) -> None:
    whole = await whole_of(model, ScriptedSaga(model, [Step("its own", do_nothing)]))
    operation = await model.ended_operation(await begin_saga_on_b(model, whole))
    assert operation.state is OperationState.SUCCEEDED
    (part,) = [one.value for one in model.store.journal.values() if one.value.request_id]
    assert part.state is OperationState.SUCCEEDED
    assert part.target.name == "a"


async def test_a_whole_fails_with_what_its_part_failed_with(model: ModelNode) -> None:
    work, _ = failing(REFUSED)
    operation = await model.ended_operation(
        await begin_saga_on_b(model, await whole_of(model, ScriptedSaga(model, [Step("its own", work)])))
    )
    assert operation.error is not None
    assert operation.error.metadata == REFUSED.metadata


async def test_whoever_waits_for_a_whole_is_told_that_its_part_waits_for_room(model: ModelNode) -> None:
    whole = await whole_of(model, ScriptedSaga(model, [Step("its own", do_nothing)]))
    room = asyncio.Event()

    def before(changes: Sequence[StoreChange]) -> None:
        for one in changes:
            if isinstance(one, PutOperation) and one.expect and one.operation.target.name == "a" and not room.is_set():
                raise StoreFull("no room")

    model.store.before_apply = before
    operation_id = await begin_saga_on_b(model, whole)
    with pytest.raises(StoreFull):
        await model.operations.result(operation_id)
    room.set()
    assert (await model.ended_operation(operation_id)).state is OperationState.SUCCEEDED
    assert await model.operations.result(operation_id) == model.container("b")


async def test_parts_of_one_whole_are_different_operations(model: ModelNode) -> None:
    whole = await whole_of(model, ScriptedSaga(model, []))
    (step,) = whole.steps

    async def both(run: OperationRun) -> None:
        await step.do(run)
        await run.run_child("other", lambda: draft_of(model, lambda _: ScriptedSaga(model, [])))

    whole._steps = (Step("work", both),)
    assert (await model.ended_operation(await begin_saga_on_b(model, whole))).state is OperationState.SUCCEEDED
    assert len([one for one in model.store.journal.values() if one.value.request_id]) == 2


async def test_a_whole_whose_part_waited_for_room_is_waited_for_again(model: ModelNode) -> None:
    whole, over, gate = await whole_of(model, ScriptedSaga(model, [])), asyncio.Event(), asyncio.Event()
    (step,) = whole.steps

    async def and_more(run: OperationRun) -> None:
        await step.do(run)
        over.set()
        await gate.wait()

    whole._steps = (Step("work", and_more),)

    def waits() -> bool:
        return any(one.record.target.name == "b" and one.blocked for one in model.operations._running.values())

    def before(changes: Sequence[StoreChange]) -> None:
        for one in changes:
            ends = isinstance(one, PutOperation) and one.expect and one.operation.target.name == "a"
            if ends and not waits():
                raise StoreFull("no room")

    model.store.before_apply = before
    operation_id = await begin_saga_on_b(model, whole)
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        await over.wait()
    # The part's last record is the one that had to wait.
    assert not waits()
    waiting = asyncio.create_task(model.operations.result(operation_id))
    await asyncio.sleep(0)
    gate.set()
    assert await waiting == model.container("b")


async def test_a_part_that_begins_when_the_process_is_to_stop_is_left_with_its_whole(model: ModelNode) -> None:
    part = ScriptedSaga(model, [])
    script = await whole_of(model, part)
    (step,) = script.steps
    gate = asyncio.Event()

    async def late(run: OperationRun) -> None:
        await gate.wait()
        await step.do(run)

    script._steps = (Step("work", late),)
    operation_id = await begin_saga_on_b(model, script)
    draining = asyncio.create_task(model.operations.drain(TIMEOUT_SECONDS))
    await asyncio.sleep(0)
    gate.set()
    await draining
    assert model.store.journal[operation_id].value.state is OperationState.RUNNING
    with pytest.raises(ShuttingDown):
        await model.operations.result(operation_id)


async def test_a_cancel_between_two_steps_is_seen_before_the_next(model: ModelNode) -> None:
    ids: list[str] = []

    async def work(_: OperationRun) -> None:
        # The step itself does not notice.
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
