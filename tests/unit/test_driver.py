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

from tests.unit.desk import HOST, LONG, NODE, Desk
from tests.unit.scripted import Script, UnsteadyStore, begun, draft_of, nothing

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


@pytest.fixture
async def desk() -> Desk:
    """A node with container `a`."""
    made = Desk(store=UnsteadyStore())
    await made.made()
    return made


def store_of(desk: Desk) -> UnsteadyStore:
    assert isinstance(desk.store, UnsteadyStore)
    return desk.store


def failing(*errors: Exception) -> tuple[Callable[[OperationRun], Awaitable[None]], list[Exception]]:
    """A step that fails with these, one after the other; and those that are left."""
    left = list(errors)

    async def work(_: OperationRun) -> None:
        if left:
            raise left.pop(0)

    return work, left


async def test_what_a_step_logs_names_its_operation(desk: Desk) -> None:
    seen: list[dict[str, object]] = []

    async def work(_: OperationRun) -> None:
        seen.append(structlog.contextvars.get_contextvars())

    operation_id = await begun(desk, Script(desk, [Step("work", work)]))
    await desk.ended(operation_id)
    assert seen == [{"operation_id": operation_id, "kind": "RESTART", "target": "a"}]


async def test_a_defect_is_undone_and_told_by_an_id(desk: Desk) -> None:
    undone: list[str] = []

    async def undo(_: OperationRun) -> None:
        undone.append("work")

    work, _ = failing(AssertionError("a secret"))
    before = desk.head()
    operation = await desk.ended(
        await begun(
            desk, Script(desk, [Step("first", nothing, undo), Step("work", work, undo), Step("last", work, undo)])
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
    assert desk.head() == before


async def test_what_a_step_fails_with_is_recorded(desk: Desk) -> None:
    work, _ = failing(REFUSED)
    operation = await desk.ended(await begun(desk, Script(desk, [Step("work", work)])))
    assert operation.error is not None
    assert operation.error.code == REFUSED.code
    assert operation.error.reason == "ENGINE_REJECTED"
    assert operation.error.message == REFUSED.message
    assert operation.error.metadata == REFUSED.metadata
    recorded = OperationFailed(recorded_code=7, recorded_reason="R", recorded_message="m", recorded_metadata={"k": "v"})
    work, _ = failing(recorded)
    operation = await desk.ended(await begun(desk, Script(desk, [Step("work", work)])))
    assert operation.error is not None
    assert (operation.error.code, operation.error.reason, operation.error.message) == (7, "R", "m")
    assert operation.error.metadata == {"k": "v"}


@pytest.mark.parametrize(("errors", "note"), [(3, ""), (4, f"step tidy failed after the commit: {REFUSED}")])
async def test_what_is_refused_past_the_point_of_no_return_is_tried_again_and_then_noted(
    desk: Desk, pauses: list[SupportsIndex | slice], errors: int, note: str
) -> None:
    work, left = failing(*[REFUSED] * errors)
    operation = await desk.ended(await begun(desk, Script(desk, [], [Step("tidy", work), Step("more", nothing)])))
    assert operation.state is OperationState.SUCCEEDED
    assert operation.message == note
    assert not left
    assert pauses == [0, 1, 2]
    assert [stage.state for stage in operation.stages] == [StageState.DONE] * 3
    assert all(stage.end_time is not None for stage in operation.stages)


async def test_an_engine_that_is_away_past_the_point_of_no_return_is_waited_for(
    desk: Desk, pauses: list[SupportsIndex | slice]
) -> None:
    work, left = failing(*[AWAY] * 7)
    operation = await desk.ended(await begun(desk, Script(desk, [], [Step("tidy", work)])))
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
    desk: Desk, pauses: list[SupportsIndex | slice], errors: list[Exception], note: str, taken: list[int]
) -> None:
    undo, left = failing(*errors)
    work, _ = failing(REFUSED)
    operation = await desk.ended(await begun(desk, Script(desk, [Step("first", nothing, undo), Step("work", work)])))
    assert operation.state is OperationState.FAILED
    assert operation.message == note
    assert not left
    assert pauses == taken


async def test_what_is_left_is_told_once_the_engine_shows_it(desk: Desk, pauses: list[SupportsIndex | slice]) -> None:
    script, (work, _) = Script(desk, []), failing(REFUSED)
    script._steps = (Step("work", work),)
    errors = [AWAY] * 3
    abandon = script.failure_changes

    async def abandoned(*args: object) -> Sequence[StoreChange]:
        if errors:
            raise errors.pop()
        return await abandon(*args)  # type: ignore[arg-type]  # what it was given

    script.failure_changes = abandoned  # type: ignore[method-assign, assignment]
    operation = await desk.ended(await begun(desk, script))
    assert operation.state is OperationState.FAILED
    assert pauses == [0, 1, 2]


async def test_a_store_that_is_away_is_waited_for(desk: Desk, pauses: list[SupportsIndex | slice]) -> None:
    script, store = Script(desk, [Step("work", nothing)]), store_of(desk)
    store.failures.extend([None, *[StoreUnavailable("away")] * 6, None, StoreUnavailable("away"), None])
    operation_id = await begun(desk, script)
    waiting = asyncio.create_task(desk.operations.result(operation_id))
    operation = await desk.ended(operation_id)
    assert operation.state is OperationState.SUCCEEDED
    assert pauses == [0, 1, 2, 3, 4, 4, 0]
    assert not store.failures
    # Unlike with one that is full, its callers wait, too.
    assert await waiting == desk.head()


async def test_a_look_at_a_store_that_is_away_is_tried_again(desk: Desk, pauses: list[SupportsIndex | slice]) -> None:
    script = Script(desk, [])
    errors = [StoreUnavailable("away")] * 3
    look = script.read_target

    async def looked(run: OperationRun) -> object:
        if errors:
            raise errors.pop()
        return await look(run)

    script.read_target = looked  # type: ignore[method-assign, assignment]
    assert (await desk.ended(await begun(desk, script))).state is OperationState.SUCCEEDED
    assert pauses == [0, 1, 2]


async def test_callers_do_not_wait_for_room_in_the_store_and_the_operation_does(desk: Desk) -> None:
    store, room = store_of(desk), asyncio.Event()

    def before(changes: Sequence[StoreChange]) -> None:
        if not room.is_set() and not any(isinstance(one, PutOperation) and one.expect == 0 for one in changes):
            raise StoreFull("no room")

    store.before = before
    operation_id = await begun(desk, Script(desk, [Step("work", nothing)]))
    with pytest.raises(StoreFull) as full:
        await desk.operations.result(operation_id)
    assert full.value.metadata == {"detail": "no room", "operation_id": operation_id}
    assert full.value.message.endswith(
        f"no room; operation {operation_id} waits at its last recorded step and continues when there is space"
    )
    room.set()
    async with asyncio.timeout(LONG):
        await desk.operations.wait_until_ended([operation_id])
    assert await desk.operations.result(operation_id) == desk.head()


async def test_whose_record_another_process_writes_is_left_to_it(desk: Desk) -> None:
    async def work(run: OperationRun) -> None:
        stored = desk.store.journal[run.operation.id]
        desk.store.journal[run.operation.id] = Versioned(stored.value, stored.version + 100)

    operation_id = await begun(desk, Script(desk, [Step("work", work), Step("never", failing(AssertionError())[0])]))
    operation = await desk.ended(operation_id)
    assert operation.state is OperationState.RUNNING
    assert [stage.state for stage in operation.stages] == [StageState.PENDING] * 3
    assert not desk.operations.active


async def test_whose_target_is_gone_is_left(desk: Desk) -> None:
    async def work(_: OperationRun) -> None:
        desk.store.heads.clear()

    operation = await desk.ended(await begun(desk, Script(desk, [Step("work", work)])))
    assert (operation.state, operation.committed) == (OperationState.RUNNING, False)


async def test_a_head_that_moved_meanwhile_is_read_again(desk: Desk) -> None:
    store, times = store_of(desk), 3

    def move(changes: Sequence[StoreChange]) -> None:
        nonlocal times
        if times and any(isinstance(one, PutOperation) and one.operation.committed for one in changes):
            times -= 1
            desk.store.put(desk.head().changed(owner=f"owner {times}"))

    store.before = move
    before = desk.head().generation
    assert (await desk.ended(await begun(desk, Script(desk, [])))).state is OperationState.SUCCEEDED
    assert (desk.head().owner, desk.head().generation) == ("owner 0", before + 1)


async def test_a_head_that_keeps_moving_is_a_store_that_cannot_be_used(desk: Desk) -> None:
    tries = 0

    def move(changes: Sequence[StoreChange]) -> None:
        nonlocal tries
        if any(isinstance(one, PutOperation) and one.operation.committed for one in changes):
            tries += 1
            desk.store.put(desk.head())

    store_of(desk).before = move
    operation = await desk.ended(await begun(desk, Script(desk, [])))
    assert operation.error is not None
    assert operation.error.reason == "STORE_UNAVAILABLE"
    assert operation.error.metadata == {"detail": "the record of a was changed 64 times during one write"}
    assert tries == 64


async def test_a_lock_that_somebody_took_away_does_not_stop_the_end(desk: Desk) -> None:
    async def work(_: OperationRun) -> None:
        desk.store.locks[ResourceKind.CONTAINER, "a"] = "somebody"

    operation = await desk.ended(await begun(desk, Script(desk, [Step("work", work)])))
    assert operation.state is OperationState.SUCCEEDED
    assert desk.store.locks == {(ResourceKind.CONTAINER, "a"): "somebody"}


async def claimed(desk: Desk, key: ClaimKey, meanwhile: Callable[[], None]) -> str:
    """Begin an operation that claims `key`, during which `meanwhile` happens; its id."""
    holder = desk.core.claims.holder(desk.head())

    async def work(run: OperationRun) -> None:
        assert desk.store.held[HOST][key] == holder.model_copy(update={"operation_id": run.operation.id})
        meanwhile()

    script = Script(desk, [Step("work", work)])
    script.changes = lambda _: [ConfirmClaim(HOST, key, holder)]
    return await begun(desk, script, claims=[Claim(HOST, key, holder)])


async def test_a_claim_that_vanished_is_taken_again(desk: Desk) -> None:
    operation = await desk.ended(await claimed(desk, CARD, desk.store.held[HOST].clear))
    assert operation.state is OperationState.SUCCEEDED
    assert desk.store.held[HOST][CARD] == desk.core.claims.holder(desk.head())


@pytest.mark.parametrize(
    ("key", "reason", "metadata"),
    [
        (CARD, "GPU_BUSY", {"uuid": "GPU-7", "container": "thief"}),
        (PORT, "PORT_IN_USE", {"host_port": "20009", "protocol": "udp", "holder": "thief"}),
    ],
)
async def test_a_claim_that_another_has_by_now_is_lost(
    desk: Desk, key: ClaimKey, reason: str, metadata: dict[str, str]
) -> None:
    thief = desk.core.claims.holder(desk.head()).model_copy(update={"container": "thief", "uid": "thief"})
    operation = await desk.ended(await claimed(desk, key, lambda: desk.store.held[HOST].update({key: thief})))
    assert operation.error is not None
    assert (operation.error.reason, operation.error.metadata) == (reason, metadata)
    assert desk.store.held[HOST][key] == thief


async def left_and_taken_up(desk: Desk, operation_id: str, script: Script, *, at_work: asyncio.Event) -> None:
    """Have this process left once it is `at_work`, and another one do the rest."""
    async with asyncio.timeout(LONG):
        await at_work.wait()
        await desk.operations.drain(0)
        sagas = {OperationKind.RESTART: lambda _: script}
        desk.operations = operations.Operations(desk.store, NODE, [desk.core.container_resource], sagas)
        assert await desk.operations.resume() == (operation_id,)
        await desk.operations.wait_until_ended([operation_id])


async def test_whoever_takes_up_an_undo_does_no_step_again(desk: Desk) -> None:
    at_work, done = asyncio.Event(), list[str]()

    async def first(_: OperationRun) -> None:
        done.append("first")

    async def undo(_: OperationRun) -> None:
        done.append("undo")
        if not at_work.is_set():
            at_work.set()
            await asyncio.Event().wait()

    script = Script(desk, [Step("first", first, undo), Step("work", failing(REFUSED)[0])])
    operation_id = await begun(desk, script)
    await left_and_taken_up(desk, operation_id, script, at_work=at_work)
    assert done == ["first", "undo", "undo"]
    assert desk.store.journal[operation_id].value.state is OperationState.FAILED


async def test_whoever_takes_up_what_is_committed_does_not_commit_it_again(desk: Desk) -> None:
    at_work, before = asyncio.Event(), desk.head().generation

    async def tidy(_: OperationRun) -> None:
        if not at_work.is_set():
            at_work.set()
            await asyncio.Event().wait()

    script = Script(desk, [Step("work", nothing)], [Step("tidy", tidy)])
    operation_id = await begun(desk, script)
    await left_and_taken_up(desk, operation_id, script, at_work=at_work)
    assert desk.store.journal[operation_id].value.state is OperationState.SUCCEEDED
    assert desk.head().generation == before + 1


async def test_notes_are_kept_with_the_record(desk: Desk) -> None:
    async def work(run: OperationRun) -> None:
        run.add_message("one")
        run.add_message("two")

    operation = await desk.ended(await begun(desk, Script(desk, [Step("work", work), Step("more", nothing)])))
    assert operation.message == "one; two"


# -- parts -----------------------------------------------------------------------------------------------------------


async def whole_of(desk: Desk, part: Script) -> Script:
    """An operation on container `b` with a part, which is one on `a`."""
    await desk.made("b", desk.head().spec.changed(ports=(), gpus=desk.head().spec.gpus.model_copy(update={"count": 0})))

    async def work(run: OperationRun) -> None:
        await run.run_child("it", lambda: draft_of(desk, lambda _: part))

    return Script(desk, [Step("work", work)])


async def begun_on_b(desk: Desk, script: Script) -> str:
    """Begin it on container `b`; its id."""
    head = desk.store.heads["b"]
    put = PutContainer(head.value, expect=head.version)
    on_b = replace(await draft_of(desk, lambda _: script), target=head.value.target, target_record=put)

    async def drafted() -> OperationDraft:
        return on_b

    return await desk.operations.begin(drafted, None)


async def test_a_part_is_an_operation_that_is_waited_for(desk: Desk) -> None:
    whole = await whole_of(desk, Script(desk, [Step("its own", nothing)]))
    operation = await desk.ended(await begun_on_b(desk, whole))
    assert operation.state is OperationState.SUCCEEDED
    (part,) = [one.value for one in desk.store.journal.values() if one.value.request_id]
    assert part.state is OperationState.SUCCEEDED
    assert part.target.name == "a"


async def test_a_whole_fails_with_what_its_part_failed_with(desk: Desk) -> None:
    work, _ = failing(REFUSED)
    operation = await desk.ended(await begun_on_b(desk, await whole_of(desk, Script(desk, [Step("its own", work)]))))
    assert operation.error is not None
    assert operation.error.metadata == REFUSED.metadata


async def test_whoever_waits_for_a_whole_is_told_that_its_part_waits_for_room(desk: Desk) -> None:
    whole = await whole_of(desk, Script(desk, [Step("its own", nothing)]))
    room = asyncio.Event()

    def before(changes: Sequence[StoreChange]) -> None:
        for one in changes:
            if isinstance(one, PutOperation) and one.expect and one.operation.target.name == "a" and not room.is_set():
                raise StoreFull("no room")

    store_of(desk).before = before
    operation_id = await begun_on_b(desk, whole)
    with pytest.raises(StoreFull):
        await desk.operations.result(operation_id)
    room.set()
    assert (await desk.ended(operation_id)).state is OperationState.SUCCEEDED
    assert await desk.operations.result(operation_id) == desk.head("b")


async def test_parts_of_one_whole_are_different_operations(desk: Desk) -> None:
    whole = await whole_of(desk, Script(desk, []))
    (step,) = whole.steps

    async def both(run: OperationRun) -> None:
        await step.do(run)
        await run.run_child("other", lambda: draft_of(desk, lambda _: Script(desk, [])))

    whole._steps = (Step("work", both),)
    assert (await desk.ended(await begun_on_b(desk, whole))).state is OperationState.SUCCEEDED
    assert len([one for one in desk.store.journal.values() if one.value.request_id]) == 2


async def test_a_whole_whose_part_waited_for_room_is_waited_for_again(desk: Desk) -> None:
    whole, over, gate = await whole_of(desk, Script(desk, [])), asyncio.Event(), asyncio.Event()
    (step,) = whole.steps

    async def and_more(run: OperationRun) -> None:
        await step.do(run)
        over.set()
        await gate.wait()

    whole._steps = (Step("work", and_more),)

    def waits() -> bool:
        return any(one.record.target.name == "b" and one.blocked for one in desk.operations._running.values())

    def before(changes: Sequence[StoreChange]) -> None:
        for one in changes:
            ends = isinstance(one, PutOperation) and one.expect and one.operation.target.name == "a"
            if ends and not waits():
                raise StoreFull("no room")

    store_of(desk).before = before
    operation_id = await begun_on_b(desk, whole)
    async with asyncio.timeout(LONG):
        await over.wait()
    # The part's last record is the one that had to wait.
    assert not waits()
    waiting = asyncio.create_task(desk.operations.result(operation_id))
    await asyncio.sleep(0)
    gate.set()
    assert await waiting == desk.head("b")


async def test_a_part_that_begins_when_the_process_is_to_stop_is_left_with_its_whole(desk: Desk) -> None:
    part = Script(desk, [])
    script = await whole_of(desk, part)
    (step,) = script.steps
    gate = asyncio.Event()

    async def late(run: OperationRun) -> None:
        await gate.wait()
        await step.do(run)

    script._steps = (Step("work", late),)
    operation_id = await begun_on_b(desk, script)
    draining = asyncio.create_task(desk.operations.drain(LONG))
    await asyncio.sleep(0)
    gate.set()
    await draining
    assert desk.store.journal[operation_id].value.state is OperationState.RUNNING
    with pytest.raises(ShuttingDown):
        await desk.operations.result(operation_id)


async def test_a_cancel_between_two_steps_is_seen_before_the_next(desk: Desk) -> None:
    ids: list[str] = []

    async def work(_: OperationRun) -> None:
        # The step itself does not notice.
        running = desk.operations._running[ids[0]]
        running.cancel_requested = True

    operation_id = await begun(desk, Script(desk, [Step("work", work), Step("never", failing(AssertionError())[0])]))
    ids.append(operation_id)
    operation = await desk.ended(operation_id)
    assert operation.state is OperationState.CANCELLED
    assert operation.error is not None
    assert operation.error.reason == OperationCancelled.reason
    assert operation.error.metadata == {"operation_id": operation_id}
    assert operation.stages[1].state is StageState.PENDING
