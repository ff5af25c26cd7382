"""Which commands on volumes are refused, and what their plans say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from gpudock_server.core.containers.commands import Pause, Stop
from gpudock_server.core.volumes.adoption_rules import AdoptionRules
from gpudock_server.core.volumes.backends import choose_backend
from gpudock_server.core.volumes.commands import Adopt, Create, Delete, Resize
from gpudock_server.errors import (
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
from gpudock_server.model.engine import EngineVolume
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.volume import (
    PoolUsage,
    VolumeBackendKind,
    VolumeCause,
    VolumeState,
)

from tests.unit.drafts import preview, refusal
from tests.unit.failing_store import node_record
from tests.unit.model_files import ModelPlainVolumes, ModelVolumes
from tests.unit.model_node import SPEC, ModelNode
from tests.unit.scenario_setups import MIB, SPEC_WITH_DATA, adoptable_engine_volume
from tests.unit.volume_examples import USED, change_record

TIB = 1 << 40


@pytest.fixture
def model(model_with_volume: ModelNode) -> ModelNode:
    """A node with volume `data`."""
    return model_with_volume


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
