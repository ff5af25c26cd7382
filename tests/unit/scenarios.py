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

from tests.unit.desk import SPEC, Desk
from tests.unit.model_engine import IMAGE, OTHER_IMAGE, REMOTE_IMAGE

MIB = 1 << 20
DATA = Mount(volume="data", target="/data")
MOUNTING = SPEC.changed(mounts=(DATA,))

Setup = Callable[[Desk], Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    """`undone`: what fails leaves everything as it was; otherwise the same call does the rest.

    `or_as`: or leaves it as this setup does. `rest`: what must be so after that call, where it is less than otherwise.
    """

    name: str
    setup: Setup
    command: Command | volume_commands.Command
    check: Callable[[Desk], None]
    undone: bool = True
    or_as: Setup | None = None
    rest: Callable[[Desk], None] | None = None


def running(
    desk: Desk,
    *,
    revision: int,
    cards: int = 2,
    name: str = "a",
    files: frozenset[str],
    cause: RevisionCause | None = None,
) -> Container:
    """Check what a container is after an operation that left it running; with a `cause`, one that made a revision."""
    head, seen = desk.head(name), desk.seen(name)
    assert (head.status.state, seen.state) == (ContainerState.RUNNING, EngineState.RUNNING)
    assert head.revision == revision
    assert head.status.holds_resources
    assert len(head.status.placement.gpu_uuids) == head.spec.gpus.size == cards
    assert seen.gpu_uuids == head.status.placement.gpu_uuids
    assert seen.ports == head.status.placement.ports
    assert len(desk.holds(name)) == cards + 1
    assert desk.files(name) == files
    assert set(desk.engine.containers) == {desk.engine_id(one) for one in desk.store.heads}
    assert head.engine is not None
    assert desk.store.past[head.uid, revision].revision.spec == head.spec
    assert desk.store.past[head.uid, revision].revision.image_id == head.engine.user_image_id
    if cause is not None:
        assert desk.store.past[head.uid, revision].revision.cause is cause
        assert desk.store.past[head.uid, revision].revision.operation_id == desk.last
    return head


def made_for(desk: Desk, name: str, *, revision: int, owner: str) -> None:
    """Check what marks an engine container, and makes up a record that the store lost."""
    labels, head = desk.engine.made[desk.engine_id(name)].labels, desk.head(name)
    assert (labels["gpudock.uid"], labels["gpudock.name"]) == (head.uid, name)
    assert (labels["gpudock.revision"], labels["gpudock.owner"]) == (str(revision), owner)


def then_runs(*, revision: int, files: frozenset[str], cards: int = 2) -> Callable[[Desk], None]:
    """`running`, as a scenario's check."""

    def check(desk: Desk) -> None:
        running(desk, revision=revision, cards=cards, files=files)

    return check


OF_A = frozenset({IMAGE, "by a"})


async def nothing(_: Desk) -> None:
    """There is nothing yet."""


async def volume(desk: Desk) -> None:
    """A volume of 64 MiB."""
    await desk.must(volume_commands.Create("data", size_bytes=64 * MIB))


async def one(desk: Desk) -> None:
    """Container `a` runs, and has written a file."""
    await desk.made()


async def scaled(desk: Desk) -> None:
    """Its first revision, with a file less, was kept as a tree."""
    await desk.made()
    await desk.must(Scale("a", gpus=GpuRequest(count=3)))
    desk.engine.write(desk.engine_id(), "later")


async def scaled_as_image(desk: Desk) -> None:
    """Its first revision, with a file less, was kept as an image."""
    desk.layers.method = LayerTransferMethod.COMMIT
    await scaled(desk)


async def stopped(desk: Desk) -> None:
    """It was stopped, and holds nothing."""
    await desk.made()
    await desk.must(Stop("a"))


async def paused(desk: Desk) -> None:
    """It is frozen."""
    await desk.made()
    await desk.must(Pause("a"))


async def out_of_quota(desk: Desk) -> None:
    """Layers cannot be exchanged."""
    await desk.made()
    desk.layers.same_quota = False


async def by_commit(desk: Desk) -> None:
    """Layers are out of reach."""
    await desk.made()
    desk.layers.method = LayerTransferMethod.COMMIT


async def by_commit_once_more(desk: Desk) -> None:
    """The second carry by commit lies on the first one's image."""
    await scaled_as_image(desk)


async def no_trees(desk: Desk) -> None:
    """Nothing can be kept but as an image."""
    await desk.made()
    desk.snapshots.how = (None, "no such filesystem")


async def keeps_two(desk: Desk) -> None:
    """The history is as long as it may be."""
    await desk.made()
    desk.keep(keep_revisions=2)
    await desk.must(Scale("a", gpus=GpuRequest(count=3)))


async def keeps_on_stop(desk: Desk) -> None:
    """The files of what is stopped are kept."""
    await desk.made()
    desk.keep(on_stop=True)


async def mounted(desk: Desk) -> None:
    """A container that runs has the volume."""
    await volume(desk)
    await desk.made(spec=MOUNTING)


async def mounted_by_copy(desk: Desk) -> None:
    """The same, and the volume cannot shrink where it is."""
    await mounted(desk)
    desk.sized.copies = True


async def mounted_by_stopped(desk: Desk) -> None:
    """A container that does not run has the volume."""
    await mounted(desk)
    await desk.must(Stop("a"))


async def foreign_volume(desk: Desk) -> None:
    """The engine has a volume that an operator allows to be adopted."""
    await desk.engine.create_volume("theirs", labels={"gpudock.adopt": "true"}, driver_options={})


def created(desk: Desk) -> None:
    """It has what it asked for."""
    head = running(desk, revision=1, files=frozenset({"remote"}), cause=RevisionCause.CREATED)
    engine_spec = desk.engine.made[desk.engine_id()]
    assert engine_spec.hostname == "a"
    assert engine_spec.spec == head.spec
    assert head.owner == "alice"
    made_for(desk, "a", revision=1, owner="alice")
    assert head.engine is not None
    assert head.engine.engine_name == engine_spec.name
    assert head.engine.image_id == desk.engine.tags[REMOTE_IMAGE]
    data = desk.volume().backing
    assert data is not None
    assert desk.seen().volumes == {"/data": data.engine_volume}
    assert desk.host_paths.bound == {engine_spec.name: {"/data/sets"}}


def not_started(desk: Desk) -> None:
    """It holds what it asked for, and does not run."""
    head = desk.head()
    assert head.status.state is ContainerState.STOPPED
    assert desk.seen().state is EngineState.CREATED
    assert len(desk.holds()) == 3
    assert head.engine is not None
    assert list(head.engine.anonymous_volumes) == ["/cache"]


def replaced(desk: Desk, cards: int = 3, stops: int = 1, cause: RevisionCause = RevisionCause.SCALED) -> None:
    """Its successor has its files and its anonymous volume, and the files of the revision before are kept."""
    head = running(desk, revision=2, cards=cards, files=OF_A, cause=cause)
    made_for(desk, "a", revision=2, owner="")
    assert list(head.status.placement.gpu_uuids) == [f"GPU-{number}" for number in range(cards)]
    assert len(desk.engine.volumes) == 1
    assert head.engine is not None
    assert desk.seen().volumes == head.engine.anonymous_volumes
    kept = desk.store.past[head.uid, 1].snapshot
    assert kept is not None
    assert desk.engine.stopped_within == [10] * stops
    assert desk.host_paths.bound == {}


def replaced_by_commit(desk: Desk) -> None:
    """The same, and the image is the one that was kept of the revision before."""
    replaced(desk)
    head = desk.head()
    kept = desk.store.past[head.uid, 1].snapshot
    assert kept is not None
    assert kept.kind is SnapshotKind.IMAGE
    assert head.engine is not None
    assert head.engine.layer_images == (kept.reference,)
    assert head.engine.image_id == kept.image_id == desk.engine.tags[kept.reference]
    assert desk.engine.images[kept.image_id].config == IMAGE, (
        "the variables of this container would be in the image, and a later update could not remove them"
    )
    assert head.engine.base_image_id == desk.engine.tags[IMAGE]
    assert head.engine.base_depth == 1
    assert not [name for name in desk.engine.tags if name.startswith("gpudock/raw")]


def limited(desk: Desk) -> None:
    """The same process with another limit."""
    running(desk, revision=2, files=OF_A)
    assert desk.seen().cpus == 1.5
    assert not desk.engine.stopped_within


def limited_with_image(desk: Desk) -> None:
    """The same, and the files of the revision before are kept as an image."""
    limited(desk)
    kept = desk.store.past[desk.head().uid, 1].snapshot
    assert kept is not None
    assert kept.kind is SnapshotKind.IMAGE
    assert desk.engine.images[kept.image_id].files == OF_A


def changed_env(desk: Desk) -> None:
    """Another process, with its files and another variable."""
    replaced(desk, cards=2, cause=RevisionCause.UPDATED)
    assert desk.engine.made[desk.engine_id()].spec.env == {"A": "1"}


def on_remote(desk: Desk) -> None:
    """The container has the files of another image, and the anonymous volume of the first one with its files."""
    head = running(desk, revision=2, files=frozenset({"remote"}), cause=RevisionCause.UPDATED)
    assert head.engine is not None
    assert head.engine.base_depth == 0, "it is not known how many layers this image has"
    assert head.engine.image_id == head.engine.user_image_id == desk.engine.tags[REMOTE_IMAGE]
    assert desk.store.past[head.uid, 1].snapshot is not None


def on_other(desk: Desk) -> None:
    """Its files lie on another image."""
    head = running(desk, revision=2, files=frozenset({OTHER_IMAGE, "by a"}))
    assert head.engine is not None
    image = desk.engine.images[head.engine.image_id]
    assert image.config == OTHER_IMAGE
    assert len(image.layers) == 2
    assert head.engine.base_image_id == desk.engine.tags[OTHER_IMAGE]
    assert head.engine.base_depth == 0, "it is not known how many layers this image has"
    assert len(head.engine.layer_images) == 2


def returned(desk: Desk, files: frozenset[str] = OF_A) -> None:
    """It is as it was in its first revision, as its third."""
    running(desk, revision=3, cards=2, files=files, cause=RevisionCause.ROLLED_BACK)
    assert desk.store.past[desk.head().uid, 2].snapshot is not None


def restarted(desk: Desk) -> None:
    """It runs in the same engine container."""
    running(desk, revision=1, files=OF_A)
    assert desk.engine.stopped_within == [4]


def does_not_run(desk: Desk, holds: int = 0) -> None:
    """It does not run; whether its user or its process ended it, nobody can tell any more."""
    assert desk.head().status.state in (ContainerState.STOPPED, ContainerState.EXITED)
    assert desk.seen().state is EngineState.EXITED
    assert len(desk.holds()) == holds
    assert desk.files() == OF_A


def is_stopped(desk: Desk, holds: int = 0) -> None:
    """It does not run, and holds nothing unless it was told to."""
    head = desk.head()
    assert (head.status.state, desk.seen().state) == (ContainerState.STOPPED, EngineState.EXITED)
    assert len(desk.holds()) == holds
    assert head.status.holds_resources == bool(holds)
    assert head.revision == 1
    assert desk.files() == OF_A


def is_stopped_and_kept(desk: Desk) -> None:
    """It does not run, and its files are kept."""
    is_stopped(desk)
    assert desk.store.past[desk.head().uid, 1].snapshot is not None


def is_paused(desk: Desk) -> None:
    """Every process of it is frozen."""
    assert (desk.head().status.state, desk.seen().state) == (ContainerState.PAUSED, EngineState.PAUSED)
    assert len(desk.holds()) == 3


def is_gone(desk: Desk) -> None:
    """Nothing of it is left."""
    assert not desk.store.heads
    assert not desk.engine.containers
    assert not desk.engine.volumes
    assert not desk.snapshots.sealed_snapshots
    assert not [name for name in desk.engine.tags if name.startswith("gpudock/")]


def forgot_the_first(desk: Desk) -> None:
    """The first revision is not there any more, nor what was kept of it."""
    head = desk.head()
    assert (head.uid, 1) not in desk.store.past
    assert not desk.snapshots.sealed_snapshots
    assert not [name for name in desk.engine.tags if name.startswith("gpudock/") and head.revision == 9]
    running(desk, revision=2, cards=3, files=OF_A | {"later"})


def pruned(desk: Desk) -> None:
    """The third revision took the place of the first."""
    running(desk, revision=3, cards=1, files=OF_A)
    assert sorted(number for _, number in desk.store.past) == [2, 3]
    assert [key.revision for key in desk.snapshots.sealed_snapshots] == [2]


def cloned(desk: Desk, files: frozenset[str] = OF_A, source_revision: int = 1, source_cards: int = 2) -> None:
    """The clone has its source's files and cards of its own; the source runs."""
    source = OF_A if source_revision == 1 else OF_A | {"later"}
    running(desk, revision=source_revision, cards=source_cards, files=source)
    head = running(desk, revision=1, cards=2, name="b", files=files, cause=RevisionCause.CLONED)
    assert head.owner == "bob"
    made_for(desk, "b", revision=1, owner="bob")
    assert head.engine is not None
    assert set(head.engine.layer_images) <= desk.engine.tags.keys(), "its own images are there"
    assert head.spec.labels == {"of": "a"}
    assert desk.engine.made[desk.engine_id("b")].hostname == "b"


def cloned_by_commit(desk: Desk) -> None:
    """The same, on an image of its own."""
    cloned(desk)
    head = desk.head("b")
    assert head.engine is not None
    assert len(head.engine.layer_images) == 1
    assert head.engine.image_id == desk.engine.tags[head.engine.layer_images[0]]
    assert head.engine.base_image_id == desk.engine.tags[IMAGE]


def committed(desk: Desk) -> None:
    """There is an image with the container's files that tells nothing of it; and nothing else is left."""
    running(desk, revision=1, files=OF_A)
    image = desk.engine.images[desk.engine.tags["team/model:v1"]]
    assert image.files == OF_A
    assert not image.identity
    assert not [name for name in desk.engine.tags if name.startswith("gpudock/")]
    assert desk.store.origins["gpu1", image.id].committed_for == ""


def has_volume(desk: Desk, size_bytes: int = 64 * MIB, revision: int = 1) -> None:
    """The volume has its size everywhere."""
    head = desk.volume()
    assert (head.state, head.size_bytes, head.reserved_bytes) == (VolumeState.READY, size_bytes, size_bytes)
    assert head.revision == revision
    assert head.backing is not None
    assert head.backing.size_bytes == size_bytes
    assert desk.engine.volumes[head.backing.engine_volume].labels["gpudock.name"] == "data"
    assert len(desk.sized.stores) == 1
    size, content = desk.sized.stores[head.backing.uid]
    assert size == size_bytes
    assert content.endswith("of data")


def has_shrunk(desk: Desk) -> None:
    """The volume is smaller, and who mounts it runs again."""
    has_volume(desk, 32 * MIB, 2)
    running(desk, revision=1, files=OF_A)
    assert desk.engine.stopped_within == [10]
    assert desk.copier.passes == [False, True], "what can be copied while it runs is not copied while it is stopped"


def has_no_volume(desk: Desk) -> None:
    """Nothing of the volume is left."""
    assert not desk.store.volume_heads
    assert not desk.sized.stores
    assert not [name for name in desk.engine.volumes if name.startswith("gpudock-")]


def is_detached(desk: Desk) -> None:
    """The same, and the container that had it is as it was but for that."""
    has_no_volume(desk)
    head = desk.head()
    assert (head.status.state, head.revision, head.spec.mounts) == (ContainerState.STOPPED, 2, ())
    assert desk.files() == OF_A
    assert not desk.holds()


def adopted(desk: Desk) -> None:
    """The engine's volume is the volume."""
    head = desk.volume()
    assert head.state is VolumeState.READY
    assert head.mountpoint == "/engine/theirs"
    assert head.backing is not None
    assert head.backing.engine_volume == "theirs"


def adopted_copy(desk: Desk) -> None:
    """The volume has a copy of the files of the engine's."""
    head = desk.volume()
    assert head.backing is not None
    assert desk.sized.stores == {head.backing.uid: (64 * MIB, "copy of of theirs")}
    assert "theirs" in desk.engine.volumes


CREATED = SPEC.changed(image=REMOTE_IMAGE, mounts=(DATA, Mount(host_path="/data/sets", target="/sets", read_only=True)))
LABELLED = FieldChange("labels", {"of": "a"})
THREE = GpuRequest(count=3)

SCENARIOS = [
    Scenario("create", volume, Create("a", CREATED, owner="alice"), created),
    Scenario("create only", nothing, Create("a", SPEC, create_only=True), not_started),
    Scenario("scale", one, Scale("a", gpus=THREE), replaced),
    Scenario("scale by copy", out_of_quota, Scale("a", gpus=THREE), replaced),
    Scenario("scale by commit", by_commit, Scale("a", gpus=THREE), replaced_by_commit),
    Scenario(
        "scale by commit again",
        by_commit_once_more,
        Scale("a", gpus=GpuRequest(count=1)),
        then_runs(revision=3, cards=1, files=OF_A | {"later"}),
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
        "rollback of the spec", scaled, Rollback("a", 1, spec_only=True), lambda desk: returned(desk, OF_A | {"later"})
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
        lambda desk: is_stopped(desk, 3),
        undone=False,
        rest=lambda desk: does_not_run(desk, 3),
    ),
    Scenario("stop with files", keeps_on_stop, Stop("a"), is_stopped_and_kept, undone=False, rest=does_not_run),
    Scenario("start", stopped, Start("a"), then_runs(revision=1, files=OF_A)),
    Scenario("start with other cards", stopped, Start("a", gpus=THREE), lambda desk: replaced(desk, stops=0)),
    Scenario("pause", one, Pause("a"), is_paused),
    Scenario("unpause", paused, Unpause("a"), then_runs(revision=1, files=OF_A)),
    Scenario("delete", one, Delete("a", force=True), is_gone, undone=False),
    Scenario("delete with images", scaled_as_image, Delete("a", force=True), is_gone, undone=False),
    Scenario("delete a revision", scaled, DeleteRevision("a", 1), forgot_the_first, undone=False),
    Scenario("prune", keeps_two, Scale("a", gpus=GpuRequest(count=1)), pruned),
    Scenario("clone", one, Clone("b", "a", LABELLED, owner="bob"), cloned),
    Scenario("clone by commit", by_commit, Clone("b", "a", LABELLED, owner="bob"), cloned_by_commit),
    Scenario(
        "clone of a revision",
        scaled,
        Clone("b", "a", LABELLED, revision=1, owner="bob"),
        lambda desk: cloned(desk, OF_A, 2, 3),
    ),
    Scenario(
        "clone of an image",
        scaled_as_image,
        Clone("b", "a", LABELLED, revision=1, owner="bob"),
        lambda desk: cloned(desk, OF_A, 2, 3),
    ),
    Scenario("commit", one, Commit("a", "team/model:v1"), committed),
    Scenario("commit, frozen", no_trees, Commit("a", "team/model:v1"), committed),
    Scenario("create a volume", nothing, volume_commands.Create("data", size_bytes=64 * MIB), has_volume),
    Scenario(
        "grow a volume",
        mounted,
        volume_commands.Resize("data", 96 * MIB),
        lambda desk: has_volume(desk, 96 * MIB, 2),
        undone=False,
    ),
    Scenario(
        "shrink a volume",
        mounted,
        volume_commands.Resize("data", 32 * MIB),
        lambda desk: has_volume(desk, 32 * MIB, 2),
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
