"""Containers whose process exits, or that the docker command changes, before or during an operation."""

from __future__ import annotations

import pytest
from gpudock_server.core.containers.commands import (
    Clone,
    Command,
    Commit,
    Create,
    FieldChange,
    Pause,
    Restart,
    Rollback,
    Scale,
    Start,
    Stop,
    Update,
)
from gpudock_server.core.volumes import commands as volume_commands
from gpudock_server.errors import (
    ContainerNotRunning,
    EngineRejected,
    VolumeFailed,
    VolumeNotAdopted,
    VolumeNotFound,
)
from gpudock_server.model.container import ContainerState
from gpudock_server.model.engine import EngineState
from gpudock_server.model.operation import OperationState

from tests.unit.model_engine import IMAGE
from tests.unit.model_node import SPEC, ModelNode
from tests.unit.scenario_checks import FILES_OF_A
from tests.unit.scenario_setups import DATA_MOUNT, scaled_container
from tests.unit.scenarios import LABEL_CHANGE, THREE_GPUS

REJECTED = EngineRejected(call="work", status=500, detail="no")


pytestmark = pytest.mark.usefixtures("no_backoff")


@pytest.mark.parametrize("code", [0, 3])
async def test_a_new_container_whose_process_exits_is_created_with_its_exit_code(code: int) -> None:
    model = ModelNode()
    model.engine.exit_code_at_start = code
    await model.run_ok(Create("a", SPEC))
    status = model.container().status
    assert (status.state, status.exit_code) == (ContainerState.EXITED, code)
    assert len(model.claims()) == 3


@pytest.mark.parametrize(
    ("command", "code", "fails"),
    [
        (Scale("a", gpus=THREE_GPUS), 0, True),
        (Scale("a", gpus=THREE_GPUS), 3, True),
        (Update("a", FieldChange("env", {"A": "1"})), 0, False),
        (Update("a", FieldChange("env", {"A": "1"})), 3, True),
        (Restart("a"), 3, False),
    ],
)
async def test_a_successor_whose_process_exits(model: ModelNode, command: Command, code: int, *, fails: bool) -> None:
    before = model.summary()
    start, engine_id = model.engine.start, model.engine_id()

    async def start_and_exit(started: str) -> None:
        stays = started == engine_id and not isinstance(command, Restart)
        model.engine.exit_code_at_start = None if stays else code
        await start(started)

    model.engine.start = start_and_exit  # type: ignore[method-assign, assignment]
    operation = await model.run(command)
    if not fails:
        assert operation.facts("verify") == {"exit_code": code}
        assert (model.container().status.state, model.container().status.exit_code) == (ContainerState.EXITED, code)
        return
    assert operation.error is not None
    assert operation.error.reason == "START_FAILED"
    assert operation.error.metadata == {
        "container": "a",
        "detail": f"its process exited with code {code} within 3 s of its start",
    }
    assert model.summary() == before


async def test_the_layer_of_a_running_container_is_not_transferred(model: ModelNode) -> None:
    complete, old = model.snapshots.complete, model.engine_id()

    async def complete_and_start(*args: object) -> None:
        await complete(*args)  # type: ignore[arg-type]  # passes its arguments on
        model.engine._set(old, EngineState.RUNNING)

    model.snapshots.complete = complete_and_start  # type: ignore[method-assign, assignment]
    operation = await model.run(Scale("a", gpus=THREE_GPUS))
    assert operation.error is not None
    assert operation.error.reason == "LAYER_CARRY_FAILED"
    assert operation.error.metadata["detail"].endswith("is running; it must be stopped")
    assert operation.error.metadata["method"] == "EXCHANGE"
    assert model.files() == FILES_OF_A
    assert len(model.engine.containers) == 1


async def test_a_successor_with_the_files_is_kept_if_the_old_container_was_removed(model: ModelNode) -> None:
    start, old = model.engine.start, model.engine_id()

    async def remove_old_and_fail(engine_id: str) -> None:
        model.engine.containers.pop(old, None)
        await start(engine_id)
        raise REJECTED

    model.engine.start = remove_old_and_fail  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(Scale("a", gpus=THREE_GPUS))
    assert operation.state is OperationState.FAILED
    assert "its successor is kept as it is" in operation.message
    (successor,) = model.engine.containers
    assert model.engine.files(successor) == FILES_OF_A
    assert model.container().status.state is ContainerState.FAILED


async def test_a_container_that_is_removed_during_a_scale_is_failed(model: ModelNode) -> None:
    locate = model.layers.locate

    async def remove_and_locate(*args: object) -> object:
        del model.engine.containers[model.engine_id()]
        return await locate(*args)  # type: ignore[arg-type]  # passes its arguments on

    model.layers.locate = remove_and_locate  # type: ignore[method-assign, assignment]
    operation = await model.run(Scale("a", gpus=THREE_GPUS))
    assert operation.error is not None
    assert operation.error.reason == "SNAPSHOT_FAILED"
    assert (
        operation.error.metadata["detail"]
        == f"engine container {model.engine_id()[:12]} was removed during the operation"
    )
    assert not model.engine.containers
    assert model.container().status.state is ContainerState.FAILED
    model.check_consistency()


async def test_a_volume_with_a_hazard_is_not_mounted(model: ModelNode) -> None:
    await model.run_ok(volume_commands.Create("data"))
    await model.run_ok(Update("a", FieldChange("mounts", (DATA_MOUNT,))))
    backing = model.volume().backing
    assert backing is not None
    found = model.engine.volumes[backing.engine_volume]
    model.engine.volumes[backing.engine_volume] = found.model_copy(update={"hazard": "it mounts /etc"})
    for command in (Restart("a"), Scale("a", gpus=THREE_GPUS), Create("b", SPEC.changed(mounts=(DATA_MOUNT,)))):
        with pytest.raises(VolumeFailed) as refused:
            await model.begin(command)
        assert (refused.value.volume, refused.value.call) == ("data", "mount")
        assert "it mounts /etc" in refused.value.detail
    await model.run_ok(Stop("a"))
    del model.engine.volumes[backing.engine_volume]
    operation = await model.run(Start("a", gpus=THREE_GPUS))
    assert operation.error is not None
    assert "and its files were removed outside gpudock" in operation.error.metadata["detail"]


async def test_an_engine_volume_must_be_adopted_before_it_is_mounted(model: ModelNode) -> None:
    await model.engine.create_volume("data", labels={"gpudock.adopt": "true"}, driver_options={})
    with pytest.raises(VolumeNotAdopted):
        await model.begin(Update("a", FieldChange("mounts", (DATA_MOUNT,))))
    others: list[dict[str, object]] = [{"anonymous": True}, {"hazard": "it mounts /"}, {"labels": {}}]
    for changes in others:
        theirs = model.engine.volumes["data"]
        model.engine.volumes["data"] = theirs.model_copy(update=changes)
        with pytest.raises(VolumeNotFound) as missing:
            await model.begin(Update("a", FieldChange("mounts", (DATA_MOUNT,))))
        assert not isinstance(missing.value, VolumeNotAdopted)
        model.engine.volumes["data"] = theirs


@pytest.mark.parametrize(
    ("command", "needs"),
    [
        (Start("a"), "to start it, it must be STOPPED or EXITED"),
        (Restart("a"), "to restart it, it must be RUNNING, PAUSED, STOPPED or EXITED"),
        (Scale("a", cpus=1.0), "to scale it, it must be RUNNING, STOPPED or EXITED"),
        (Update("a", FieldChange("env", {})), "to update it, it must be RUNNING, STOPPED or EXITED"),
        (Rollback("a", 1), "to roll it back, it must be RUNNING, STOPPED, EXITED or FAILED"),
        (Stop("a"), "it has no process to stop; it can be deleted"),
        (Pause("a"), "to pause it, it must be RUNNING"),
        (Commit("a", "x:y"), "its current files are lost; clone one of its revisions and commit the clone"),
    ],
)
async def test_a_refusal_names_the_states_that_the_command_needs(
    model: ModelNode, command: Command, needs: str
) -> None:
    model.store.put(model.container().with_status(state=ContainerState.CREATING))
    with pytest.raises(ContainerNotRunning) as refused:
        await model.begin(command)
    assert refused.value.metadata == {"container": "a", "state": "CREATING", "needs": needs}


async def test_a_container_whose_removal_is_not_recorded_is_refused_as_failed(model: ModelNode) -> None:
    model.engine.containers.clear()
    with pytest.raises(ContainerNotRunning) as refused:
        await model.begin(Clone("b", "a", LABEL_CHANGE))
    assert refused.value.needs == "its current files are lost; clone one of its revisions"
    with pytest.raises(ContainerNotRunning) as refused:
        await model.begin(Scale("a", gpus=THREE_GPUS))
    assert refused.value.metadata["state"] == "FAILED"


async def test_a_container_without_its_engine_container_is_restored_with_or_without_files() -> None:
    model = ModelNode()
    await scaled_container(model)
    model.engine.containers.clear()
    model.store.put(model.container().with_status(state=ContainerState.FAILED))
    plan = (await model.containers.preview(Rollback("a", 2, spec_only=True))).plan
    assert "the files of a are lost" in plan.warnings[-1]
    await model.run_ok(Rollback("a", 1))
    assert model.files() == FILES_OF_A
    model.engine.containers.clear()
    model.store.put(model.container().with_status(state=ContainerState.FAILED))
    await model.run_ok(Rollback("a", 3, spec_only=True))
    assert model.files() == {IMAGE}
