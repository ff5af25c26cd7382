"""Drafts of changes of containers: the volumes and host paths that they mount."""

from __future__ import annotations

from dataclasses import replace

from gpudock_server.core.containers.commands import (
    Create,
    FieldChange,
    Scale,
    Start,
    Stop,
    Update,
)
from gpudock_server.core.volumes import commands as volume_commands
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.spec import Mount
from gpudock_server.model.volume import VolumeState
from gpudock_server.ports import Versioned

from tests.unit.drafts import preview, refusal
from tests.unit.failing_store import node_record
from tests.unit.model_node import SPEC, ModelNode
from tests.unit.scenario_setups import (
    DATA_MOUNT,
    MIB,
    SPEC_WITH_DATA,
    mounted_volume,
)
from tests.unit.scenarios import THREE_GPUS


async def test_volumes_that_cannot_be_mounted(model: ModelNode) -> None:
    missing = await refusal(model, Create("b", SPEC_WITH_DATA))
    assert missing.metadata == {"volume": "data", "available": ""}
    await model.run_ok(volume_commands.Create("date", size_bytes=MIB))
    assert (await refusal(model, Create("b", SPEC_WITH_DATA))).metadata["available"] == "date"
    await model.run_ok(volume_commands.Create("data", size_bytes=MIB))
    model.store.locks[ResourceKind.VOLUME, "data"] = "other"
    busy = await refusal(model, Create("b", SPEC_WITH_DATA))
    assert (busy.reason, busy.metadata) == ("VOLUME_BUSY", {"volume": "data", "operation_id": "other"})
    model.store.locks.clear()
    head = model.store.volume_records["data"]
    model.store.volume_records["data"] = Versioned(head.value.changed(state=VolumeState.DELETING), head.version)
    failed = await refusal(model, Create("b", SPEC_WITH_DATA))
    assert (failed.reason, failed.metadata["volume"], failed.metadata["call"]) == ("VOLUME_FAILED", "data", "mount")
    model.store.volume_records["data"] = Versioned(head.value.changed(node="far"), head.version)
    model.store.node_records = [node_record("far", "f:1")]
    elsewhere = await refusal(model, Create("b", SPEC_WITH_DATA))
    assert (elsewhere.metadata["node"], elsewhere.metadata["address"]) == ("far", "f:1")


async def test_a_volume_that_is_another_one_than_before_is_not_mounted_in_its_place() -> None:
    model = ModelNode()
    await mounted_volume(model)
    head = model.store.volume_records["data"]
    backing = head.value.backing
    assert backing is not None
    other = head.value.changed(backing=backing.model_copy(update={"engine_volume": "another"}))
    model.store.volume_records["data"] = Versioned(other, head.version)
    refused = await refusal(model, Scale("a", gpus=THREE_GPUS))
    assert refused.reason == "VOLUME_DIFFERS"
    assert refused.metadata == {
        "container": "a",
        "volume": "data",
        "engine_volume": backing.engine_volume,
        "recorded_engine_volume": "another",
    }
    await preview(model, Update("a", FieldChange("mounts", ())))
    await preview(model, Scale("a", cpus=1.0))


async def test_a_volume_that_is_to_be_mounted_is_locked_by_an_update(model: ModelNode) -> None:
    await model.run_ok(volume_commands.Create("data", size_bytes=MIB))
    operation = await model.run_ok(Update("a", FieldChange("mounts", (DATA_MOUNT,))))
    assert operation.locks == (model.volume().target,)
    again = await model.run_ok(Update("a", FieldChange("env", {"A": "1"})))
    assert again.locks == ()
    assert model.engine_container().volumes["/data"] == model.engine.created_specs[model.engine_id()].mounted["data"]


async def test_an_engine_volume_that_was_removed_is_made_again_where_its_files_are_gpudocks() -> None:
    model = ModelNode()
    await mounted_volume(model)
    await model.run_ok(Stop("a"))
    backing = model.volume().backing
    assert backing is not None
    removed = model.engine.volumes.pop(backing.engine_volume)
    await model.run_ok(Start("a", gpus=THREE_GPUS))
    assert model.engine.volumes[backing.engine_volume] == removed


async def test_what_mounts_a_host_path() -> None:
    model = ModelNode()
    spec = SPEC.changed(mounts=(Mount(host_path="/data/x", target="/x"),))
    await model.create_container(spec=spec)
    name = model.engine_container().name
    assert model.engine_container().binds == {"/x": f"/bound/{name}/data/x"}
    assert model.host_paths.renewed == [True, True]
    model.host_paths.renewed.clear()
    await model.run_ok(Stop("a"))
    await model.run_ok(Start("a"))
    assert model.host_paths.renewed == [True]
    # One that an older version made mounts it by its own name, and is given a successor at its next start.
    await model.run_ok(Stop("a"))
    engine_id = model.engine_id()
    model.engine.containers[engine_id] = replace(model.engine.containers[engine_id], binds={"/x": "/data/x"})
    assert (await preview(model, Start("a"))).plan.carry_method is LayerTransferMethod.EXCHANGE
    await model.run_ok(Start("a"))
    assert model.engine_container().binds == {"/x": f"/bound/{model.engine_container().name}/data/x"}
