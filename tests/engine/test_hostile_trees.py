"""Every kind of hostile layer against all that is done with a layer: in bounded memory, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gpudock_server.adapters.host.trees.limits import Limits
from gpudock_server.adapters.layers import OverlayLayerStore, OverlaySnapshotStore
from gpudock_server.adapters.volumes import MirrorVolumeCopier
from gpudock_server.adapters.volumes.backing_folder import BackingFolder
from gpudock_server.errors import SnapshotFailed, VolumeFailed
from gpudock_server.model.operation import LayerTransferMethod, new_operation_id
from gpudock_server.ports import LayerTooLarge

from tests.engine.folder_backend import FolderBackend
from tests.engine.hostile_trees import HOSTILE_SHAPES, fingerprint, make_nested_folders, remove_tree
from tests.engine.sample_trees import create_layer_folders
from tests.engine.snapshot_host import IMAGE_ID, UID, SnapshotHost, container_of, ignore_progress, snapshot_key
from tests.rig.patience import limit

pytestmark = pytest.mark.deep

# The address space of the child is limited in proportion; with the paths of all folders in memory, "deep" took 4 GB.
LIMITS = Limits(entries=2000, depth=1500, name_characters=300_000)


class HostilePlace(SnapshotHost):
    """Layers whose stores take little."""

    def fresh_store(self) -> OverlaySnapshotStore:
        """As a daemon has it that has just started."""
        return OverlaySnapshotStore(str(self.snapshots), str(self.root), local=True, limits=LIMITS)

    def hurrying_store(self, seconds: float) -> OverlaySnapshotStore:
        """A store that ends what makes no progress for so long."""
        return OverlaySnapshotStore(str(self.snapshots), str(self.root), local=True, stall_seconds=seconds)

    def partials(self) -> list[Path]:
        """What is there of snapshots."""
        return list(self.snapshots.glob("*/*"))


@pytest.fixture
def place(tmp_path: Path) -> Iterator[HostilePlace]:
    root = tmp_path / "engine"
    yield HostilePlace(root)
    remove_tree(str(root))


@pytest.mark.parametrize("shape", HOSTILE_SHAPES)
async def test_a_hostile_volume_is_copied_while_it_changes_and_then_equal(place: HostilePlace, shape: str) -> None:
    folders = FolderBackend(place.root)
    source, target = folders.create("source"), folders.create("target")
    copier, root = MirrorVolumeCopier([folders]), place.root / "source"
    with _opened(root) as opened:
        HOSTILE_SHAPES[shape](opened)
    (root / "gone later").write_text("x")
    (root / "other content").write_text("before")
    times = (root / "other content").stat()
    await copier.copy(source, target, ignore_progress, final=False)
    (root / "gone later").unlink()
    (root / "other content").write_text("behind")
    os.utime(root / "other content", ns=(times.st_atime_ns, times.st_mtime_ns))
    await copier.copy(source, target, ignore_progress, final=True)
    assert fingerprint(str(place.root / "target")) == fingerprint(str(root))
    assert (await copier.verify(source, target)).entries > 0
    (place.root / "target/other content").write_text("BEHIND")
    os.utime(place.root / "target/other content", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(VolumeFailed, match="differs from the source: the content of a file"):
        await copier.verify(source, target)
    await copier.copy(source, target, ignore_progress, final=True)
    await copier.verify(source, target)


async def test_the_store_of_a_volume_with_deep_folders_is_deleted(place: HostilePlace) -> None:
    folders, uid = FolderBackend(place.root), str(uuid.uuid4())
    folders.create("source")
    with _opened(place.root / "source") as root:
        make_nested_folders(root, 1200, "d")  # deeper than Python calls itself, as shutil.rmtree does for each folder
    store = BackingFolder(place.root / "volumes", uid)
    store.root.mkdir()
    (place.root / "source").rename(store.path)
    await store.remove()
    await store.remove()
    assert list(store.root.iterdir()) == []


@contextmanager
def _opened(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("shape", HOSTILE_SHAPES)
async def test_a_hostile_layer_is_kept_restored_cloned_carried_and_removed(place: HostilePlace, shape: str) -> None:
    source = place.layers[0]
    with _opened(source) as root:
        HOSTILE_SHAPES[shape](root)
    seen = fingerprint(str(source))
    plan = await place.store.plan(place.running, None)
    assert plan.too_large == ""

    # Snapshot, and a second one that shares with it.
    await place.make_snapshot(1)
    assert fingerprint(str(place.tree(1))) == seen
    (source / "later").write_text("later")
    await place.make_snapshot(2, previous=1)
    (source / "later").unlink()

    # Restore, which makes of the target what the snapshot is, whatever it was.
    (place.layers[1] / "made-by-the-engine").mkdir()
    await place.store.restore(snapshot_key(1), place.new, ignore_progress)
    assert fingerprint(str(place.layers[1])) == seen

    # Clone.
    (clone, carried) = map(container_of, create_layer_folders(place.root, 3, 4))
    operation_id = new_operation_id()
    await place.store.mirror(place.running, clone, operation_id, still=False, progress=ignore_progress)
    await place.store.mirror(place.old, clone, operation_id, still=True, progress=ignore_progress)
    assert _but_the_roots_time(clone.upper_dir, source) == fingerprint(str(source))

    # Carry by copy.
    layers = OverlayLayerStore(LayerTransferMethod.COPY, str(place.root), local=True)
    await layers.copy(await layers.locate(place.old, carried), ignore_progress)
    assert fingerprint(carried.upper_dir) == fingerprint(str(source))

    await place.store.remove(snapshot_key(1))
    assert not place.tree(1).exists()
    await place.store.remove_all(UID)
    assert place.partials() == []
    await place.store.close()


def _but_the_roots_time(tree: str, like: Path) -> str:
    """The fingerprint, with the root's time of `like`."""
    assert Path(tree).stat().st_mtime_ns == like.stat().st_mtime_ns
    return fingerprint(tree)


@pytest.mark.parametrize(
    ("what", "grow"),
    [
        ("nested deeper than", lambda root: make_nested_folders(root, LIMITS.depth + 1, "d")),
        (f"more than {LIMITS.entries} files", lambda root: _many_files(root, LIMITS.entries + 1)),
        (f"more than {LIMITS.name_characters} characters", lambda root: _many_files(root, 1900, "n" * 200)),
    ],
)
async def test_a_layer_beyond_the_limits_has_no_snapshot_and_leaves_nothing(
    place: HostilePlace, what: str, grow: Callable[[int], None]
) -> None:
    with _opened(place.layers[0]) as root:
        grow(root)
    assert what in (await place.store.plan(place.running, None)).too_large
    operation_id = new_operation_id()
    with pytest.raises(LayerTooLarge, match=what):
        await place.store.gather(place.running, snapshot_key(1), operation_id, None, ignore_progress)
    with pytest.raises(LayerTooLarge, match=what):
        await place.store.complete(place.old, snapshot_key(1), operation_id, None, ignore_progress)
    assert place.partials() == []
    with pytest.raises(SnapshotFailed, match=what):
        await place.store.mirror(place.old, place.new, operation_id, still=True, progress=ignore_progress)


def _many_files(root: int, count: int, name: str = "") -> None:
    for number in range(count):
        os.close(os.open(f"{name}{number}", os.O_CREAT | os.O_WRONLY, dir_fd=root))


async def test_folders_that_come_and_go_while_they_are_copied(place: HostilePlace) -> None:
    layer = place.layers[0]
    for number in range(30):
        (layer / f"folder{number}/inner/deeper").mkdir(parents=True)
        for each in range(20):
            (layer / f"folder{number}/inner/deeper/{each}").write_text(f"{number} {each}")
    ending = threading.Event()
    rounds = 0

    def rearrange() -> None:
        nonlocal rounds
        while not ending.is_set():
            for number in range(30):
                folder = layer / f"folder{number}"
                folder.rename(layer / "elsewhere")
                folder.symlink_to("/etc")
                (layer / "elsewhere/inner/deeper/0").write_text(f"round {rounds}")
                folder.unlink()
                (layer / "elsewhere").rename(folder)
            rounds += 1

    thread = threading.Thread(target=rearrange)
    thread.start()
    operation_id = new_operation_id()
    try:
        for _ in range(3):
            await place.store.gather(place.running, snapshot_key(1), operation_id, None, ignore_progress)
    finally:
        ending.set()
        thread.join()
    assert rounds > 0
    await place.store.complete(place.old, snapshot_key(1), operation_id, None, ignore_progress)
    await place.store.seal(snapshot_key(1), operation_id, IMAGE_ID)
    assert fingerprint(str(place.tree(1))) == fingerprint(str(layer))


@pytest.mark.parametrize("damage", ["a file is gone", "a file is new", "a mode", "a mark is gone", "a mark is new"])
async def test_a_snapshot_is_only_sealed_when_it_is_what_was_copied(place: HostilePlace, damage: str) -> None:
    layer, operation_id = place.layers[0], new_operation_id()
    (layer / "folder/inner").mkdir(parents=True)
    (layer / "folder/file").write_text("content")
    os.setxattr(layer / "folder", "trusted.overlay.opaque", b"y")
    await place.store.complete(place.old, snapshot_key(1), operation_id, None, ignore_progress)
    (partial,) = place.partials()
    tree = partial / "tree"
    match damage:
        case "a file is gone":
            (tree / "folder/file").unlink()
        case "a file is new":
            (tree / "folder/inner/new").touch()
        case "a mode":
            (tree / "folder/file").chmod(0o4755)
        case "a mark is gone":
            os.removexattr(tree / "folder", "trusted.overlay.opaque")
        case _:
            os.setxattr(tree / "folder/inner", "trusted.overlay.opaque", b"y")
    with pytest.raises(SnapshotFailed, match="/folder"):
        await place.store.seal(snapshot_key(1), operation_id, IMAGE_ID)
    assert await place.store.find() == ()


async def test_snapshots_with_an_index_of_the_first_format_can_be_restored_and_followed(place: HostilePlace) -> None:
    layer = place.layers[0]
    with _opened(layer) as root:
        HOSTILE_SHAPES["odd files"](root)
        HOSTILE_SHAPES["devices"](root)
    await place.make_snapshot(1)
    (place.tree(1).parent / "index").write_bytes(
        b'{"format": 1, "device": 1, "complete": true, "cloned": false, "boot": "x", "folders": 0, "checksum": 0}\n'
    )
    place.store = place.fresh_store()
    await place.make_snapshot(2, previous=1)
    for revision in (1, 2):
        await place.store.restore(snapshot_key(revision), place.new, ignore_progress)
        assert fingerprint(str(place.layers[1])) == fingerprint(str(layer))


# -- child processes that hang, or whose caller leaves -----------------------------------------------------------------


def _children() -> list[int]:
    """The processes that work on trees and were started by this one."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[1]) == os.getpid() and b"trees.child" in (process / "cmdline").read_bytes():
                pids.append(int(process.name))
        except OSError:
            continue
    return pids


async def _stopped(task: asyncio.Task[None]) -> int:
    """Stop the child of a running job, so that it makes no progress."""
    async with asyncio.timeout(limit(60)):
        while not (children := _children()):
            assert not task.done()
            await asyncio.sleep(0.001)
    os.kill(children[0], signal.SIGSTOP)
    return children[0]


async def test_a_child_that_makes_no_progress_is_ended_and_the_snapshot_fails(place: HostilePlace) -> None:
    store, operation_id = place.hurrying_store(1), new_operation_id()
    gathering = asyncio.create_task(store.gather(place.running, snapshot_key(1), operation_id, None, ignore_progress))
    await _stopped(gathering)
    with pytest.raises(SnapshotFailed, match="made no progress for 1 s"):
        await gathering
    assert _children() == []
    await store.discard(snapshot_key(1), operation_id)
    assert place.partials() == []
    await place.make_snapshot(1)


async def test_a_cancelled_snapshot_leaves_no_child(place: HostilePlace) -> None:
    operation_id = new_operation_id()
    gathering = asyncio.create_task(
        place.store.gather(place.running, snapshot_key(1), operation_id, None, ignore_progress)
    )
    await _stopped(gathering)
    gathering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gathering
    assert _children() == []
    await place.make_snapshot(1)


async def test_a_child_that_dies_is_a_failure_that_says_so(place: HostilePlace) -> None:
    gathering = asyncio.create_task(
        place.store.gather(place.running, snapshot_key(1), new_operation_id(), None, ignore_progress)
    )
    os.kill(await _stopped(gathering), signal.SIGKILL)
    with pytest.raises(SnapshotFailed, match="killed by signal 9"):
        await gathering
