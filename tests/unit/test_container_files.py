"""The files of containers: in snapshots, clones, commits, rollbacks, and what a deletion leaves of them."""

from __future__ import annotations

import pytest
from gpudock_server.core.containers.commands import (
    Clone,
    Commit,
    Delete,
    Pause,
    Rollback,
    Scale,
    Start,
    Stop,
)
from gpudock_server.errors import (
    DiskFull,
    EngineRejected,
    ImageExists,
    SnapshotFailed,
)
from gpudock_server.model.container import ContainerState
from gpudock_server.model.engine import EngineState
from gpudock_server.model.image import CommittedImage
from gpudock_server.model.operation import LayerTransferMethod, OperationState
from gpudock_server.model.spec import GpuRequest, SnapshotPolicy
from gpudock_server.ports import LayerTooLarge

from tests.unit.model_engine import OTHER_IMAGE
from tests.unit.model_node import ModelNode
from tests.unit.scenario_checks import FILES_OF_A, check_rolled_back
from tests.unit.scenario_setups import scaled_container, transfer_by_commits
from tests.unit.scenarios import LABEL_CHANGE, THREE_GPUS

REJECTED = EngineRejected(call="work", status=500, detail="no")


pytestmark = pytest.mark.usefixtures("no_backoff")


@pytest.mark.parametrize("step", ["gather", "complete"])
async def test_a_layer_that_grows_too_large_has_no_snapshot_unless_the_call_requires_one(
    model: ModelNode, step: str
) -> None:
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
async def test_a_failed_snapshot_does_not_prevent_a_stop(model: ModelNode, step: str, error: Exception) -> None:
    model.configure_history(on_stop=True)
    model.snapshots.failures[step] = error
    operation = await model.run(Stop("a"))
    assert operation.state is OperationState.SUCCEEDED
    assert operation.message == f"no snapshot: {error}"
    assert model.container().status.state is ContainerState.STOPPED
    assert model.store.revision_views[model.container().uid, 1].snapshot is None
    assert not model.snapshots.sealed_snapshots


async def test_a_stop_without_a_possible_snapshot_stops(model: ModelNode) -> None:
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
    # A commit to an image would delay the stop.
    assert plan.snapshot is None
    assert plan.warnings


async def test_files_written_during_a_clone_or_commit_are_copied(model: ModelNode) -> None:
    model.engine.write(model.engine_id(), "late")
    await model.run_ok(Clone("b", "a", LABEL_CHANGE))
    assert model.files("b") == FILES_OF_A | {"late"}
    await model.run_ok(Commit("a", "team/model:v1"))
    assert model.engine.images[model.engine.tags["team/model:v1"]].files == FILES_OF_A | {"late"}


async def test_a_commit_of_a_layer_that_grows_too_large_is_undone(model: ModelNode) -> None:
    before = model.summary()
    model.snapshots.failures["mirror"] = LayerTooLarge("10 files")
    operation = await model.run(Commit("a", "team/model:v1"))
    assert operation.error is not None
    assert operation.error.metadata == {"detail": "the layer is too large to copy: 10 files"}
    assert model.summary() == before


async def test_a_commit_does_not_take_a_name_that_another_image_got_meanwhile(model: ModelNode) -> None:
    image = model.engine.image

    async def tag_at_second_call(reference: str) -> object:
        if reference == "team/model:v1" and any(name.startswith("gpudock/commit") for name in model.engine.tags):
            calls.append(reference)
            if len(calls) == 2:
                model.engine.tags[reference] = model.engine.tags[OTHER_IMAGE]
        return await image(reference)

    calls: list[str] = []
    model.engine.image = tag_at_second_call  # type: ignore[method-assign, assignment]
    operation = await model.run(Commit("a", "team/model:v1"))
    assert operation.error is not None
    assert operation.error.reason == "IMAGE_EXISTS"
    assert model.engine.tags["team/model:v1"] == model.engine.tags[OTHER_IMAGE]
    assert not [name for name in model.engine.tags if name.startswith("gpudock/")]


async def test_stopped_and_paused_containers_are_committed_without_a_freeze(model: ModelNode) -> None:
    await model.run_ok(Pause("a"))
    commit = Commit("a", "team/model:v1", author="me", comment="note", changes=("USER a",))
    operation = await model.run_ok(commit)
    committed = model.engine.images[model.engine.tags["team/model:v1"]]
    assert committed.commit_options == ("me", "note", "USER a")
    assert committed.config == f"container {model.engine_id()}"
    assert "freeze" not in [stage.name for stage in operation.stages]
    assert model.engine_container().state is EngineState.PAUSED
    await model.run_ok(Stop("a"))
    image = (await model.run_ok(Commit("a", "team/model:v2"))).result
    assert image is not None
    assert image.name == "team/model:v2"
    assert model.store.origins["gpu1", model.engine.tags["team/model:v2"]].restricted is False


async def test_a_committed_image_belongs_to_the_owner_of_its_container(model: ModelNode) -> None:
    model.store.put(model.container().changed(owner="alice"))
    operation = await model.run_ok(Commit("a", "docker.io/library/model:v1", comment="note"))
    image_id = model.engine.tags["docker.io/library/model:v1"]
    image = model.engine.images[image_id]
    # A file holder was committed, with the config of the container itself.
    assert (image.commit_options, image.config) == (("", "note"), f"container {model.engine_id()}")
    origin = model.store.origins["gpu1", image_id]
    assert (origin.node, origin.committed_as, origin.committed_for) == ("gpu1", "model:v1", "alice")
    assert (origin.restricted, origin.owners) == (True, ("alice",))
    result = operation.result
    assert isinstance(result, CommittedImage)
    assert (result.image_id, result.size_bytes) == (image_id, len(image.files))
    assert (result.container, result.revision) == ("a", 1)
    # A commit replaces a name only if a commit of the same owner gave it.
    model.store.put(model.container().changed(owner="bob"))
    with pytest.raises(ImageExists):
        await model.begin(Commit("a", "docker.io/library/model:v1"))


async def test_a_rollback_restores_deleted_files_and_removes_later_files() -> None:
    model = ModelNode()
    await scaled_container(model)
    await model.run_ok(Rollback("a", 1))
    check_rolled_back(model)
    await model.run_ok(Rollback("a", 2))
    assert model.files() == FILES_OF_A | {"later"}
    assert model.container().revision == 4
    assert model.container().spec.gpus.count == 3


async def test_a_deleted_container_leaves_no_image_volume_claim_or_backup(model: ModelNode) -> None:
    await transfer_by_commits(model, 2)
    await model.run_ok(Scale("a", gpus=GpuRequest(count=1)))
    uid = model.container().uid
    assert await model.revision_backups.read(uid)
    await model.run_ok(Delete("a", force=True))
    assert not [name for name in model.engine.tags if name.startswith("gpudock/")]
    assert not model.engine.volumes
    assert not await model.revision_backups.read(uid)
    assert not model.store.holders["host1"]


async def test_revisions_are_written_to_the_backup(model: ModelNode) -> None:
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
