"""Operations on a container whose state changes while they run: its process ends, or the docker command changes it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from gpudock_server.core.containers import images
from gpudock_server.core.containers.commands import (
    Clone,
    Command,
    Commit,
    Create,
    Delete,
    FieldChange,
    FilesPolicy,
    Pause,
    PullPolicy,
    Restart,
    Rollback,
    Scale,
    Start,
    Stop,
    Update,
)
from gpudock_server.core.containers.layer_images import MAX_LAYERS, MAX_LAYERS_ABOVE_BASE, needs_flattening
from gpudock_server.core.volumes import commands as volume_commands
from gpudock_server.errors import (
    ContainerNotRunning,
    DiskFull,
    EngineRejected,
    ImageExists,
    SnapshotFailed,
    VolumeFailed,
    VolumeNotAdopted,
    VolumeNotFound,
)
from gpudock_server.model.container import ContainerState
from gpudock_server.model.engine import EngineState, RegistryAuth
from gpudock_server.model.image import CommittedImage
from gpudock_server.model.operation import LayerTransferMethod, Operation, OperationState
from gpudock_server.model.spec import ContainerSpec, GpuRequest, SnapshotPolicy
from gpudock_server.ports import LayerTooLarge, Progress

from tests.unit.model_engine import IMAGE, OTHER_IMAGE, REMOTE_IMAGE
from tests.unit.model_node import SPEC, ModelNode
from tests.unit.scenario_checks import FILES_OF_A, check_rolled_back
from tests.unit.scenario_setups import DATA_MOUNT, scaled_container
from tests.unit.scenarios import LABEL_CHANGE, THREE_GPUS

REJECTED = EngineRejected(call="work", status=500, detail="no")


pytestmark = pytest.mark.usefixtures("no_backoff")


def reason(operation: Operation) -> str:
    return operation.error.reason if operation.error else ""


# -- processes that end ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 3])
async def test_a_new_container_whose_process_ends_is_made_and_says_so(code: int) -> None:
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
async def test_a_successor_whose_process_ends(model: ModelNode, command: Command, code: int, *, fails: bool) -> None:
    before = model.summary()
    start, engine_id = model.engine.start, model.engine_id()

    async def ends(one: str) -> None:
        model.engine.exit_code_at_start = None if one == engine_id and not isinstance(command, Restart) else code
        await start(one)

    model.engine.start = ends  # type: ignore[method-assign, assignment]
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


# -- changed by the docker command -------------------------------------------------------------------------------------


async def test_a_layer_that_is_written_to_is_not_carried(model: ModelNode) -> None:
    complete, old = model.snapshots.complete, model.engine_id()

    async def and_start_it(*args: object) -> None:
        await complete(*args)  # type: ignore[arg-type]  # what it was given
        model.engine._set(old, EngineState.RUNNING)

    model.snapshots.complete = and_start_it  # type: ignore[method-assign, assignment]
    operation = await model.run(Scale("a", gpus=THREE_GPUS))
    assert operation.error is not None
    assert operation.error.reason == "LAYER_CARRY_FAILED"
    assert operation.error.metadata["detail"].endswith("is running; it must be stopped")
    assert operation.error.metadata["method"] == "EXCHANGE"
    assert model.files() == FILES_OF_A
    assert len(model.engine.containers) == 1


async def test_a_successor_that_has_the_files_is_kept_where_the_old_one_is_gone(model: ModelNode) -> None:
    start, old = model.engine.start, model.engine_id()

    async def lose_the_old(engine_id: str) -> None:
        model.engine.containers.pop(old, None)
        await start(engine_id)
        raise REJECTED

    model.engine.start = lose_the_old  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(Scale("a", gpus=THREE_GPUS))
    assert operation.state is OperationState.FAILED
    assert "its successor is kept as it is" in operation.message
    (left,) = model.engine.containers
    assert model.engine.files(left) == FILES_OF_A
    assert model.container().status.state is ContainerState.FAILED


async def test_a_container_that_vanishes_while_it_is_changed(model: ModelNode) -> None:
    locate = model.layers.locate

    async def lose_it(*args: object) -> object:
        del model.engine.containers[model.engine_id()]
        return await locate(*args)  # type: ignore[arg-type]  # what it was given

    model.layers.locate = lose_it  # type: ignore[method-assign, assignment]
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


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["gather", "complete"])
async def test_a_layer_that_grows_too_large_is_not_kept(model: ModelNode, step: str) -> None:
    model.snapshots.failures[step] = LayerTooLarge("10 files")
    operation = await model.run(Scale("a", cpus=1.5))
    assert operation.state is OperationState.SUCCEEDED
    assert operation.message == "snapshot skipped: the layer is too large: 10 files"
    view = model.store.revision_views[model.container().uid, 1]
    assert (view.snapshot, view.snapshot_warning) == (None, "the layer was too large for a snapshot: 10 files")
    before = model.summary()
    operation = await model.run(Scale("a", cpus=2.5, snapshots=SnapshotPolicy.ALWAYS))
    assert operation.error is not None
    assert operation.error.reason == "SNAPSHOT_FAILED"
    assert "10 files" in operation.error.message
    assert model.summary() == before


@pytest.mark.parametrize("step", ["gather", "complete"])
@pytest.mark.parametrize(
    "error",
    [SnapshotFailed(detail="no"), DiskFull(path="/", needed_bytes=2, available_bytes=1)],
    ids=lambda error: type(error).__name__,
)
async def test_what_keeps_files_never_stands_against_a_stop(model: ModelNode, step: str, error: Exception) -> None:
    model.configure_history(on_stop=True)
    model.snapshots.failures[step] = error
    operation = await model.run(Stop("a"))
    assert operation.state is OperationState.SUCCEEDED
    assert operation.message == f"no snapshot: {error}"
    assert model.container().status.state is ContainerState.STOPPED
    assert model.store.revision_views[model.container().uid, 1].snapshot is None
    assert not model.snapshots.sealed_snapshots


async def test_a_stop_that_cannot_plan_to_keep_files_stops(model: ModelNode) -> None:
    model.configure_history(on_stop=True)

    async def refused(*_: object) -> None:
        raise SnapshotFailed(detail="no")

    model.snapshots.plan = refused  # type: ignore[method-assign, assignment]
    plan = (await model.containers.preview(Stop("a"))).plan
    assert plan.warnings == (f"no snapshot: {SnapshotFailed(detail='no')}",)
    await model.run_ok(Stop("a"))
    await model.run_ok(Start("a"))
    model.snapshots.method_result = (None, "no")
    plan = (await model.containers.preview(Stop("a"))).plan
    # An image would hold up the stop.
    assert plan.snapshot is None
    assert plan.warnings


async def test_what_is_written_while_files_are_copied_comes_along(model: ModelNode) -> None:
    model.engine.write(model.engine_id(), "late")
    await model.run_ok(Clone("b", "a", LABEL_CHANGE))
    assert model.files("b") == FILES_OF_A | {"late"}
    await model.run_ok(Commit("a", "team/model:v1"))
    assert model.engine.images[model.engine.tags["team/model:v1"]].files == FILES_OF_A | {"late"}


async def test_a_commit_of_a_layer_that_grows_too_large_fails_and_leaves_nothing(model: ModelNode) -> None:
    before = model.summary()
    model.snapshots.failures["mirror"] = LayerTooLarge("10 files")
    operation = await model.run(Commit("a", "team/model:v1"))
    assert operation.error is not None
    assert operation.error.metadata == {"detail": "the layer is too large to copy: 10 files"}
    assert model.summary() == before


async def test_a_commit_does_not_take_a_name_that_another_image_was_given_meanwhile(model: ModelNode) -> None:
    image = model.engine.image

    async def looked(reference: str) -> object:
        if reference == "team/model:v1" and any(name.startswith("gpudock/commit") for name in model.engine.tags):
            looks.append(reference)
            if len(looks) == 2:
                model.engine.tags[reference] = model.engine.tags[OTHER_IMAGE]
        return await image(reference)

    looks: list[str] = []
    model.engine.image = looked  # type: ignore[method-assign, assignment]
    operation = await model.run(Commit("a", "team/model:v1"))
    assert operation.error is not None
    assert operation.error.reason == "IMAGE_EXISTS"
    assert model.engine.tags["team/model:v1"] == model.engine.tags[OTHER_IMAGE]
    assert not [name for name in model.engine.tags if name.startswith("gpudock/")]


async def test_a_stopped_and_a_frozen_container_are_committed_as_they_are(model: ModelNode) -> None:
    await model.run_ok(Pause("a"))
    commit = Commit("a", "team/model:v1", author="me", comment="note", changes=("USER a",))
    operation = await model.run_ok(commit)
    made = model.engine.images[model.engine.tags["team/model:v1"]]
    assert made.commit_options == ("me", "note", "USER a")
    assert made.config == f"container {model.engine_id()}"
    assert "freeze" not in [stage.name for stage in operation.stages]
    assert model.engine_container().state is EngineState.PAUSED
    await model.run_ok(Stop("a"))
    image = (await model.run_ok(Commit("a", "team/model:v2"))).result
    assert image is not None
    assert image.name == "team/model:v2"
    assert model.store.origins["gpu1", model.engine.tags["team/model:v2"]].restricted is False


async def test_an_image_that_was_committed_is_its_owners(model: ModelNode) -> None:
    model.store.put(model.container().changed(owner="alice"))
    operation = await model.run_ok(Commit("a", "docker.io/library/model:v1", comment="note"))
    image_id = model.engine.tags["docker.io/library/model:v1"]
    made = model.engine.images[image_id]
    # A shadow was committed, with the config of the container itself.
    assert (made.commit_options, made.config) == (("", "note"), f"container {model.engine_id()}")
    origin = model.store.origins["gpu1", image_id]
    assert (origin.node, origin.committed_as, origin.committed_for) == ("gpu1", "model:v1", "alice")
    assert (origin.restricted, origin.owners) == (True, ("alice",))
    result = operation.result
    assert isinstance(result, CommittedImage)
    assert (result.image_id, result.size_bytes) == (image_id, len(made.files))
    assert (result.container, result.revision) == ("a", 1)
    # What its own commit gave a name may be replaced by the next, and nobody else's.
    model.store.put(model.container().changed(owner="bob"))
    with pytest.raises(ImageExists):
        await model.begin(Commit("a", "docker.io/library/model:v1"))


async def test_an_older_versions_volume_that_is_a_part_of_the_host_is_not_mounted(model: ModelNode) -> None:
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


async def test_a_volume_that_is_the_engines_is_to_be_adopted_before_it_is_mounted(model: ModelNode) -> None:
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
async def test_what_a_state_would_have_to_be(model: ModelNode, command: Command, needs: str) -> None:
    model.store.put(model.container().with_status(state=ContainerState.CREATING))
    with pytest.raises(ContainerNotRunning) as refused:
        await model.begin(command)
    assert refused.value.metadata == {"container": "a", "state": "CREATING", "needs": needs}


async def test_a_clone_of_what_is_gone_and_not_known_to_be(model: ModelNode) -> None:
    model.engine.containers.clear()
    with pytest.raises(ContainerNotRunning) as refused:
        await model.begin(Clone("b", "a", LABEL_CHANGE))
    assert refused.value.needs == "its current files are lost; clone one of its revisions"
    with pytest.raises(ContainerNotRunning) as refused:
        await model.begin(Scale("a", gpus=THREE_GPUS))
    assert refused.value.metadata["state"] == "FAILED"


async def test_an_image_that_is_gone_is_pulled_for_one_that_begins_anew() -> None:
    model = ModelNode()
    await model.create_container(spec=SPEC.changed(image=REMOTE_IMAGE))
    model.engine.containers.clear()
    del model.engine.images[model.engine.tags.pop(REMOTE_IMAGE)]
    model.store.put(model.container().with_status(state=ContainerState.FAILED))
    operation = await model.run_ok(Rollback("a", 1, spec_only=True))
    assert operation.stages[0].name == "pull"
    # A pull may take long: a stop leaves it, and a start does not wait for it.
    operation = operation.changed(arguments=model.store.arguments[operation.id])
    assert model.core.container_use_cases.saga_builders[operation.kind](operation).steps[0].interruptible is True
    assert model.files() == {"remote"}
    assert "will be pulled" in operation.plan.warnings[-1]


async def test_a_rollback_brings_back_deleted_files_and_forgets_later_ones() -> None:
    model = ModelNode()
    await scaled_container(model)
    await model.run_ok(Rollback("a", 1))
    check_rolled_back(model)
    await model.run_ok(Rollback("a", 2))
    assert model.files() == FILES_OF_A | {"later"}
    assert model.container().revision == 4
    assert model.container().spec.gpus.count == 3


async def test_one_whose_engine_container_is_gone_is_brought_back_or_begins_anew() -> None:
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


# -- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "base", "deep"),
    [
        (MAX_LAYERS - 1, MAX_LAYERS - 2, False),
        (MAX_LAYERS, MAX_LAYERS - 1, True),
        (MAX_LAYERS_ABOVE_BASE + 1, 1, False),
        (MAX_LAYERS_ABOVE_BASE + 2, 1, True),
    ],
)
def test_when_an_image_is_squashed(layers: int, base: int, *, deep: bool) -> None:
    assert needs_flattening(layers, base) is deep


async def carried_often(model: ModelNode, times: int) -> int:
    """Carry by commit so often; the number of layers then."""
    model.layers.method = LayerTransferMethod.COMMIT
    for number in range(times):
        model.engine.write(model.engine_id(), f"file {number}")
        await model.run_ok(Update("a", FieldChange("env", {"A": str(number)})))
    return len(model.engine.images[model.engine_container().image_id].layers)


async def test_an_image_that_gets_too_deep_is_squashed_onto_the_users(model: ModelNode) -> None:
    model.configure_history(keep_revisions=2)
    assert await carried_often(model, MAX_LAYERS_ABOVE_BASE) == MAX_LAYERS_ABOVE_BASE + 1
    # What has written nothing adds no layer.
    model.engine.write(model.engine_id(), "last")
    await model.run_ok(Update("a", FieldChange("env", {"B": ""})))
    image = model.engine.images[model.engine_container().image_id]
    assert len(image.layers) == 2
    assert image.layers[0] == model.engine.images[model.engine.tags[IMAGE]].layers[0]
    assert image.config == IMAGE
    assert model.files() == FILES_OF_A | {"last"} | {f"file {number}" for number in range(MAX_LAYERS_ABOVE_BASE)}
    assert model.container().engine.base_depth == 1  # type: ignore[union-attr]  # it exists


async def test_one_that_cannot_be_squashed_stays_deep(model: ModelNode) -> None:
    await carried_often(model, MAX_LAYERS_ABOVE_BASE)
    model.engine.write(model.engine_id(), "last")

    async def refused(*_: object, **__: object) -> str:
        raise DiskFull(path="/", needed_bytes=2, available_bytes=1)

    model.engine.flatten = refused  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(Update("a", FieldChange("env", {"B": ""})))
    assert operation.state is OperationState.SUCCEEDED
    assert operation.message.startswith(f"layers not flattened ({MAX_LAYERS_ABOVE_BASE + 2} layers): ")
    assert len(model.engine.images[model.engine_container().image_id].layers) == MAX_LAYERS_ABOVE_BASE + 2


async def test_an_engine_that_gives_no_other_config_carries_with_its_own(model: ModelNode) -> None:
    model.layers.method = LayerTransferMethod.COMMIT

    async def refused(*_: object) -> str:
        raise REJECTED

    model.engine.replace_config = refused  # type: ignore[method-assign, assignment]
    operation = await model.run(Scale("a", gpus=THREE_GPUS))
    assert operation.state is OperationState.SUCCEEDED
    assert "keeps the container's environment and command" in operation.message
    assert model.files() == FILES_OF_A
    assert not [name for name in model.engine.tags if name.startswith("gpudock/raw")]


async def test_files_cannot_be_grafted_from_an_image_that_is_not_there(model: ModelNode) -> None:
    head = model.container()
    assert head.engine is not None
    model.store.put(head.changed(engine=head.engine.model_copy(update={"base_image_id": "sha256:gone"})))
    operation = await model.run(Update("a", FieldChange("image", OTHER_IMAGE), files=FilesPolicy.CARRY_COMMIT))
    assert operation.error is not None
    assert operation.error.metadata["detail"] == "the base image of its layer is no longer in the engine"


async def test_a_pull_that_does_not_move_fails_and_says_since_when(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_STALL_NOTICE_SECONDS", 0.02)
    model = ModelNode()

    async def stuck(_name: str, _auth: RegistryAuth | None, progress: Progress) -> None:
        progress(1, 2)
        await asyncio.Event().wait()

    model.engine.pull = stuck  # type: ignore[method-assign, assignment]
    command = Create("a", ContainerSpec(image=REMOTE_IMAGE), pull_stall_seconds=0.2)
    operation_id = await model.begin(command)
    messages = {snapshot.message async for snapshot in model.operations.watch(operation_id)}
    assert [one for one in messages if one.startswith("pull stalled since") and "it fails after 0.2 s" in one]
    operation = await model.ended_operation(operation_id)
    assert operation.error is not None
    assert operation.error.reason == "IMAGE_PULL_FAILED"
    assert operation.error.metadata["image"] == REMOTE_IMAGE
    assert operation.error.metadata["detail"].startswith("no progress for 0.2 s (last at ")
    assert operation.stages[0].name == "pull"


async def test_an_image_that_does_not_come_is_not_found() -> None:
    model = ModelNode()

    async def empty(*_: object) -> None:
        return

    model.engine.pull = empty  # type: ignore[method-assign, assignment]
    operation = await model.run(Create("a", ContainerSpec(image=REMOTE_IMAGE)))
    assert operation.error is not None
    assert (operation.error.reason, operation.error.metadata) == ("IMAGE_NOT_FOUND", {"image": REMOTE_IMAGE})


async def test_what_is_pulled_with_credentials_is_for_who_showed_them() -> None:
    model, auth = ModelNode(), RegistryAuth(username="u", password="p")  # noqa: S106 - of nothing
    spec = ContainerSpec(image=REMOTE_IMAGE)
    given: list[RegistryAuth | None] = []
    pull = model.engine.pull

    async def noted(reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
        given.append(auth)
        await pull(reference, auth, progress)

    model.engine.pull = noted  # type: ignore[method-assign]  # this call alone differs
    await model.run_ok(Create("a", spec, owner="alice", registry_auth=auth))
    origin = model.store.origins["gpu1", "sha256:remote"]
    assert (origin.restricted, origin.owners) == (True, ("alice",))
    await model.run_ok(Create("b", spec, owner="bob", pull_policy=PullPolicy.ALWAYS))
    origin = model.store.origins["gpu1", "sha256:remote"]
    assert (origin.restricted, origin.owners) == (True, ("alice", "bob"))
    await model.run_ok(Create("c", spec, owner="bob", registry_auth=auth, pull_policy=PullPolicy.ALWAYS))
    assert model.store.origins["gpu1", "sha256:remote"] == origin
    assert given == [auth, None, auth]


async def test_an_image_that_came_with_a_pull_that_was_undone_is_for_nobody() -> None:
    model, auth = ModelNode(), RegistryAuth(identity_token="t")  # noqa: S106 - of nothing

    async def refused(_: object) -> str:
        raise REJECTED

    model.engine.create = refused  # type: ignore[method-assign, assignment]
    spec = ContainerSpec(image=REMOTE_IMAGE)
    assert reason(await model.run(Create("a", spec, owner="alice", registry_auth=auth))) == "ENGINE_REJECTED"
    origin = model.store.origins["gpu1", "sha256:remote"]
    assert origin.restricted
    model.store.origins.clear()
    # Without credentials, and of what was there before, nothing is restricted.
    for image in (REMOTE_IMAGE, IMAGE):
        command = Create("a", ContainerSpec(image=image), pull_policy=PullPolicy.ALWAYS, registry_auth=None)
        model.engine.registry[IMAGE] = model.engine.images[model.engine.tags[IMAGE]]
        assert reason(await model.run(command)) == "ENGINE_REJECTED"
        assert reason(await model.run(replace(command, registry_auth=auth))) == "ENGINE_REJECTED"
    assert not model.store.origins


# -- what goes with a container --------------------------------------------------------------------------------------


async def test_with_a_container_goes_all_that_was_made_for_it(model: ModelNode) -> None:
    await carried_often(model, 2)
    await model.run_ok(Scale("a", gpus=GpuRequest(count=1)))
    uid = model.container().uid
    assert await model.revision_backups.read(uid)
    await model.run_ok(Delete("a", force=True))
    assert not [name for name in model.engine.tags if name.startswith("gpudock/")]
    assert not model.engine.volumes
    assert not await model.revision_backups.read(uid)
    assert not model.store.holders["host1"]


async def test_the_history_is_written_beside_the_store(model: ModelNode) -> None:
    model.layers.method = LayerTransferMethod.COMMIT
    await model.run_ok(Scale("a", gpus=THREE_GPUS))
    first, second = await model.revision_backups.read(model.container().uid)
    assert (first.number, second.number) == (1, 2)
    assert first.snapshot is not None
    assert first.snapshot.image_id == model.engine_container().image_id
    assert second.revision.spec == model.container().spec
    assert second.engine == model.container().engine
    assert (second.owner, second.create_time, second.snapshot) == (
        model.container().owner,
        model.container().create_time,
        None,
    )

    async def refused(_: object) -> None:
        raise SnapshotFailed(detail="no")

    model.revision_backups.write = refused  # type: ignore[method-assign, assignment]
    await model.run_ok(Scale("a", gpus=GpuRequest(count=1)))
