"""What begins, and what does not; what is seen of an operation, cancelled, taken up and left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from gpudock_server.core.containers.commands import Create, Restart, Stop
from gpudock_server.core.operations import active_operation as running_module
from gpudock_server.core.operations import engine as operations_module
from gpudock_server.core.operations.active_operation import OperationView
from gpudock_server.core.operations.engine import Operations, RequestKey
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Step
from gpudock_server.core.volumes import commands as volume_commands
from gpudock_server.errors import (
    ContainerBusy,
    ContainerExists,
    GpudockError,
    OperationFailed,
    OperationNotCancellable,
    OperationNotFound,
    OperationResultGone,
    Recovering,
    RequestIdReused,
    ShuttingDown,
    StoreFull,
    StoreUnavailable,
    VolumeBusy,
    VolumeExists,
    VolumeOnOtherNode,
    WrongNode,
)
from gpudock_server.model.operation import (
    Operation,
    OperationKind,
    OperationState,
    RecordedError,
    RequestRecord,
    Stage,
    StageState,
)
from gpudock_server.model.resource import ResourceKind, ResourceRef
from gpudock_server.model.store_changes import PutRequest, RequireUnlocked, StoreChange
from gpudock_server.ports import Versioned

from tests.rig.patience import limit
from tests.rpc.fakes import LONG_AGO
from tests.unit.failing_store import node_record
from tests.unit.model_node import NODE, SPEC, TIMEOUT_SECONDS, ModelNode
from tests.unit.scripted_saga import ScriptedSaga, UncancellableSaga, begin_saga, do_nothing, draft_of

ID = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"


def recovering(model: ModelNode) -> Operations:
    """A process that has just begun."""
    model.start_daemon(recovering=True)
    return model.operations


def record(model: ModelNode, **changes: object) -> Operation:
    """An operation on container `a` that no process drives."""
    operation = Operation(
        id=ID,
        kind=OperationKind.STOP,
        target=model.container().target,
        node=NODE,
        state=OperationState.RUNNING,
        create_time=LONG_AGO,
        update_time=LONG_AGO,
    ).changed(**changes)
    model.store.journal[operation.id] = Versioned(operation, 1)
    # By which a daemon finds it.
    model.store.locks[ResourceKind.CONTAINER, f"locked by {operation.id}"] = operation.id
    return operation


# -- beginning -------------------------------------------------------------------------------------------------------


async def test_what_another_operation_has_locked_names_that_operation(model: ModelNode) -> None:
    draft = await model.containers.draft(Stop("a"))

    async def drafted() -> OperationDraft:
        return draft

    model.store.locks[ResourceKind.CONTAINER, "a"] = "other"
    with pytest.raises(ContainerBusy) as busy:
        await model.operations.begin(drafted, None)
    assert busy.value.metadata == {"container": "a", "operation_id": "other"}
    assert not model.operations.driven


async def test_what_another_operation_does_to_a_volume_names_that_operation(model: ModelNode) -> None:
    await model.run_ok(volume_commands.Create("data", size_bytes=1 << 20))
    resize = volume_commands.Resize("data", 2 << 20)
    draft = await model.volumes.draft(resize)
    create = await draft_of(model, lambda _: ScriptedSaga(model, ()))
    conditioned = OperationDraft(
        kind=create.kind,
        target=create.target,
        target_record=create.target_record,
        arguments={},
        plan=create.plan,
        build=create.build,
        conditions=[RequireUnlocked(ResourceKind.VOLUME, "data")],
    )
    model.store.locks[ResourceKind.VOLUME, "data"] = "other"
    for one in (draft, conditioned):

        async def drafted(one: OperationDraft = one) -> OperationDraft:
            return one

        with pytest.raises(VolumeBusy) as busy:
            await model.operations.begin(drafted, None)
        assert busy.value.metadata == {"volume": "data", "operation_id": "other"}


async def test_of_two_that_make_one_name_one_is_told_so(model: ModelNode) -> None:
    both = await asyncio.gather(*(model.begin(Create("b", SPEC)) for _ in range(2)), return_exceptions=True)
    (refused,) = [one for one in both if isinstance(one, ContainerExists)]
    assert refused.container == "b"
    drafts = [await model.containers.draft(Create("c", SPEC)) for _ in range(2)]
    command = volume_commands.Create("data", size_bytes=1 << 20)
    drafts += [await model.volumes.draft(command) for _ in range(2)]

    async def drafted() -> OperationDraft:
        return drafts.pop()

    await model.operations.begin(drafted, None)
    with pytest.raises(VolumeExists) as exists:
        await model.operations.begin(drafted, None)
    assert exists.value.volume == "data"
    await model.operations.begin(drafted, None)
    # `drafted` returns the same draft again: a new one would fail by itself.
    with pytest.raises(ContainerExists) as there:
        await model.operations.begin(drafted, None)
    assert there.value.container == "c"


async def test_a_draft_that_is_out_of_date_is_made_anew_but_not_for_ever(model: ModelNode) -> None:
    tries = 0
    stale = await draft_of(model, lambda _: ScriptedSaga(model, ()))
    model.store.put(model.container())

    async def drafted() -> OperationDraft:
        nonlocal tries
        tries += 1
        return stale if tries < 64 else await draft_of(model, lambda _: ScriptedSaga(model, ()))

    await model.ended_operation(await model.operations.begin(drafted, None))
    assert tries == 64
    tries = -10
    with pytest.raises(StoreUnavailable) as refused:
        await model.operations.begin(drafted, None)
    assert refused.value.detail == "lost 64 races against other calls"
    assert tries == 54


async def test_a_call_that_is_made_again_is_the_same_operation(model: ModelNode) -> None:
    written: list[StoreChange] = []
    model.store.before_apply = written.extend
    first = await model.begin(Restart("a"), RequestKey(ID, "digest"))
    assert await model.begin(Restart("a"), RequestKey(ID, "digest")) == first
    with pytest.raises(RequestIdReused) as reused:
        await model.begin(Stop("a"), RequestKey(ID, "other"))
    assert reused.value.request_id == ID
    operation = await model.ended_operation(first)
    assert (operation.request_id, operation.request_digest) == (ID, "digest")
    # From its end on the id is kept for a time only.
    known = RequestRecord(operation_id=first, digest="digest")
    assert [one for one in written if isinstance(one, PutRequest)] == [
        PutRequest(ID, known),
        PutRequest(ID, known, ended=True),
    ]
    assert await model.begin(Restart("a"), RequestKey(ID, "digest")) == first


async def test_a_call_that_fails_because_it_has_just_been_done_is_that_operation(model: ModelNode) -> None:
    done = await model.begin(Restart("a"), RequestKey(ID, "digest"))
    known = model.store.request_records.pop(ID)

    async def drafted() -> OperationDraft:
        model.store.request_records[ID] = known
        raise ContainerBusy(container="a", operation_id=done)

    assert await model.operations.begin(drafted, RequestKey(ID, "digest")) == done
    await model.ended_operation(done)


async def test_nothing_begins_before_the_recovery_is_over_but_what_is_part_of_it(model: ModelNode) -> None:
    operations = recovering(model)

    async def begin(*, during_recovery: bool = False) -> str:
        return await operations.begin(
            lambda: draft_of(model, lambda _: ScriptedSaga(model, ())), None, during_recovery=during_recovery
        )

    with pytest.raises(Recovering):
        await begin()
    operations.set_recovery_blocked(StoreFull("no room"))
    with pytest.raises(StoreFull) as full:
        await begin()
    assert full.value.detail == "no room"
    operations.set_recovery_blocked(None)
    with pytest.raises(Recovering):
        await begin()
    await model.ended_operation(await begin(during_recovery=True))
    operations.allow_new_operations()
    await model.ended_operation(await begin())


async def test_what_is_about_to_begin_is_driven_already(model: ModelNode) -> None:
    seen: list[frozenset[str]] = []
    model.store.before_apply = lambda _: seen.append(model.operations.driven)
    operation_id = await model.begin(Restart("a"))
    # What looks for operations that nobody drives may find it in the store before it has a task.
    assert seen[0] == {operation_id}
    await model.ended_operation(operation_id)
    assert not model.operations.driven
    assert not model.operations._running, "what has ended is not kept in memory"


async def test_nothing_begins_when_the_process_is_to_stop(model: ModelNode) -> None:
    await model.operations.drain(0)
    with pytest.raises(ShuttingDown):
        await model.begin(Stop("a"))


async def test_a_plan_is_of_no_operation(model: ModelNode) -> None:
    operation = await model.containers.preview(Create("b", SPEC))
    assert operation.id == ""
    assert operation.target == ResourceRef(kind=ResourceKind.CONTAINER, name="b", uid="")
    assert (operation.state, operation.kind, operation.node) == (OperationState.PLANNED, OperationKind.CREATE, NODE)
    assert [stage.name for stage in operation.stages] == ["create", "start", "verify", "commit"]
    assert {stage.state for stage in operation.stages} == {StageState.PENDING}
    assert operation.create_time == operation.update_time
    assert operation.arguments["start"] is True
    draft = await model.containers.draft(Stop("a"))
    of_a = model.operations.preview(draft)
    assert (of_a.target, of_a.node, of_a.plan) == (model.container().target, NODE, draft.plan)


async def test_the_record_of_an_operation(model: ModelNode) -> None:
    operation = await model.run_ok(Restart("a"))
    assert operation.kind is OperationKind.RESTART
    assert (operation.target, operation.node) == (model.container().target, NODE)
    assert operation.committed
    assert (operation.request_id, operation.request_digest) == ("", "")
    assert operation.result == model.container()
    assert [(stage.name, stage.state) for stage in operation.stages] == [
        (name, StageState.DONE) for name in ("stop", "start", "verify", "commit")
    ]
    assert operation.facts("verify") == {"exit_code": None}
    assert operation.current_stage == ""
    assert operation.end_time is not None
    assert operation.create_time < operation.update_time
    assert operation.create_time <= operation.end_time
    for stage in operation.stages:
        assert stage.start_time is not None
        assert stage.end_time is not None


# -- watching --------------------------------------------------------------------------------------------------------


async def collected(model: ModelNode, operation_id: str) -> list[OperationView]:
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        return [snapshot async for snapshot in model.operations.watch(operation_id)]


async def test_a_watcher_sees_the_operation_until_its_end(model: ModelNode) -> None:
    async def work(run: OperationRun) -> None:
        run.set_stage_message("at work")
        run.progress(1, 3)
        await asyncio.sleep(0)
        run.progress(3, 3)
        await asyncio.sleep(0)

    async def rest(_: OperationRun) -> None:
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    seen = await collected(
        model, await begin_saga(model, ScriptedSaga(model, [Step("work", work), Step("rest", rest)]))
    )
    shown = {(one.operation.current_stage, one.current_bytes, one.total_bytes, one.message) for one in seen}
    assert ("work", 3, 3, "at work") in shown
    assert ("rest", 0, 0, "") in shown
    assert seen[-1].operation.state is OperationState.SUCCEEDED
    assert seen[-1].operation.stages[0].current_bytes == seen[-1].operation.stages[0].total_bytes == 3


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.0, {(1, 3), (2, 3), (3, 3)}), (1e12, {(3, 3)})], ids=["slowly", "quickly"]
)
async def test_progress_is_told_now_and_then_and_at_its_end(
    model: ModelNode, monkeypatch: pytest.MonkeyPatch, seconds: float, told: set[tuple[int, int]]
) -> None:
    monkeypatch.setattr(running_module, "_PROGRESS_INTERVAL_SECONDS", seconds)

    async def work(run: OperationRun) -> None:
        # First nothing, so that the watcher is there.
        for done in (0, 1, 2, 3):
            if done:
                run.progress(done, 3)
            for _ in range(10):
                await asyncio.sleep(0)

    seen = await collected(model, await begin_saga(model, ScriptedSaga(model, [Step("work", work)])))
    shown = {(one.current_bytes, one.total_bytes) for one in seen if one.operation.current_stage == "work"}
    assert shown - {(0, 0)} == told


async def test_what_has_ended_is_shown_once(model: ModelNode) -> None:
    operation = await model.run_ok(Stop("a"))
    assert [one.operation for one in await collected(model, operation.id)] == [operation]
    assert (await model.operations.get(operation.id)).operation == operation
    with pytest.raises(OperationNotFound) as unknown:
        await model.operations.get(ID)
    assert unknown.value.operation_id == ID


async def test_what_another_node_does_is_shown_as_it_is(model: ModelNode) -> None:
    operation = record(model, node="other")
    assert [one.operation for one in await collected(model, ID)] == [operation]


async def test_what_nobody_drives_is_no_answer(model: ModelNode) -> None:
    record(model)
    with pytest.raises(RuntimeError, match=ID):
        await collected(model, ID)
    model.operations._draining.set()
    with pytest.raises(ShuttingDown):
        await collected(model, ID)


async def test_a_watch_waits_for_an_operation_that_is_to_be_taken_up(model: ModelNode) -> None:
    operation_id = await model.begin(Restart("a"))
    await model.operations.drain(0)
    operations = recovering(model)
    watching = asyncio.create_task(collected(model, operation_id))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not watching.done()
    assert await operations.resume() == (operation_id,)
    assert (await watching)[-1].operation.state is OperationState.SUCCEEDED


@pytest.mark.parametrize("turn", ["open", "drain"])
async def test_a_watch_that_waits_in_vain_ends(model: ModelNode, turn: str) -> None:
    record(model)
    operations = recovering(model)
    watching = asyncio.create_task(collected(model, ID))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not watching.done()
    if turn == "open":
        model.store.journal[ID] = Versioned(record(model).changed(state=OperationState.FAILED), 2)
        operations.allow_new_operations()
        assert (await watching)[-1].operation.state is OperationState.FAILED
    else:
        await operations.drain(0)
        with pytest.raises(ShuttingDown):
            await watching


async def test_a_page_of_operations(model: ModelNode) -> None:
    await model.run_ok(Restart("a"))
    first = await model.operations.list(page_size=1, page_token="")
    second = await model.operations.list(page_size=1, page_token=first.next_token)
    assert [one.kind for one in (*first.items, *second.items)] == [OperationKind.RESTART, OperationKind.CREATE]


# -- results ---------------------------------------------------------------------------------------------------------


async def test_a_result_that_is_no_longer_kept_is_the_object_as_it_is_now(model: ModelNode) -> None:
    await model.run_ok(volume_commands.Create("data", size_bytes=1 << 20))
    operations, over = model.operations, {"state": OperationState.SUCCEEDED, "result": None}
    assert await operations.result_of(record(model, **over)) == model.container()
    assert await operations.result_of(record(model, target=model.volume().target, **over)) == model.volume()
    assert await operations.result(ID) == model.volume()
    gone: list[dict[str, object]] = [
        {"kind": OperationKind.COMMIT},
        {"target": model.container().target.model_copy(update={"uid": ID})},
        {"target": model.volume().target.model_copy(update={"name": "other"})},
        {"target": model.container().target.model_copy(update={"name": "data"})},
    ]
    for changes in gone:
        with pytest.raises(OperationResultGone) as refused:
            await operations.result_of(record(model, **over, **changes))
        assert refused.value.operation_id == ID


async def test_the_result_of_what_failed_is_its_error(model: ModelNode) -> None:
    error = RecordedError(code=5, reason="R", message="m", metadata={"k": "v"})
    failed = record(model, state=OperationState.FAILED, error=error)
    for call in (model.operations.result_of(failed), model.operations.result(ID), model.operations.done(ID)):
        with pytest.raises(OperationFailed) as raised:
            await call
        found = raised.value
        assert (found.recorded_code, found.recorded_reason, found.recorded_message) == (5, "R", "m")
        assert found.recorded_metadata == {"k": "v"}


# -- cancelling ------------------------------------------------------------------------------------------------------


async def refusal(model: ModelNode, operation_id: str = ID) -> GpudockError:
    with pytest.raises(GpudockError) as refused:
        await model.operations.cancel(operation_id)
    return refused.value


async def test_what_cannot_be_cancelled(model: ModelNode) -> None:
    assert isinstance(await refusal(model), OperationNotFound)
    record(model, state=OperationState.SUCCEEDED, node="other")
    ended = await refusal(model)
    assert isinstance(ended, OperationNotCancellable)
    assert ended.metadata == {"operation_id": ID, "state": "SUCCEEDED"}
    record(model, node="other")
    elsewhere_now = await refusal(model)
    assert isinstance(elsewhere_now, WrongNode)
    assert (elsewhere_now.container, elsewhere_now.node, elsewhere_now.address) == ("a", "other", "")
    model.store.node_records = [node_record("third", "t:1"), node_record("other", "o:1")]
    elsewhere_now = await refusal(model)
    assert isinstance(elsewhere_now, WrongNode)
    assert elsewhere_now.address == "o:1"
    record(model)
    stuck = await refusal(model)
    assert isinstance(stuck, OperationNotCancellable)
    assert stuck.metadata == {"operation_id": ID, "state": "RUNNING"}
    recovering(model)
    assert isinstance(await refusal(model), Recovering)
    model.operations.set_recovery_blocked(StoreFull("no room"))
    assert isinstance(await refusal(model), StoreFull)
    record(model, state=OperationState.FAILED)
    assert isinstance(await refusal(model), OperationNotCancellable)


async def test_what_was_cancelled_may_be_cancelled_again(model: ModelNode) -> None:
    operation = record(model, cancel_requested=True, node="other")
    assert (await model.operations.cancel(ID)).operation == operation


def test_an_operation_of_another_node_is_told_by_its_target(model: ModelNode) -> None:
    target = ResourceRef(kind=ResourceKind.VOLUME, name="data", uid=ID)
    error = model.operations.wrong_node_error(record(model, target=target, node="other"), "o:1")
    assert isinstance(error, VolumeOnOtherNode)
    assert (error.volume, error.node, error.address) == ("data", "other", "o:1")


async def test_what_nobody_may_cancel_goes_on(model: ModelNode) -> None:
    gate = asyncio.Event()

    async def work(_: OperationRun) -> None:
        await gate.wait()

    operation_id = await begin_saga(model, UncancellableSaga(model, [Step("work", work)]))
    await asyncio.sleep(0)
    refused = await refusal(model, operation_id)
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
    snapshot = await model.operations.cancel(operation_id)
    assert snapshot.operation.cancel_requested
    assert snapshot.operation.state is OperationState.UNDOING
    await undoing.wait()
    assert (await model.operations.cancel(operation_id)).operation.cancel_requested
    may_undo.set()
    operation = await model.ended_operation(operation_id)
    assert operation.state is OperationState.CANCELLED
    assert [stage.state for stage in operation.stages] == [StageState.UNDONE, StageState.PENDING]


async def test_a_cancel_of_what_cannot_be_recorded_says_so_and_is_not_forgotten(model: ModelNode) -> None:
    started = asyncio.Event()

    async def work(_: OperationRun) -> None:
        started.set()
        await asyncio.Event().wait()

    operation_id = await begin_saga(model, ScriptedSaga(model, [Step("work", work)]))
    await started.wait()
    model.store.failures.append(StoreFull("no room"))
    refused = await refusal(model, operation_id)
    assert isinstance(refused, StoreFull)
    assert refused.detail == "no room"
    assert (await model.ended_operation(operation_id)).state is OperationState.CANCELLED


# -- a process' life -------------------------------------------------------------------------------------------------


async def test_only_what_is_unfinished_here_is_taken_up(model: ModelNode) -> None:
    left = [f"{number}{ID[1:]}" for number in range(4)]
    record(model, node="other")
    for one in left:
        record(
            model,
            id=one,
            stages=[Stage(name="pause"), Stage(name="commit")],
            kind=OperationKind.PAUSE,
            arguments={"engine_id": model.engine_id(), "freeze": True},
        )
    ended = model.store.journal[left[0]]
    unfinished = model.store.unfinished

    async def while_two_end(node: str) -> tuple[Versioned[Operation], ...]:
        found = await unfinished(node)
        model.store.journal[left[0]] = Versioned(ended.value.changed(state=OperationState.SUCCEEDED), ended.version)
        model.store.journal.pop(left[1], None)
        return found

    model.store.unfinished = while_two_end  # type: ignore[method-assign]  # this call alone differs
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
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations_module, "_RESUME_POLL_SECONDS", 0.001)


@pytest.mark.usefixtures("quick")
async def test_a_start_waits_for_all_but_what_is_interruptible(model: ModelNode) -> None:
    short, long = asyncio.Event(), asyncio.Event()

    def wait(event: asyncio.Event) -> Callable[[OperationRun], asyncio.Future[None]]:
        async def work(_: OperationRun) -> None:
            await event.wait()

        return work  # type: ignore[return-value]  # an awaitable, as a step's has to be

    script = ScriptedSaga(model, [Step("short", wait(short)), Step("long", wait(long), interruptible=True)])
    operation_id = await begin_saga(model, script)
    settling = asyncio.create_task(model.operations.wait_until_ended_or_interruptible([operation_id, ID]))
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert not settling.done()
    short.set()
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        await settling
    assert operation_id in model.operations.active
    assert model.store.journal[operation_id].value.stages[0].state is StageState.DONE
    await model.operations.drain(TIMEOUT_SECONDS)
    stages = model.store.journal[operation_id].value.stages
    assert [stage.state for stage in stages] == [StageState.DONE, StageState.PENDING, StageState.PENDING]
    assert not long.is_set()


async def test_a_stop_gives_what_runs_its_time(model: ModelNode) -> None:
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


async def test_a_stop_lets_go_of_what_does_not_end_in_its_time(model: ModelNode) -> None:
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
