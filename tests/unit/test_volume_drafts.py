"""What is refused before anything is done to a volume, what a plan says, and what is read of volumes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from gpudock_server.core.containers.commands import Pause, Stop
from gpudock_server.core.volumes.adoption_rules import AdoptionRules
from gpudock_server.core.volumes.backends import choose_backend
from gpudock_server.core.volumes.commands import Adopt, Command, Create, Delete, Resize
from gpudock_server.errors import (
    EngineRejected,
    EngineVolumeInUse,
    EngineVolumeNotFound,
    GpudockError,
    PoolFull,
    SizeNotSupported,
    VolumeFailed,
    VolumeMounted,
    VolumeMountedByRunning,
    VolumeNotAdopted,
    VolumeRecordLost,
)
from gpudock_server.model.container import ContainerState
from gpudock_server.model.engine import EngineState, EngineVolume
from gpudock_server.model.operation import Operation, OperationState
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.volume import (
    PoolUsage,
    VolumeBackendKind,
    VolumeBacking,
    VolumeCause,
    VolumeState,
    VolumeUsage,
)
from gpudock_server.ports import Versioned

from tests.unit.failing_store import node_record
from tests.unit.model_files import ModelPlainVolumes, ModelVolumes
from tests.unit.model_node import NODE, SPEC, ModelNode
from tests.unit.scenario_setups import MIB, SPEC_WITH_DATA, adoptable_engine_volume

TIB = 1 << 40
USED = 1 << 20


@pytest.fixture
async def model() -> ModelNode:
    """A node with a volume of 64 MiB."""
    node = ModelNode()
    await node.run_ok(Create("data", size_bytes=64 * MIB, owner="o", labels={"k": "v"}))
    return node


async def refusal(model: ModelNode, command: Command) -> GpudockError:
    """Return the error of a refused command, and fail unless it changed nothing."""
    before = model.summary()
    with pytest.raises(GpudockError) as refused:
        await model.begin(command)
    assert model.summary() == before
    return refused.value


async def preview(model: ModelNode, command: Command) -> Operation:
    """Return the preview of a command, and fail unless it changed nothing."""
    before = model.summary()
    operation = await model.volumes.preview(command)
    assert model.summary() == before
    assert (operation.state, operation.node) == (OperationState.PLANNED, NODE)
    return operation


def change_record(model: ModelNode, **changes: object) -> None:
    """Change the record of volume `data`."""
    stored = model.store.volume_records["data"]
    model.store.volume_records["data"] = Versioned(stored.value.changed(**changes), stored.version)


async def test_the_record_and_the_revisions_of_a_volume(model: ModelNode) -> None:
    volume = model.volume()
    assert (volume.name, volume.node, volume.owner, volume.labels) == ("data", NODE, "o", {"k": "v"})
    assert (volume.generation, volume.revision, volume.state) == (1, 1, VolumeState.READY)
    assert volume.backing is not None
    assert (volume.backing.kind, volume.backing.uid) == (VolumeBackendKind.LOOP, volume.uid)
    assert volume.backing.folder == volume.mountpoint == f"/engine/{volume.backing.engine_volume}"
    assert model.sized_volumes.identities == {volume.uid: volume.identity}
    (revision,) = model.store.volume_revision_records.values()
    assert (revision.volume, revision.uid, revision.revision) == ("data", volume.uid, 1)
    assert (revision.size_bytes, revision.cause) == (64 * MIB, VolumeCause.CREATED)
    assert revision.operation_id in model.store.journal
    labels = model.engine.volumes[volume.backing.engine_volume].labels
    assert labels["gpudock.uid"] == volume.uid
    assert labels["gpudock.node"] == NODE
    assert '"owner":"o"' in labels["gpudock.volume"]
    for size, cause in ((96 * MIB, VolumeCause.GROWN), (32 * MIB, VolumeCause.SHRUNK)):
        before = model.volume()
        operation = await model.run_ok(Resize("data", size))
        volume = model.volume()
        assert operation.result == volume
        assert volume.update_time > before.update_time
        assert volume.revision == before.revision + 1
        assert volume.generation == before.generation + 1
        revision = model.store.volume_revision_records[volume.uid, volume.revision]
        assert (revision.size_bytes, revision.cause) == (size, cause)


@pytest.mark.parametrize("command", [Resize("data", 32 * MIB), Delete("data"), Delete("data", force=True)])
async def test_a_command_on_a_missing_changed_locked_or_remote_volume_is_refused(
    model: ModelNode, command: Any
) -> None:
    unknown = await refusal(model, replace(command, name="date"))
    assert (unknown.reason, unknown.metadata) == ("VOLUME_NOT_FOUND", {"volume": "date", "available": "data"})
    stale = await refusal(model, replace(command, etag="old"))
    assert stale.metadata == {"volume": "data", "etag": "old", "current_etag": model.volume().etag}
    model.store.locks[ResourceKind.VOLUME, "data"] = "other"
    busy = await refusal(model, replace(command, etag=model.volume().etag))
    assert (busy.reason, busy.metadata) == ("VOLUME_BUSY", {"volume": "data", "operation_id": "other"})
    model.store.locks.clear()
    change_record(model, node="far")
    model.store.node_records = [node_record("near", "n:1"), node_record("far", "f:1")]
    remote = await refusal(model, command)
    assert remote.metadata == {"volume": "data", "node": "far", "address": "f:1"}


async def test_a_command_on_an_adoptable_engine_volume_says_that_it_can_be_adopted(model: ModelNode) -> None:
    await adoptable_engine_volume(model)
    assert isinstance(await refusal(model, Resize("theirs", MIB)), VolumeNotAdopted)
    model.engine.volumes["theirs"] = EngineVolume(name="theirs", driver="local")
    assert not isinstance(await refusal(model, Resize("theirs", MIB)), VolumeNotAdopted)


async def test_a_name_is_used_for_one_volume(model: ModelNode) -> None:
    for command in (Create("data"), Adopt("data", "theirs")):
        exists = await refusal(model, command)
        assert (exists.reason, exists.metadata["volume"]) == ("VOLUME_EXISTS", "data")
    backing = model.volume().backing
    assert backing is not None
    del model.store.volume_records["data"]
    lost = await refusal(model, Create("data"))
    assert isinstance(lost, VolumeRecordLost)
    assert (lost.volume, lost.engine_volume) == ("data", backing.engine_volume)


@pytest.mark.parametrize(
    ("size_bytes", "forced", "sized", "chosen"),
    [
        (0, None, "", VolumeBackendKind.PLAIN),
        (1, None, "", VolumeBackendKind.LOOP),
        (1, VolumeBackendKind.LOOP, "", VolumeBackendKind.LOOP),
        (0, VolumeBackendKind.PLAIN, "no loop devices", VolumeBackendKind.PLAIN),
        (0, VolumeBackendKind.LOOP, "", "LOOP: requires a size; PLAIN: available, but not requested"),
        (1, VolumeBackendKind.PLAIN, "", "LOOP: available, but not requested; PLAIN: does not support a size"),
        (1, None, "no loop devices", "LOOP: no loop devices; PLAIN: does not support a size"),
        (1, VolumeBackendKind.PROJECT_QUOTA, "no", "LOOP: no; PLAIN: does not support a size"),
    ],
)
async def test_which_backend_a_volume_gets(
    size_bytes: int, forced: VolumeBackendKind | None, sized: str, chosen: VolumeBackendKind | str
) -> None:
    loop = ModelVolumes()

    async def unavailable_reason() -> str:
        return sized

    loop.unavailable_reason = unavailable_reason  # type: ignore[method-assign]  # this call alone differs
    choice = choose_backend([loop, ModelPlainVolumes()], name="data", size_bytes=size_bytes, forced=forced)
    if isinstance(chosen, VolumeBackendKind):
        assert (await choice).kind is chosen
        return
    with pytest.raises(SizeNotSupported) as refused:
        await choice
    assert refused.value.metadata == {"volume": "data", "size_bytes": str(size_bytes), "detail": chosen}


async def test_the_setting_forces_a_backend_for_sized_volumes_only_and_the_caller_for_all(model: ModelNode) -> None:
    model.configure(forced_backend=VolumeBackendKind.PROJECT_QUOTA)
    refused = await refusal(model, Create("b", size_bytes=MIB))
    assert (refused.reason, refused.metadata["volume"]) == ("SIZE_NOT_SUPPORTED", "b")
    await preview(model, Create("b", size_bytes=MIB, backend=VolumeBackendKind.LOOP))
    await preview(model, Create("b"))


async def test_the_sizes_of_volumes_are_limited_by_the_pool(model: ModelNode) -> None:
    usage = PoolUsage(total_bytes=100 * MIB, free_bytes=60 * MIB, promised_bytes=64 * MIB, allocated_bytes=10 * MIB)

    async def pool() -> PoolUsage:
        return usage

    model.sized_volumes.pool = pool  # type: ignore[method-assign]  # this call alone differs
    # 60 MiB are free and 10 MiB allocated; 64 MiB of these are reserved.
    await preview(model, Create("b", size_bytes=6 * MIB))
    full = await refusal(model, Create("b", size_bytes=6 * MIB + 1))
    assert isinstance(full, PoolFull)
    assert full.metadata == {
        "path": "/volumes",
        "needed_bytes": str(6 * MIB + 1),
        "available_bytes": str(6 * MIB),
    }
    # A resize needs only the difference.
    await preview(model, Resize("data", 70 * MIB))
    assert (await refusal(model, Resize("data", 70 * MIB + 1))).metadata["available_bytes"] == str(70 * MIB)
    await preview(model, Create("b"))
    change_record(model, reserved_bytes=80 * MIB)
    assert (await refusal(model, Create("b", size_bytes=1))).metadata["available_bytes"] == "0"
    # The reservations of another node do not count.
    change_record(model, node="far")
    await preview(model, Create("b", size_bytes=70 * MIB))
    over = replace(model.core.backends, overcommit=2.0)
    await over.require_space(VolumeBackendKind.LOOP, "b", 140 * MIB)
    with pytest.raises(PoolFull):
        await over.require_space(VolumeBackendKind.LOOP, "b", 140 * MIB + 1)


async def test_the_pool_is_that_of_the_available_sized_backend(model: ModelNode) -> None:
    assert await model.core.backends.pool_usage() == await model.sized_volumes.pool()

    async def unavailable_reason() -> str:
        return "no loop devices"

    model.sized_volumes.unavailable_reason = unavailable_reason  # type: ignore[method-assign]  # this call alone differs
    assert await model.core.backends.pool_usage() is None
    assert await replace(model.core.backends, backends=[model.unsized_volumes]).pool_usage() is None
    assert model.core.backends.of_kind(VolumeBackendKind.PLAIN) is model.unsized_volumes


async def test_why_a_volume_cannot_be_resized(model: ModelNode) -> None:
    small = await refusal(model, Resize("data", 2 * USED - 1))
    assert small.metadata == {
        "volume": "data",
        "requested_bytes": str(2 * USED - 1),
        "used_bytes": str(USED),
        "minimum_bytes": str(2 * USED),
    }
    await preview(model, Resize("data", 2 * USED))
    assert (await preview(model, Resize("data", 64 * MIB))).stages[0].name == "commit"
    change_record(model, state=VolumeState.DELETING)
    failed = await refusal(model, Resize("data", 32 * MIB))
    assert isinstance(failed, VolumeFailed)
    assert failed.call == "resize"
    change_record(model, state=VolumeState.READY, backing=None)
    assert (await refusal(model, Resize("data", 32 * MIB))).metadata == {
        "volume": "data",
        "holders": "the operation that creates it",
    }
    await model.run_ok(Create("plain"))
    plain = await refusal(model, Resize("plain", MIB))
    assert plain.metadata["detail"].startswith("PLAIN volumes have no size")


async def test_which_containers_prevent_a_shrink_by_copy(model: ModelNode) -> None:
    model.sized_volumes.copies = True
    plan = (await preview(model, Resize("data", 32 * MIB))).plan
    assert (plan.bytes_to_move, plan.bytes_available, plan.restarts_process) == (USED, 8 * TIB, False)
    await model.create_container(spec=SPEC_WITH_DATA)
    operation = await preview(model, Resize("data", 32 * MIB))
    assert operation.plan.restarts_process
    assert [stage.name for stage in operation.stages] == [
        *("make", "copy", "stop", "difference", "locate", "exchange", "start", "verify", "commit", "retire")
    ]
    done = await model.run_ok(Resize("data", 32 * MIB))
    assert done.locks == (model.container().target,), "the container is not locked during the shrink"
    await model.run_ok(Resize("data", 64 * MIB))
    await model.run_ok(Pause("a"))
    paused = await refusal(model, Resize("data", 32 * MIB))
    assert (paused.reason, paused.metadata) == ("CONTAINER_PAUSED", {"container": "a"})
    await model.run_ok(Stop("a"))
    assert "stop" not in [stage.name for stage in (await preview(model, Resize("data", 32 * MIB))).stages]
    stranger = replace(model.engine_container(), id="stranger", name="theirs")
    model.engine.containers["stranger"] = stranger
    model.engine.layer_of["stranger"] = model.engine.layer_of[model.engine_id()]
    await preview(model, Resize("data", 32 * MIB))
    model.engine.containers["stranger"] = replace(stranger, state=type(stranger.state).RUNNING)
    used = await refusal(model, Resize("data", 32 * MIB))
    assert (used.reason, used.metadata) == ("VOLUME_IN_USE", {"volume": "data", "holders": "theirs"})


async def test_a_backend_that_cannot_shrink_in_place_fails_the_resize(model: ModelNode) -> None:
    before = model.summary()
    model.sized_volumes.copies = True
    model.sized_volumes.needs_copy = lambda backing, size_bytes: False  # type: ignore[method-assign]  # noqa: ARG005 - the names are those of the protocol
    operation = await model.run(Resize("data", 32 * MIB))
    assert operation.error is not None
    assert operation.error.metadata == {"volume": "data", "call": "shrink", "detail": "it cannot shrink in place"}
    assert model.summary() == before


async def test_a_resize_does_not_change_a_new_volume_of_the_same_name(model: ModelNode) -> None:
    grow = model.sized_volumes.grow

    async def replace_volume_and_grow(backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        change_record(model, uid="1b4e28ba-2fa1-41d2-883f-0016d3cca427")
        return await grow(backing, size_bytes)

    model.sized_volumes.grow = replace_volume_and_grow  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(Resize("data", 96 * MIB))
    assert (operation.state, operation.committed) == (OperationState.RUNNING, False)
    assert model.volume().size_bytes == 64 * MIB


async def test_a_container_that_fails_with_the_smaller_volume_gets_the_old_one(model: ModelNode) -> None:
    model.sized_volumes.copies = True
    await model.create_container(spec=SPEC_WITH_DATA)
    before = model.summary()
    start = model.engine.start

    async def exit_with_smaller_volume(engine_id: str) -> None:
        (size, _), *_rest = model.sized_volumes.stores.values()
        model.engine.exit_code_at_start = 7 if size == 32 * MIB else None
        await start(engine_id)

    model.engine.start = exit_with_smaller_volume  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(Resize("data", 32 * MIB))
    assert operation.error is not None
    assert operation.error.reason == "START_FAILED"
    assert operation.error.metadata["container"] == "a"
    assert "exited with code 7" in operation.error.metadata["detail"]
    assert model.summary() == before


async def test_a_failed_shrink_records_the_state_of_its_containers(model: ModelNode) -> None:
    model.sized_volumes.copies = True
    await model.create_container("a", SPEC_WITH_DATA)
    await model.create_container("b", SPEC_WITH_DATA)
    await model.run_ok(Stop("a"))
    # As a daemon leaves it that was killed before it created the engine container.
    del model.engine.containers[model.engine_id("a")]
    model.store.put(model.container().changed(engine=None))
    before, exited = model.container(), model.engine_id("b")

    async def exit_and_fail(*_: object, **__: object) -> None:
        model.engine.containers[exited] = replace(
            model.engine.containers[exited], state=EngineState.EXITED, exit_code=7
        )
        raise VolumeFailed(volume="data", call="copy", detail="no")

    model.copier.copy = exit_and_fail  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(Resize("data", 32 * MIB))
    assert operation.error is not None
    assert operation.error.metadata == {"volume": "data", "call": "copy", "detail": "no"}
    assert (model.container("b").status.state, model.container("b").status.exit_code) == (ContainerState.EXITED, 7)
    assert model.container() == before


async def test_a_failed_shrink_kills_a_container_that_was_started_with_the_smaller_volume(
    model: ModelNode,
) -> None:
    model.sized_volumes.copies = True
    await model.create_container(spec=SPEC_WITH_DATA)
    before = model.summary()
    model.engine.stop_timeouts.clear()

    async def refused(_engine_id: str, _seconds: float) -> int | None:
        raise EngineRejected(call="wait", status=500, detail="no")

    model.engine.exited_within = refused  # type: ignore[method-assign, assignment]
    operation = await model.run(Resize("data", 32 * MIB))
    assert operation.error is not None
    assert operation.error.reason == "ENGINE_REJECTED"
    # What its process has written since is not kept, so the process gets no time to stop.
    assert model.engine.stop_timeouts == [10, 0]
    assert model.summary() == before


async def test_a_volume_whose_creation_was_interrupted_can_be_deleted(model: ModelNode) -> None:
    change_record(model, state=VolumeState.DELETING, backing=None)
    for force in (False, True):
        assert (await preview(model, Delete("data", force=force))).plan.warnings == ()
    await model.run_ok(Delete("data", force=True))
    assert not model.store.volume_records


async def test_which_containers_prevent_a_deletion(model: ModelNode) -> None:
    await model.create_container(spec=SPEC_WITH_DATA)
    mounted = await refusal(model, Delete("data"))
    assert isinstance(mounted, VolumeMounted)
    assert mounted.metadata == {"volume": "data", "holders": "a"}
    running = await refusal(model, Delete("data", force=True))
    assert isinstance(running, VolumeMountedByRunning)
    assert running.metadata == {"volume": "data", "holders": "a"}
    await model.run_ok(Stop("a"))
    plan = (await preview(model, Delete("data", force=True))).plan
    assert plan.warnings[0] == "container a: new revision without volume data"
    assert (plan.bytes_to_move, plan.bytes_available) == (12, 50)
    stranger = replace(model.engine_container(), id="stranger", name="theirs")
    model.engine.containers["stranger"] = stranger
    model.engine.layer_of["stranger"] = model.engine.layer_of[model.engine_id()]
    used = await refusal(model, Delete("data", force=True))
    assert (used.reason, used.metadata) == ("VOLUME_IN_USE", {"volume": "data", "holders": "theirs"})
    await model.create_container("b", SPEC)
    model.store.put(model.container().changed(spec=SPEC))
    used = await refusal(model, Delete("data"))
    assert used.metadata["holders"].split(",")[-1] == "theirs"


async def test_which_engine_volumes_can_be_adopted(model: ModelNode) -> None:
    await adoptable_engine_volume(model)
    theirs = model.engine.volumes["theirs"]

    async def refused(**changes: object) -> GpudockError:
        model.engine.volumes["theirs"] = theirs.model_copy(update=changes)
        return await refusal(model, Adopt("new", "theirs"))

    unlabelled = await refused(labels={})
    assert isinstance(unlabelled, EngineVolumeNotFound)
    # The error does not show whether the engine volume exists.
    assert unlabelled.metadata == {"volume": "theirs", "available": ""}
    assert isinstance(await refusal(model, Adopt("new", "nothing")), EngineVolumeNotFound)
    taken = await refused(labels={"gpudock.adopt": "true", "gpudock.uid": "x"})
    assert (taken.reason, taken.metadata["volume"]) == ("VOLUME_EXISTS", "theirs")
    backing = model.volume().backing
    assert backing is not None
    ours = await refusal(model, Adopt("new", backing.engine_volume))
    assert (ours.reason, ours.metadata["volume"]) == ("VOLUME_EXISTS", "data")
    anonymous = await refused(anonymous=True)
    assert anonymous.reason == "ADOPTION_FORBIDDEN"
    assert anonymous.metadata["engine_volume"] == "theirs"
    assert anonymous.metadata["volume"] == "new"
    assert (await refused(hazard="it mounts /")).metadata["detail"].startswith("it mounts /;")
    model.engine.volumes["theirs"] = theirs.model_copy(update={"labels": {}})
    model.configure(adoption=AdoptionRules(names=("the*",)))
    await model.run_ok(Adopt("new", "theirs"))
    (cause,) = [revision.cause for revision in model.store.volume_revision_records.values() if revision.volume == "new"]
    assert cause is VolumeCause.ADOPTED


async def test_an_engine_volume_in_use_is_not_adopted(model: ModelNode) -> None:
    await adoptable_engine_volume(model)
    await model.create_container(spec=SPEC)
    stranger = replace(model.engine_container(), id="stranger", name="other", volumes={"/x": "theirs"})
    model.engine.containers["stranger"] = stranger
    model.engine.layer_of["stranger"] = model.engine.layer_of[model.engine_id()]
    for command in (Adopt("new", "theirs"), Adopt("new", "theirs", size_bytes=64 * MIB)):
        used = await refusal(model, command)
        assert isinstance(used, EngineVolumeInUse)
        assert used.metadata == {"volume": "new", "engine_volume": "theirs", "holders": "other"}
    model.engine.containers["stranger"] = replace(stranger, state=type(stranger.state).EXITED)
    for command in (Adopt("new", "theirs"), Adopt("new", "theirs", size_bytes=64 * MIB)):
        assert isinstance(await refusal(model, command), EngineVolumeInUse)
    # A container of gpudock whose volume lost its record: the files can be copied while it is stopped.
    own = replace(model.engine_container(), volumes={"/x": "theirs"})
    del model.engine.containers["stranger"]
    model.engine.containers[own.id] = own
    assert isinstance(await refusal(model, Adopt("new", "theirs", size_bytes=64 * MIB)), EngineVolumeInUse)
    model.engine.containers[own.id] = replace(own, state=type(own.state).EXITED)
    plan = (await preview(model, Adopt("new", "theirs", size_bytes=64 * MIB))).plan
    assert (plan.bytes_to_move, plan.bytes_available) == (USED, 8 * TIB)
    small = await refusal(model, Adopt("new", "theirs", size_bytes=USED - 1))
    assert small.metadata["detail"] == "engine volume theirs has 1 MiB of files"
    await preview(model, Adopt("new", "theirs", size_bytes=USED))
    theirs = model.engine.volumes["theirs"]
    for changes in ({"driver": "nfs"}, {"options": {"type": "nfs"}}):
        model.engine.volumes["theirs"] = theirs.model_copy(update=changes)
        failed = await refusal(model, Adopt("new", "theirs", size_bytes=64 * MIB))
        assert isinstance(failed, VolumeFailed)
        assert (failed.volume, failed.call) == ("new", "copy")


async def test_volumes_are_read_with_their_containers_and_usage(model: ModelNode) -> None:
    await model.run_ok(Create("plain"))
    await model.create_container(spec=SPEC_WITH_DATA)
    details = await model.volumes.get("data")
    assert (details.view.volume, details.containers, details.used_bytes) == (model.volume(), ("a",), USED)
    page = await model.volumes.list(page_size=10, page_token="")
    assert [(details.view.volume.name, details.containers, details.used_bytes) for details in page.items] == [
        ("data", ("a",), USED),
        ("plain", (), None),
    ]
    assert (await model.volumes.get("plain")).used_bytes == USED
    first = await model.volumes.list(page_size=1, page_token="")
    second = await model.volumes.list(page_size=1, page_token=first.next_token)
    assert [details.view.volume.name for details in (*first.items, *second.items)] == ["data", "plain"]
    assert first.watch_token
    history = await model.volumes.revisions("data", page_size=5, page_token="")
    assert [revision.revision for revision in history.items] == [1]
    for call in (model.volumes.get("date"), model.volumes.revisions("date", page_size=1, page_token="")):
        with pytest.raises(GpudockError) as unknown:
            await call
        assert unknown.value.metadata == {"volume": "date", "available": "data,plain"}
    change_record(model, node="far")
    assert (await model.volumes.get("data")).used_bytes is None
    change_record(model, node=NODE, state=VolumeState.DELETING)
    assert (await model.volumes.get("data")).used_bytes is None
    change_record(model, state=VolumeState.READY)

    async def failing(_: object) -> VolumeUsage:
        raise VolumeFailed(volume="data", call="usage", detail="no")

    model.sized_volumes.usage = failing  # type: ignore[method-assign, assignment]
    assert (await model.volumes.get("data")).used_bytes is None


async def test_the_usage_of_at_most_four_volumes_is_read_at_a_time(model: ModelNode) -> None:
    for number in range(8):
        await model.run_ok(Create(f"v{number}", size_bytes=MIB))
    current, maximum = 0, 0

    async def counted(_: object) -> VolumeUsage:
        nonlocal current, maximum
        current += 1
        maximum = max(maximum, current)
        await asyncio.sleep(0)
        current -= 1
        return VolumeUsage(used_bytes=1, size_bytes=2, minimum_bytes=1)

    model.sized_volumes.usage = counted  # type: ignore[method-assign, assignment]
    page = await model.volumes.list(page_size=10, page_token="")
    assert {details.used_bytes for details in page.items} == {1}
    assert maximum == 4


async def test_a_command_returns_the_volume_and_a_deletion_returns_nothing(model: ModelNode) -> None:
    details = await model.volumes.run(Resize("data", 96 * MIB), None)
    assert details.view.volume == model.volume()
    await model.volumes.run_to_end(Delete("data"), None)
    assert not model.store.volume_records
