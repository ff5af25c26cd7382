"""What a model node must hold after a scenario's command."""

from __future__ import annotations

from collections.abc import Callable

from gpudock_server.model.container import Container, ContainerState, RevisionCause
from gpudock_server.model.engine import EngineState
from gpudock_server.model.snapshot import SnapshotKind
from gpudock_server.model.volume import VolumeState

from tests.unit.model_engine import IMAGE, OTHER_IMAGE, REMOTE_IMAGE
from tests.unit.model_node import ModelNode
from tests.unit.scenario_setups import MIB

FILES_OF_A = frozenset({IMAGE, "by a"})


def check_running(
    model: ModelNode,
    *,
    revision: int,
    gpu_count: int = 2,
    name: str = "a",
    files: frozenset[str],
    cause: RevisionCause | None = None,
) -> Container:
    """Check a container that runs after an operation; with `cause`, check the revision that the operation created."""
    container, engine_container = model.container(name), model.engine_container(name)
    assert (container.status.state, engine_container.state) == (ContainerState.RUNNING, EngineState.RUNNING)
    assert container.revision == revision
    assert container.status.holds_resources
    assert len(container.status.placement.gpu_uuids) == container.spec.gpus.size == gpu_count
    assert engine_container.gpu_uuids == container.status.placement.gpu_uuids
    assert engine_container.ports == container.status.placement.ports
    assert len(model.claims(name)) == gpu_count + 1
    assert model.files(name) == files
    assert set(model.engine.containers) == {model.engine_id(other) for other in model.store.container_records}
    assert container.engine is not None
    assert model.store.revision_views[container.uid, revision].revision.spec == container.spec
    assert model.store.revision_views[container.uid, revision].revision.image_id == container.engine.user_image_id
    if cause is not None:
        assert model.store.revision_views[container.uid, revision].revision.cause is cause
        assert model.store.revision_views[container.uid, revision].revision.operation_id == model.last_operation_id
    return container


def check_labels(model: ModelNode, name: str, *, revision: int, owner: str) -> None:
    """Check the labels of an engine container, from which a lost record is restored."""
    labels, container = model.engine.created_specs[model.engine_id(name)].labels, model.container(name)
    assert (labels["gpudock.uid"], labels["gpudock.name"]) == (container.uid, name)
    assert (labels["gpudock.revision"], labels["gpudock.owner"]) == (str(revision), owner)


def running_check(*, revision: int, files: frozenset[str], gpu_count: int = 2) -> Callable[[ModelNode], None]:
    """Return `check_running` with these arguments, as the check of a scenario."""

    def check(model: ModelNode) -> None:
        check_running(model, revision=revision, gpu_count=gpu_count, files=files)

    return check


def check_created(model: ModelNode) -> None:
    """The container runs with its image, volume, host path and labels."""
    container = check_running(model, revision=1, files=frozenset({"remote"}), cause=RevisionCause.CREATED)
    engine_spec = model.engine.created_specs[model.engine_id()]
    assert engine_spec.hostname == "a"
    assert engine_spec.spec == container.spec
    assert container.owner == "alice"
    check_labels(model, "a", revision=1, owner="alice")
    assert container.engine is not None
    assert container.engine.engine_name == engine_spec.name
    assert container.engine.image_id == model.engine.tags[REMOTE_IMAGE]
    data = model.volume().backing
    assert data is not None
    assert model.engine_container().volumes == {"/data": data.engine_volume}
    assert model.host_paths.bound == {engine_spec.name: {"/data/sets"}}


def check_created_only(model: ModelNode) -> None:
    """The container has its claims and was not started."""
    container = model.container()
    assert container.status.state is ContainerState.STOPPED
    assert model.engine_container().state is EngineState.CREATED
    assert len(model.claims()) == 3
    assert container.engine is not None
    assert list(container.engine.anonymous_volumes) == ["/cache"]


def check_replaced(
    model: ModelNode, gpu_count: int = 3, stops: int = 1, cause: RevisionCause = RevisionCause.SCALED
) -> None:
    """A successor runs with the files and the anonymous volume; revision 1 has a snapshot."""
    container = check_running(model, revision=2, gpu_count=gpu_count, files=FILES_OF_A, cause=cause)
    check_labels(model, "a", revision=2, owner="")
    assert list(container.status.placement.gpu_uuids) == [f"GPU-{number}" for number in range(gpu_count)]
    assert len(model.engine.volumes) == 1
    assert container.engine is not None
    assert model.engine_container().volumes == container.engine.anonymous_volumes
    snapshot = model.store.revision_views[container.uid, 1].snapshot
    assert snapshot is not None
    assert model.engine.stop_timeouts == [10] * stops
    assert model.host_paths.bound == {}


def check_replaced_by_commit(model: ModelNode) -> None:
    """`check_replaced`, and the successor has the image that is the snapshot of revision 1."""
    check_replaced(model)
    container = model.container()
    snapshot = model.store.revision_views[container.uid, 1].snapshot
    assert snapshot is not None
    assert snapshot.kind is SnapshotKind.IMAGE
    assert container.engine is not None
    assert container.engine.layer_images == (snapshot.reference,)
    assert container.engine.image_id == snapshot.image_id == model.engine.tags[snapshot.reference]
    assert model.engine.images[snapshot.image_id].config == IMAGE, (
        "the image has the variables of the container; a later update could not remove them"
    )
    assert container.engine.base_image_id == model.engine.tags[IMAGE]
    assert container.engine.base_depth == 1
    assert not [name for name in model.engine.tags if name.startswith("gpudock/raw")]


def check_limits(model: ModelNode) -> None:
    """The same process runs with another CPU limit."""
    check_running(model, revision=2, files=FILES_OF_A)
    assert model.engine_container().cpus == 1.5
    assert not model.engine.stop_timeouts


def check_limits_with_image_snapshot(model: ModelNode) -> None:
    """`check_limits`, and revision 1 has an image as its snapshot."""
    check_limits(model)
    snapshot = model.store.revision_views[model.container().uid, 1].snapshot
    assert snapshot is not None
    assert snapshot.kind is SnapshotKind.IMAGE
    assert model.engine.images[snapshot.image_id].files == FILES_OF_A


def check_updated_env(model: ModelNode) -> None:
    """A new engine container runs with the same files and another variable."""
    check_replaced(model, gpu_count=2, cause=RevisionCause.UPDATED)
    assert model.engine.created_specs[model.engine_id()].spec.env == {"A": "1"}


def check_fresh_image(model: ModelNode) -> None:
    """The container has only the files of its new image."""
    container = check_running(model, revision=2, files=frozenset({"remote"}), cause=RevisionCause.UPDATED)
    assert container.engine is not None
    assert container.engine.base_depth == 0, "the number of layers of this image is unknown"
    assert container.engine.image_id == container.engine.user_image_id == model.engine.tags[REMOTE_IMAGE]
    assert model.store.revision_views[container.uid, 1].snapshot is not None


def check_files_on_other_image(model: ModelNode) -> None:
    """The container has its files on top of its new image."""
    container = check_running(model, revision=2, files=frozenset({OTHER_IMAGE, "by a"}))
    assert container.engine is not None
    image = model.engine.images[container.engine.image_id]
    assert image.config == OTHER_IMAGE
    assert len(image.layers) == 2
    assert container.engine.base_image_id == model.engine.tags[OTHER_IMAGE]
    assert container.engine.base_depth == 0, "the number of layers of this image is unknown"
    assert len(container.engine.layer_images) == 2


def check_rolled_back(model: ModelNode, files: frozenset[str] = FILES_OF_A) -> None:
    """Revision 3 equals revision 1."""
    check_running(model, revision=3, gpu_count=2, files=files, cause=RevisionCause.ROLLED_BACK)
    assert model.store.revision_views[model.container().uid, 2].snapshot is not None


def check_restarted(model: ModelNode) -> None:
    """The container runs in the same engine container."""
    check_running(model, revision=1, files=FILES_OF_A)
    assert model.engine.stop_timeouts == [4]


def check_not_running(model: ModelNode, holds: int = 0) -> None:
    """The container does not run; after a retry it is not known whether its user or its process ended it."""
    assert model.container().status.state in (ContainerState.STOPPED, ContainerState.EXITED)
    assert model.engine_container().state is EngineState.EXITED
    assert len(model.claims()) == holds
    assert model.files() == FILES_OF_A


def check_stopped(model: ModelNode, holds: int = 0) -> None:
    """The container is stopped, with this number of claims."""
    container = model.container()
    assert (container.status.state, model.engine_container().state) == (ContainerState.STOPPED, EngineState.EXITED)
    assert len(model.claims()) == holds
    assert container.status.holds_resources == bool(holds)
    assert container.revision == 1
    assert model.files() == FILES_OF_A


def check_stopped_with_snapshot(model: ModelNode) -> None:
    """The container is stopped, and its revision has a snapshot."""
    check_stopped(model)
    assert model.store.revision_views[model.container().uid, 1].snapshot is not None


def check_paused(model: ModelNode) -> None:
    """The container is paused and keeps its claims."""
    assert (model.container().status.state, model.engine_container().state) == (
        ContainerState.PAUSED,
        EngineState.PAUSED,
    )
    assert len(model.claims()) == 3


def check_deleted(model: ModelNode) -> None:
    """No record, engine container, volume, snapshot or image of the container is left."""
    assert not model.store.container_records
    assert not model.engine.containers
    assert not model.engine.volumes
    assert not model.snapshots.sealed_snapshots
    assert not [name for name in model.engine.tags if name.startswith("gpudock/")]


def check_first_revision_deleted(model: ModelNode) -> None:
    """Revision 1 and its snapshot are deleted."""
    container = model.container()
    assert (container.uid, 1) not in model.store.revision_views
    assert not model.snapshots.sealed_snapshots
    assert not [name for name in model.engine.tags if name.startswith("gpudock/") and container.revision == 9]
    check_running(model, revision=2, gpu_count=3, files=FILES_OF_A | {"later"})


def check_pruned(model: ModelNode) -> None:
    """Revisions 2 and 3 are left, and the snapshot of revision 2."""
    check_running(model, revision=3, gpu_count=1, files=FILES_OF_A)
    assert sorted(number for _, number in model.store.revision_views) == [2, 3]
    assert [key.revision for key in model.snapshots.sealed_snapshots] == [2]


def check_cloned(
    model: ModelNode, files: frozenset[str] = FILES_OF_A, source_revision: int = 1, source_gpu_count: int = 2
) -> None:
    """The clone has its source's files and other GPUs; the source runs."""
    source = FILES_OF_A if source_revision == 1 else FILES_OF_A | {"later"}
    check_running(model, revision=source_revision, gpu_count=source_gpu_count, files=source)
    container = check_running(model, revision=1, gpu_count=2, name="b", files=files, cause=RevisionCause.CLONED)
    assert container.owner == "bob"
    check_labels(model, "b", revision=1, owner="bob")
    assert container.engine is not None
    assert set(container.engine.layer_images) <= model.engine.tags.keys(), "an image of the clone is missing"
    assert container.spec.labels == {"of": "a"}
    assert model.engine.created_specs[model.engine_id("b")].hostname == "b"


def check_cloned_by_commit(model: ModelNode) -> None:
    """`check_cloned`, and the clone has an image of its own."""
    check_cloned(model)
    container = model.container("b")
    assert container.engine is not None
    assert len(container.engine.layer_images) == 1
    assert container.engine.image_id == model.engine.tags[container.engine.layer_images[0]]
    assert container.engine.base_image_id == model.engine.tags[IMAGE]


def check_committed(model: ModelNode) -> None:
    """An image has the container's files and not its identity; no other image of gpudock is left."""
    check_running(model, revision=1, files=FILES_OF_A)
    image = model.engine.images[model.engine.tags["team/model:v1"]]
    assert image.files == FILES_OF_A
    assert not image.identity
    assert not [name for name in model.engine.tags if name.startswith("gpudock/")]
    assert model.store.origins["gpu1", image.id].committed_for == ""


def check_volume(model: ModelNode, size_bytes: int = 64 * MIB, revision: int = 1) -> None:
    """The record, the backing and the store of the volume have the same size."""
    volume = model.volume()
    assert (volume.state, volume.size_bytes, volume.reserved_bytes) == (VolumeState.READY, size_bytes, size_bytes)
    assert volume.revision == revision
    assert volume.backing is not None
    assert volume.backing.size_bytes == size_bytes
    assert model.engine.volumes[volume.backing.engine_volume].labels["gpudock.name"] == "data"
    assert len(model.sized_volumes.stores) == 1
    size, content = model.sized_volumes.stores[volume.backing.uid]
    assert size == size_bytes
    assert content.endswith("of data")


def check_shrunk(model: ModelNode) -> None:
    """The volume is smaller, and the container that mounts it runs again."""
    check_volume(model, 32 * MIB, 2)
    check_running(model, revision=1, files=FILES_OF_A)
    assert model.engine.stop_timeouts == [10]
    assert model.copier.passes == [False, True], "the first copy was not made while the container ran"


def check_volume_deleted(model: ModelNode) -> None:
    """No record, store or engine volume is left."""
    assert not model.store.volume_records
    assert not model.sized_volumes.stores
    assert not [name for name in model.engine.volumes if name.startswith("gpudock-")]


def check_volume_detached(model: ModelNode) -> None:
    """The volume is deleted, and its container has a new revision without the mount."""
    check_volume_deleted(model)
    container = model.container()
    assert (container.status.state, container.revision, container.spec.mounts) == (ContainerState.STOPPED, 2, ())
    assert model.files() == FILES_OF_A
    assert not model.claims()


def check_adopted(model: ModelNode) -> None:
    """The engine volume backs the volume."""
    volume = model.volume()
    assert volume.state is VolumeState.READY
    assert volume.mountpoint == "/engine/theirs"
    assert volume.backing is not None
    assert volume.backing.engine_volume == "theirs"


def check_adopted_copy(model: ModelNode) -> None:
    """The volume has a copy of the files of the engine volume."""
    volume = model.volume()
    assert volume.backing is not None
    assert model.sized_volumes.stores == {volume.backing.uid: (64 * MIB, "copy of of theirs")}
    assert "theirs" in model.engine.volumes
