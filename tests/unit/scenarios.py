"""One scenario for each way in which an operation goes: what is there before, what is asked for, what is there then."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from gpudock_server.core.containers.commands import (
    Clone,
    Command,
    Commit,
    Create,
    Delete,
    DeleteRevision,
    FieldChange,
    FilesPolicy,
    Pause,
    Restart,
    Rollback,
    Scale,
    Start,
    Stop,
    Unpause,
    Update,
)
from gpudock_server.core.volumes import commands as volume_commands
from gpudock_server.model.container import Container, ContainerState, RevisionCause
from gpudock_server.model.engine import EngineState
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.snapshot import SnapshotKind
from gpudock_server.model.spec import GpuRequest, Mount
from gpudock_server.model.volume import VolumeState

from tests.unit.model_engine import IMAGE, OTHER_IMAGE, REMOTE_IMAGE
from tests.unit.model_node import SPEC, ModelNode

MIB = 1 << 20
DATA_MOUNT = Mount(volume="data", target="/data")
SPEC_WITH_DATA = SPEC.changed(mounts=(DATA_MOUNT,))

Setup = Callable[[ModelNode], Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    """`undone`: what fails leaves everything as it was; otherwise the same call does the rest.

    `or_as`: or leaves it as this setup does. `rest`: what must be so after that call, where it is less than otherwise.
    """

    name: str
    setup: Setup
    command: Command | volume_commands.Command
    check: Callable[[ModelNode], None]
    undone: bool = True
    or_as: Setup | None = None
    rest: Callable[[ModelNode], None] | None = None


def running(
    model: ModelNode,
    *,
    revision: int,
    cards: int = 2,
    name: str = "a",
    files: frozenset[str],
    cause: RevisionCause | None = None,
) -> Container:
    """Check what a container is after an operation that left it running; with a `cause`, one that made a revision."""
    head, seen = model.container(name), model.engine_container(name)
    assert (head.status.state, seen.state) == (ContainerState.RUNNING, EngineState.RUNNING)
    assert head.revision == revision
    assert head.status.holds_resources
    assert len(head.status.placement.gpu_uuids) == head.spec.gpus.size == cards
    assert seen.gpu_uuids == head.status.placement.gpu_uuids
    assert seen.ports == head.status.placement.ports
    assert len(model.claims(name)) == cards + 1
    assert model.files(name) == files
    assert set(model.engine.containers) == {model.engine_id(one) for one in model.store.container_records}
    assert head.engine is not None
    assert model.store.revision_views[head.uid, revision].revision.spec == head.spec
    assert model.store.revision_views[head.uid, revision].revision.image_id == head.engine.user_image_id
    if cause is not None:
        assert model.store.revision_views[head.uid, revision].revision.cause is cause
        assert model.store.revision_views[head.uid, revision].revision.operation_id == model.last_operation_id
    return head


def made_for(model: ModelNode, name: str, *, revision: int, owner: str) -> None:
    """Check what marks an engine container, and makes up a record that the store lost."""
    labels, head = model.engine.created_specs[model.engine_id(name)].labels, model.container(name)
    assert (labels["gpudock.uid"], labels["gpudock.name"]) == (head.uid, name)
    assert (labels["gpudock.revision"], labels["gpudock.owner"]) == (str(revision), owner)


def then_runs(*, revision: int, files: frozenset[str], cards: int = 2) -> Callable[[ModelNode], None]:
    """`running`, as a scenario's check."""

    def check(model: ModelNode) -> None:
        running(model, revision=revision, cards=cards, files=files)

    return check


FILES_OF_A = frozenset({IMAGE, "by a"})


async def nothing(_: ModelNode) -> None:
    """There is nothing yet."""


async def volume(model: ModelNode) -> None:
    """A volume of 64 MiB."""
    await model.run_ok(volume_commands.Create("data", size_bytes=64 * MIB))


async def one(model: ModelNode) -> None:
    """Container `a` runs, and has written a file."""
    await model.create_container()


async def scaled(model: ModelNode) -> None:
    """Its first revision, with a file less, was kept as a tree."""
    await model.create_container()
    await model.run_ok(Scale("a", gpus=GpuRequest(count=3)))
    model.engine.write(model.engine_id(), "later")


async def scaled_as_image(model: ModelNode) -> None:
    """Its first revision, with a file less, was kept as an image."""
    model.layers.method = LayerTransferMethod.COMMIT
    await scaled(model)


async def stopped(model: ModelNode) -> None:
    """It was stopped, and holds nothing."""
    await model.create_container()
    await model.run_ok(Stop("a"))


async def paused(model: ModelNode) -> None:
    """It is frozen."""
    await model.create_container()
    await model.run_ok(Pause("a"))


async def out_of_quota(model: ModelNode) -> None:
    """Layers cannot be exchanged."""
    await model.create_container()
    model.layers.same_quota = False


async def by_commit(model: ModelNode) -> None:
    """Layers are out of reach."""
    await model.create_container()
    model.layers.method = LayerTransferMethod.COMMIT


async def by_commit_once_more(model: ModelNode) -> None:
    """The second carry by commit lies on the first one's image."""
    await scaled_as_image(model)


async def no_trees(model: ModelNode) -> None:
    """Nothing can be kept but as an image."""
    await model.create_container()
    model.snapshots.method_result = (None, "no such filesystem")


async def keeps_two(model: ModelNode) -> None:
    """The history is as long as it may be."""
    await model.create_container()
    model.configure_history(keep_revisions=2)
    await model.run_ok(Scale("a", gpus=GpuRequest(count=3)))


async def keeps_on_stop(model: ModelNode) -> None:
    """The files of what is stopped are kept."""
    await model.create_container()
    model.configure_history(on_stop=True)


async def mounted(model: ModelNode) -> None:
    """A container that runs has the volume."""
    await volume(model)
    await model.create_container(spec=SPEC_WITH_DATA)


async def mounted_by_copy(model: ModelNode) -> None:
    """The same, and the volume cannot shrink where it is."""
    await mounted(model)
    model.sized_volumes.copies = True


async def mounted_by_stopped(model: ModelNode) -> None:
    """A container that does not run has the volume."""
    await mounted(model)
    await model.run_ok(Stop("a"))


async def foreign_volume(model: ModelNode) -> None:
    """The engine has a volume that an operator allows to be adopted."""
    await model.engine.create_volume("theirs", labels={"gpudock.adopt": "true"}, driver_options={})


def created(model: ModelNode) -> None:
    """It has what it asked for."""
    head = running(model, revision=1, files=frozenset({"remote"}), cause=RevisionCause.CREATED)
    engine_spec = model.engine.created_specs[model.engine_id()]
    assert engine_spec.hostname == "a"
    assert engine_spec.spec == head.spec
    assert head.owner == "alice"
    made_for(model, "a", revision=1, owner="alice")
    assert head.engine is not None
    assert head.engine.engine_name == engine_spec.name
    assert head.engine.image_id == model.engine.tags[REMOTE_IMAGE]
    data = model.volume().backing
    assert data is not None
    assert model.engine_container().volumes == {"/data": data.engine_volume}
    assert model.host_paths.bound == {engine_spec.name: {"/data/sets"}}


def not_started(model: ModelNode) -> None:
    """It holds what it asked for, and does not run."""
    head = model.container()
    assert head.status.state is ContainerState.STOPPED
    assert model.engine_container().state is EngineState.CREATED
    assert len(model.claims()) == 3
    assert head.engine is not None
    assert list(head.engine.anonymous_volumes) == ["/cache"]


def replaced(model: ModelNode, cards: int = 3, stops: int = 1, cause: RevisionCause = RevisionCause.SCALED) -> None:
    """Its successor has its files and its anonymous volume, and the files of the revision before are kept."""
    head = running(model, revision=2, cards=cards, files=FILES_OF_A, cause=cause)
    made_for(model, "a", revision=2, owner="")
    assert list(head.status.placement.gpu_uuids) == [f"GPU-{number}" for number in range(cards)]
    assert len(model.engine.volumes) == 1
    assert head.engine is not None
    assert model.engine_container().volumes == head.engine.anonymous_volumes
    kept = model.store.revision_views[head.uid, 1].snapshot
    assert kept is not None
    assert model.engine.stop_timeouts == [10] * stops
    assert model.host_paths.bound == {}


def replaced_by_commit(model: ModelNode) -> None:
    """The same, and the image is the one that was kept of the revision before."""
    replaced(model)
    head = model.container()
    kept = model.store.revision_views[head.uid, 1].snapshot
    assert kept is not None
    assert kept.kind is SnapshotKind.IMAGE
    assert head.engine is not None
    assert head.engine.layer_images == (kept.reference,)
    assert head.engine.image_id == kept.image_id == model.engine.tags[kept.reference]
    assert model.engine.images[kept.image_id].config == IMAGE, (
        "the variables of this container would be in the image, and a later update could not remove them"
    )
    assert head.engine.base_image_id == model.engine.tags[IMAGE]
    assert head.engine.base_depth == 1
    assert not [name for name in model.engine.tags if name.startswith("gpudock/raw")]


def limited(model: ModelNode) -> None:
    """The same process with another limit."""
    running(model, revision=2, files=FILES_OF_A)
    assert model.engine_container().cpus == 1.5
    assert not model.engine.stop_timeouts


def limited_with_image(model: ModelNode) -> None:
    """The same, and the files of the revision before are kept as an image."""
    limited(model)
    kept = model.store.revision_views[model.container().uid, 1].snapshot
    assert kept is not None
    assert kept.kind is SnapshotKind.IMAGE
    assert model.engine.images[kept.image_id].files == FILES_OF_A


def changed_env(model: ModelNode) -> None:
    """Another process, with its files and another variable."""
    replaced(model, cards=2, cause=RevisionCause.UPDATED)
    assert model.engine.created_specs[model.engine_id()].spec.env == {"A": "1"}


def on_remote(model: ModelNode) -> None:
    """The container has the files of another image, and the anonymous volume of the first one with its files."""
    head = running(model, revision=2, files=frozenset({"remote"}), cause=RevisionCause.UPDATED)
    assert head.engine is not None
    assert head.engine.base_depth == 0, "it is not known how many layers this image has"
    assert head.engine.image_id == head.engine.user_image_id == model.engine.tags[REMOTE_IMAGE]
    assert model.store.revision_views[head.uid, 1].snapshot is not None


def on_other(model: ModelNode) -> None:
    """Its files lie on another image."""
    head = running(model, revision=2, files=frozenset({OTHER_IMAGE, "by a"}))
    assert head.engine is not None
    image = model.engine.images[head.engine.image_id]
    assert image.config == OTHER_IMAGE
    assert len(image.layers) == 2
    assert head.engine.base_image_id == model.engine.tags[OTHER_IMAGE]
    assert head.engine.base_depth == 0, "it is not known how many layers this image has"
    assert len(head.engine.layer_images) == 2


def returned(model: ModelNode, files: frozenset[str] = FILES_OF_A) -> None:
    """It is as it was in its first revision, as its third."""
    running(model, revision=3, cards=2, files=files, cause=RevisionCause.ROLLED_BACK)
    assert model.store.revision_views[model.container().uid, 2].snapshot is not None


def restarted(model: ModelNode) -> None:
    """It runs in the same engine container."""
    running(model, revision=1, files=FILES_OF_A)
    assert model.engine.stop_timeouts == [4]


def does_not_run(model: ModelNode, holds: int = 0) -> None:
    """It does not run; whether its user or its process ended it, nobody can tell any more."""
    assert model.container().status.state in (ContainerState.STOPPED, ContainerState.EXITED)
    assert model.engine_container().state is EngineState.EXITED
    assert len(model.claims()) == holds
    assert model.files() == FILES_OF_A


def is_stopped(model: ModelNode, holds: int = 0) -> None:
    """It does not run, and holds nothing unless it was told to."""
    head = model.container()
    assert (head.status.state, model.engine_container().state) == (ContainerState.STOPPED, EngineState.EXITED)
    assert len(model.claims()) == holds
    assert head.status.holds_resources == bool(holds)
    assert head.revision == 1
    assert model.files() == FILES_OF_A


def is_stopped_and_kept(model: ModelNode) -> None:
    """It does not run, and its files are kept."""
    is_stopped(model)
    assert model.store.revision_views[model.container().uid, 1].snapshot is not None


def is_paused(model: ModelNode) -> None:
    """Every process of it is frozen."""
    assert (model.container().status.state, model.engine_container().state) == (
        ContainerState.PAUSED,
        EngineState.PAUSED,
    )
    assert len(model.claims()) == 3


def is_gone(model: ModelNode) -> None:
    """Nothing of it is left."""
    assert not model.store.container_records
    assert not model.engine.containers
    assert not model.engine.volumes
    assert not model.snapshots.sealed_snapshots
    assert not [name for name in model.engine.tags if name.startswith("gpudock/")]


def forgot_the_first(model: ModelNode) -> None:
    """The first revision is not there any more, nor what was kept of it."""
    head = model.container()
    assert (head.uid, 1) not in model.store.revision_views
    assert not model.snapshots.sealed_snapshots
    assert not [name for name in model.engine.tags if name.startswith("gpudock/") and head.revision == 9]
    running(model, revision=2, cards=3, files=FILES_OF_A | {"later"})


def pruned(model: ModelNode) -> None:
    """The third revision took the place of the first."""
    running(model, revision=3, cards=1, files=FILES_OF_A)
    assert sorted(number for _, number in model.store.revision_views) == [2, 3]
    assert [key.revision for key in model.snapshots.sealed_snapshots] == [2]


def cloned(
    model: ModelNode, files: frozenset[str] = FILES_OF_A, source_revision: int = 1, source_cards: int = 2
) -> None:
    """The clone has its source's files and cards of its own; the source runs."""
    source = FILES_OF_A if source_revision == 1 else FILES_OF_A | {"later"}
    running(model, revision=source_revision, cards=source_cards, files=source)
    head = running(model, revision=1, cards=2, name="b", files=files, cause=RevisionCause.CLONED)
    assert head.owner == "bob"
    made_for(model, "b", revision=1, owner="bob")
    assert head.engine is not None
    assert set(head.engine.layer_images) <= model.engine.tags.keys(), "its own images are there"
    assert head.spec.labels == {"of": "a"}
    assert model.engine.created_specs[model.engine_id("b")].hostname == "b"


def cloned_by_commit(model: ModelNode) -> None:
    """The same, on an image of its own."""
    cloned(model)
    head = model.container("b")
    assert head.engine is not None
    assert len(head.engine.layer_images) == 1
    assert head.engine.image_id == model.engine.tags[head.engine.layer_images[0]]
    assert head.engine.base_image_id == model.engine.tags[IMAGE]


def committed(model: ModelNode) -> None:
    """There is an image with the container's files that tells nothing of it; and nothing else is left."""
    running(model, revision=1, files=FILES_OF_A)
    image = model.engine.images[model.engine.tags["team/model:v1"]]
    assert image.files == FILES_OF_A
    assert not image.identity
    assert not [name for name in model.engine.tags if name.startswith("gpudock/")]
    assert model.store.origins["gpu1", image.id].committed_for == ""


def has_volume(model: ModelNode, size_bytes: int = 64 * MIB, revision: int = 1) -> None:
    """The volume has its size everywhere."""
    head = model.volume()
    assert (head.state, head.size_bytes, head.reserved_bytes) == (VolumeState.READY, size_bytes, size_bytes)
    assert head.revision == revision
    assert head.backing is not None
    assert head.backing.size_bytes == size_bytes
    assert model.engine.volumes[head.backing.engine_volume].labels["gpudock.name"] == "data"
    assert len(model.sized_volumes.stores) == 1
    size, content = model.sized_volumes.stores[head.backing.uid]
    assert size == size_bytes
    assert content.endswith("of data")


def has_shrunk(model: ModelNode) -> None:
    """The volume is smaller, and who mounts it runs again."""
    has_volume(model, 32 * MIB, 2)
    running(model, revision=1, files=FILES_OF_A)
    assert model.engine.stop_timeouts == [10]
    assert model.copier.passes == [False, True], "what can be copied while it runs is not copied while it is stopped"


def has_no_volume(model: ModelNode) -> None:
    """Nothing of the volume is left."""
    assert not model.store.volume_records
    assert not model.sized_volumes.stores
    assert not [name for name in model.engine.volumes if name.startswith("gpudock-")]


def is_detached(model: ModelNode) -> None:
    """The same, and the container that had it is as it was but for that."""
    has_no_volume(model)
    head = model.container()
    assert (head.status.state, head.revision, head.spec.mounts) == (ContainerState.STOPPED, 2, ())
    assert model.files() == FILES_OF_A
    assert not model.claims()


def adopted(model: ModelNode) -> None:
    """The engine's volume is the volume."""
    head = model.volume()
    assert head.state is VolumeState.READY
    assert head.mountpoint == "/engine/theirs"
    assert head.backing is not None
    assert head.backing.engine_volume == "theirs"


def adopted_copy(model: ModelNode) -> None:
    """The volume has a copy of the files of the engine's."""
    head = model.volume()
    assert head.backing is not None
    assert model.sized_volumes.stores == {head.backing.uid: (64 * MIB, "copy of of theirs")}
    assert "theirs" in model.engine.volumes


CREATED = SPEC.changed(
    image=REMOTE_IMAGE, mounts=(DATA_MOUNT, Mount(host_path="/data/sets", target="/sets", read_only=True))
)
LABEL_CHANGE = FieldChange("labels", {"of": "a"})
THREE_GPUS = GpuRequest(count=3)

SCENARIOS = [
    Scenario("create", volume, Create("a", CREATED, owner="alice"), created),
    Scenario("create only", nothing, Create("a", SPEC, create_only=True), not_started),
    Scenario("scale", one, Scale("a", gpus=THREE_GPUS), replaced),
    Scenario("scale by copy", out_of_quota, Scale("a", gpus=THREE_GPUS), replaced),
    Scenario("scale by commit", by_commit, Scale("a", gpus=THREE_GPUS), replaced_by_commit),
    Scenario(
        "scale by commit again",
        by_commit_once_more,
        Scale("a", gpus=GpuRequest(count=1)),
        then_runs(revision=3, cards=1, files=FILES_OF_A | {"later"}),
    ),
    Scenario("limits", one, Scale("a", cpus=1.5), limited),
    Scenario("limits, kept as image", no_trees, Scale("a", cpus=1.5), limited_with_image),
    Scenario("update", one, Update("a", FieldChange("env", {"A": "1"})), changed_env),
    Scenario(
        "update to a fresh image",
        one,
        Update("a", FieldChange("image", REMOTE_IMAGE), files=FilesPolicy.DISCARD),
        on_remote,
    ),
    Scenario(
        "update to another image",
        one,
        Update("a", FieldChange("image", OTHER_IMAGE), files=FilesPolicy.CARRY_COMMIT),
        on_other,
    ),
    Scenario("rollback", scaled, Rollback("a", 1), returned),
    Scenario("rollback to an image", scaled_as_image, Rollback("a", 1), returned),
    Scenario(
        "rollback of the spec",
        scaled,
        Rollback("a", 1, spec_only=True),
        lambda model: returned(model, FILES_OF_A | {"later"}),
    ),
    Scenario("restart", one, Restart("a", timeout=4), restarted),
    # What was thawed to be stopped is not frozen again.
    Scenario("restart of what is frozen", paused, Restart("a", timeout=4), restarted, or_as=one),
    Scenario("stop", one, Stop("a"), is_stopped, undone=False, rest=does_not_run),
    Scenario("stop of what is frozen", paused, Stop("a"), is_stopped, undone=False, rest=does_not_run),
    Scenario(
        "stop with resources",
        one,
        Stop("a", keep_resources=True),
        lambda model: is_stopped(model, 3),
        undone=False,
        rest=lambda model: does_not_run(model, 3),
    ),
    Scenario("stop with files", keeps_on_stop, Stop("a"), is_stopped_and_kept, undone=False, rest=does_not_run),
    Scenario("start", stopped, Start("a"), then_runs(revision=1, files=FILES_OF_A)),
    Scenario("start with other cards", stopped, Start("a", gpus=THREE_GPUS), lambda model: replaced(model, stops=0)),
    Scenario("pause", one, Pause("a"), is_paused),
    Scenario("unpause", paused, Unpause("a"), then_runs(revision=1, files=FILES_OF_A)),
    Scenario("delete", one, Delete("a", force=True), is_gone, undone=False),
    Scenario("delete with images", scaled_as_image, Delete("a", force=True), is_gone, undone=False),
    Scenario("delete a revision", scaled, DeleteRevision("a", 1), forgot_the_first, undone=False),
    Scenario("prune", keeps_two, Scale("a", gpus=GpuRequest(count=1)), pruned),
    Scenario("clone", one, Clone("b", "a", LABEL_CHANGE, owner="bob"), cloned),
    Scenario("clone by commit", by_commit, Clone("b", "a", LABEL_CHANGE, owner="bob"), cloned_by_commit),
    Scenario(
        "clone of a revision",
        scaled,
        Clone("b", "a", LABEL_CHANGE, revision=1, owner="bob"),
        lambda model: cloned(model, FILES_OF_A, 2, 3),
    ),
    Scenario(
        "clone of an image",
        scaled_as_image,
        Clone("b", "a", LABEL_CHANGE, revision=1, owner="bob"),
        lambda model: cloned(model, FILES_OF_A, 2, 3),
    ),
    Scenario("commit", one, Commit("a", "team/model:v1"), committed),
    Scenario("commit, frozen", no_trees, Commit("a", "team/model:v1"), committed),
    Scenario("create a volume", nothing, volume_commands.Create("data", size_bytes=64 * MIB), has_volume),
    Scenario(
        "grow a volume",
        mounted,
        volume_commands.Resize("data", 96 * MIB),
        lambda model: has_volume(model, 96 * MIB, 2),
        undone=False,
    ),
    Scenario(
        "shrink a volume",
        mounted,
        volume_commands.Resize("data", 32 * MIB),
        lambda model: has_volume(model, 32 * MIB, 2),
        undone=False,
    ),
    Scenario("shrink a volume by a copy", mounted_by_copy, volume_commands.Resize("data", 32 * MIB), has_shrunk),
    Scenario("delete a volume", volume, volume_commands.Delete("data"), has_no_volume, undone=False),
    Scenario(
        "delete a volume that is mounted",
        mounted_by_stopped,
        volume_commands.Delete("data", force=True),
        is_detached,
        undone=False,
    ),
    Scenario("adopt a volume", foreign_volume, volume_commands.Adopt("data", "theirs"), adopted),
    Scenario(
        "adopt a copy of a volume",
        foreign_volume,
        volume_commands.Adopt("data", "theirs", size_bytes=64 * MIB),
        adopted_copy,
    ),
]
