"""Whether an operation begins, and what its first record and its plan are."""

from __future__ import annotations

import asyncio

import pytest
from gpudock_server.core.containers.commands import Create, Restart, Stop
from gpudock_server.core.operations.engine import RequestKey
from gpudock_server.core.operations.saga import OperationDraft
from gpudock_server.core.volumes import commands as volume_commands
from gpudock_server.errors import (
    ContainerBusy,
    ContainerExists,
    Recovering,
    RequestIdReused,
    ShuttingDown,
    StoreFull,
    StoreUnavailable,
    VolumeBusy,
    VolumeExists,
)
from gpudock_server.model.operation import (
    OperationKind,
    OperationState,
    RequestRecord,
    StageState,
)
from gpudock_server.model.resource import ResourceKind, ResourceRef
from gpudock_server.model.store_changes import PutRequest, RequireUnlocked, StoreChange

from tests.unit.model_node import NODE, SPEC, ModelNode
from tests.unit.operation_examples import ID, start_recovering_daemon
from tests.unit.scripted_saga import ScriptedSaga, draft_of


async def test_a_locked_container_is_busy_with_the_operation_that_holds_the_lock(model: ModelNode) -> None:
    draft = await model.containers.draft(Stop("a"))

    async def drafted() -> OperationDraft:
        return draft

    model.store.locks[ResourceKind.CONTAINER, "a"] = "other"
    with pytest.raises(ContainerBusy) as busy:
        await model.operations.begin(drafted, None)
    assert busy.value.metadata == {"container": "a", "operation_id": "other"}
    assert not model.operations.driven


async def test_a_locked_volume_is_busy_with_the_operation_that_holds_the_lock(model: ModelNode) -> None:
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
    for each in (draft, conditioned):

        async def drafted(each: OperationDraft = each) -> OperationDraft:
            return each

        with pytest.raises(VolumeBusy) as busy:
            await model.operations.begin(drafted, None)
        assert busy.value.metadata == {"volume": "data", "operation_id": "other"}


async def test_the_second_of_two_creations_with_one_name_is_refused(model: ModelNode) -> None:
    both = await asyncio.gather(*(model.begin(Create("b", SPEC)) for _ in range(2)), return_exceptions=True)
    (refused,) = [result for result in both if isinstance(result, ContainerExists)]
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
    # `drafted` returns an outdated draft; a new draft would be refused before its transaction.
    with pytest.raises(ContainerExists) as exists_too:
        await model.operations.begin(drafted, None)
    assert exists_too.value.container == "c"


async def test_an_outdated_draft_is_made_again_at_most_64_times(model: ModelNode) -> None:
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


async def test_a_repeated_call_returns_the_same_operation(model: ModelNode) -> None:
    written: list[StoreChange] = []
    model.store.before_apply = written.extend
    first = await model.begin(Restart("a"), RequestKey(ID, "digest"))
    assert await model.begin(Restart("a"), RequestKey(ID, "digest")) == first
    with pytest.raises(RequestIdReused) as reused:
        await model.begin(Stop("a"), RequestKey(ID, "other"))
    assert reused.value.request_id == ID
    operation = await model.ended_operation(first)
    assert (operation.request_id, operation.request_digest) == (ID, "digest")
    # After its end the request id is kept for a limited time.
    known = RequestRecord(operation_id=first, digest="digest")
    assert [change for change in written if isinstance(change, PutRequest)] == [
        PutRequest(ID, known),
        PutRequest(ID, known, ended=True),
    ]
    assert await model.begin(Restart("a"), RequestKey(ID, "digest")) == first


async def test_a_repeated_call_that_its_own_operation_blocks_returns_that_operation(model: ModelNode) -> None:
    done = await model.begin(Restart("a"), RequestKey(ID, "digest"))
    known = model.store.request_records.pop(ID)

    async def drafted() -> OperationDraft:
        model.store.request_records[ID] = known
        raise ContainerBusy(container="a", operation_id=done)

    assert await model.operations.begin(drafted, RequestKey(ID, "digest")) == done
    await model.ended_operation(done)


async def test_only_operations_of_the_recovery_begin_during_the_recovery(model: ModelNode) -> None:
    operations = start_recovering_daemon(model)

    async def begin(*, during_recovery: bool = False) -> str:
        return await operations.begin(
            lambda: draft_of(model, lambda _: ScriptedSaga(model, ())), None, during_recovery=during_recovery
        )

    with pytest.raises(Recovering):
        await begin()
    operations.set_recovery_blocked(StoreFull("no space"))
    with pytest.raises(StoreFull) as full:
        await begin()
    assert full.value.detail == "no space"
    operations.set_recovery_blocked(None)
    with pytest.raises(Recovering):
        await begin()
    await model.ended_operation(await begin(during_recovery=True))
    operations.allow_new_operations()
    await model.ended_operation(await begin())


async def test_an_operation_counts_as_driven_before_its_record_is_written(model: ModelNode) -> None:
    driven: list[frozenset[str]] = []
    model.store.before_apply = lambda _: driven.append(model.operations.driven)
    operation_id = await model.begin(Restart("a"))
    # A search for operations that no process drives may find the record before the operation has a task.
    assert driven[0] == {operation_id}
    await model.ended_operation(operation_id)
    assert not model.operations.driven
    assert not model.operations._running, "an ended operation is still in memory"


async def test_no_operation_begins_during_a_shutdown(model: ModelNode) -> None:
    await model.operations.drain(0)
    with pytest.raises(ShuttingDown):
        await model.begin(Stop("a"))


async def test_a_preview_has_a_plan_and_no_id(model: ModelNode) -> None:
    operation = await model.containers.preview(Create("b", SPEC))
    assert operation.id == ""
    assert operation.target == ResourceRef(kind=ResourceKind.CONTAINER, name="b", uid="")
    assert (operation.state, operation.kind, operation.node) == (OperationState.PLANNED, OperationKind.CREATE, NODE)
    assert [stage.name for stage in operation.stages] == ["create", "start", "verify", "commit"]
    assert {stage.state for stage in operation.stages} == {StageState.PENDING}
    assert operation.create_time == operation.update_time
    assert operation.arguments["start"] is True
    draft = await model.containers.draft(Stop("a"))
    preview = model.operations.preview(draft)
    assert (preview.target, preview.node, preview.plan) == (model.container().target, NODE, draft.plan)


async def test_the_record_of_a_successful_operation(model: ModelNode) -> None:
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
