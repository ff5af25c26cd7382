"""Snapshots, restores, clones and copies of hostile layers, in a child process with bounded memory."""

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

# The address space of the child is limited in proportion; a child that kept all paths of "deep" used 4 GB.
LIMITS = Limits(entries=2000, depth=1500, name_characters=300_000)


class HostileSnapshotHost(SnapshotHost):
    """Layers whose stores have low limits."""

    def fresh_store(self) -> OverlaySnapshotStore:
        """The store of a daemon that has just started."""
        return OverlaySnapshotStore(str(self.snapshots), str(self.root), local=True, limits=LIMITS)

    def stall_detecting_store(self, seconds: float) -> OverlaySnapshotStore:
        """A store that kills a child that makes no progress for `seconds`."""
        return OverlaySnapshotStore(str(self.snapshots), str(self.root), local=True, stall_seconds=seconds)

    def partials(self) -> list[Path]:
        """The folders of snapshots, complete or not."""
        return list(self.snapshots.glob("*/*"))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HostileSnapshotHost]:
    root = tmp_path / "engine"
    yield HostileSnapshotHost(root)
    remove_tree(str(root))


@pytest.mark.parametrize("shape", HOSTILE_SHAPES)
async def test_a_copy_of_a_hostile_volume_equals_it_after_the_changes_end(
    host: HostileSnapshotHost, shape: str
) -> None:
    folders = FolderBackend(host.root)
    source, target = folders.create("source"), folders.create("target")
    copier, root = MirrorVolumeCopier([folders]), host.root / "source"
    with _open_folder(root) as opened:
        HOSTILE_SHAPES[shape](opened)
    (root / "gone later").write_text("x")
    (root / "other content").write_text("before")
    times = (root / "other content").stat()
    await copier.copy(source, target, ignore_progress, final=False)
    (root / "gone later").unlink()
    (root / "other content").write_text("behind")
    os.utime(root / "other content", ns=(times.st_atime_ns, times.st_mtime_ns))
    await copier.copy(source, target, ignore_progress, final=True)
    assert fingerprint(str(host.root / "target")) == fingerprint(str(root))
    assert (await copier.verify(source, target)).entries > 0
    (host.root / "target/other content").write_text("BEHIND")
    os.utime(host.root / "target/other content", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(VolumeFailed, match="differs from the source: the content of a file"):
        await copier.verify(source, target)
    await copier.copy(source, target, ignore_progress, final=True)
    await copier.verify(source, target)


async def test_the_store_of_a_volume_with_deep_folders_is_deleted(host: HostileSnapshotHost) -> None:
    folders, uid = FolderBackend(host.root), str(uuid.uuid4())
    folders.create("source")
    with _open_folder(host.root / "source") as root:
        make_nested_folders(root, 1200, "d")  # deeper than Python calls itself, as shutil.rmtree does for each folder
    store = BackingFolder(host.root / "volumes", uid)
    store.root.mkdir()
    (host.root / "source").rename(store.path)
    await store.remove()
    await store.remove()
    assert list(store.root.iterdir()) == []


@contextmanager
def _open_folder(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("shape", HOSTILE_SHAPES)
async def test_a_hostile_layer_is_snapshotted_restored_cloned_copied_and_removed(
    host: HostileSnapshotHost, shape: str
) -> None:
    source = host.layers[0]
    with _open_folder(source) as root:
        HOSTILE_SHAPES[shape](root)
    expected = fingerprint(str(source))
    plan = await host.store.plan(host.running, None)
    assert plan.too_large == ""

    # A snapshot, and a second one that shares files with it.
    await host.make_snapshot(1)
    assert fingerprint(str(host.tree(1))) == expected
    (source / "later").write_text("later")
    await host.make_snapshot(2, previous=1)
    (source / "later").unlink()

    # A restore replaces everything in the target.
    (host.layers[1] / "made-by-the-engine").mkdir()
    await host.store.restore(snapshot_key(1), host.new, ignore_progress)
    assert fingerprint(str(host.layers[1])) == expected

    # A clone.
    (clone, copied) = map(container_of, create_layer_folders(host.root, 3, 4))
    operation_id = new_operation_id()
    await host.store.mirror(host.running, clone, operation_id, still=False, progress=ignore_progress)
    await host.store.mirror(host.old, clone, operation_id, still=True, progress=ignore_progress)
    assert _fingerprint_with_root_time(clone.upper_dir, source) == fingerprint(str(source))

    # A transfer by copy.
    layers = OverlayLayerStore(LayerTransferMethod.COPY, str(host.root), local=True)
    await layers.copy(await layers.locate(host.old, copied), ignore_progress)
    assert fingerprint(copied.upper_dir) == fingerprint(str(source))

    await host.store.remove(snapshot_key(1))
    assert not host.tree(1).exists()
    await host.store.remove_all(UID)
    assert host.partials() == []
    await host.store.close()


def _fingerprint_with_root_time(tree: str, like: Path) -> str:
    """The fingerprint of a tree whose root must have the same time as `like`."""
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
async def test_a_layer_beyond_the_limits_has_no_snapshot_and_leaves_no_files(
    host: HostileSnapshotHost, what: str, grow: Callable[[int], None]
) -> None:
    with _open_folder(host.layers[0]) as root:
        grow(root)
    assert what in (await host.store.plan(host.running, None)).too_large
    operation_id = new_operation_id()
    with pytest.raises(LayerTooLarge, match=what):
        await host.store.gather(host.running, snapshot_key(1), operation_id, None, ignore_progress)
    with pytest.raises(LayerTooLarge, match=what):
        await host.store.complete(host.old, snapshot_key(1), operation_id, None, ignore_progress)
    assert host.partials() == []
    with pytest.raises(SnapshotFailed, match=what):
        await host.store.mirror(host.old, host.new, operation_id, still=True, progress=ignore_progress)


def _many_files(root: int, count: int, name: str = "") -> None:
    for number in range(count):
        os.close(os.open(f"{name}{number}", os.O_CREAT | os.O_WRONLY, dir_fd=root))


async def test_folders_that_are_replaced_during_a_copy_are_complete_afterwards(host: HostileSnapshotHost) -> None:
    layer = host.layers[0]
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
            await host.store.gather(host.running, snapshot_key(1), operation_id, None, ignore_progress)
    finally:
        ending.set()
        thread.join()
    assert rounds > 0
    await host.store.complete(host.old, snapshot_key(1), operation_id, None, ignore_progress)
    await host.store.seal(snapshot_key(1), operation_id, IMAGE_ID)
    assert fingerprint(str(host.tree(1))) == fingerprint(str(layer))


@pytest.mark.parametrize("damage", ["a file is gone", "a file is new", "a mode", "a mark is gone", "a mark is new"])
async def test_a_damaged_snapshot_is_not_sealed(host: HostileSnapshotHost, damage: str) -> None:
    layer, operation_id = host.layers[0], new_operation_id()
    (layer / "folder/inner").mkdir(parents=True)
    (layer / "folder/file").write_text("content")
    os.setxattr(layer / "folder", "trusted.overlay.opaque", b"y")
    await host.store.complete(host.old, snapshot_key(1), operation_id, None, ignore_progress)
    (partial,) = host.partials()
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
        await host.store.seal(snapshot_key(1), operation_id, IMAGE_ID)
    assert await host.store.find() == ()


async def test_a_snapshot_with_an_index_of_format_1_can_be_restored_and_followed(host: HostileSnapshotHost) -> None:
    layer = host.layers[0]
    with _open_folder(layer) as root:
        HOSTILE_SHAPES["odd files"](root)
        HOSTILE_SHAPES["devices"](root)
    await host.make_snapshot(1)
    (host.tree(1).parent / "index").write_bytes(
        b'{"format": 1, "device": 1, "complete": true, "cloned": false, "boot": "x", "folders": 0, "checksum": 0}\n'
    )
    host.store = host.fresh_store()
    await host.make_snapshot(2, previous=1)
    for revision in (1, 2):
        await host.store.restore(snapshot_key(revision), host.new, ignore_progress)
        assert fingerprint(str(host.layers[1])) == fingerprint(str(layer))


# -- child processes that hang, or whose caller is cancelled -----------------------------------------------------------


def _children() -> list[int]:
    """The pids of the child processes of this process that work on trees."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[1]) == os.getpid() and b"trees.child" in (process / "cmdline").read_bytes():
                pids.append(int(process.name))
        except OSError:
            continue
    return pids


async def _stop_child(task: asyncio.Task[None]) -> int:
    """Stop the child of a task, so that it makes no progress; its pid."""
    async with asyncio.timeout(limit(60)):
        while not (children := _children()):
            assert not task.done()
            await asyncio.sleep(0.001)
    os.kill(children[0], signal.SIGSTOP)
    return children[0]


async def test_a_child_without_progress_is_killed_and_the_snapshot_fails(host: HostileSnapshotHost) -> None:
    store, operation_id = host.stall_detecting_store(1), new_operation_id()
    gathering = asyncio.create_task(store.gather(host.running, snapshot_key(1), operation_id, None, ignore_progress))
    await _stop_child(gathering)
    with pytest.raises(SnapshotFailed, match="made no progress for 1 s"):
        await gathering
    assert _children() == []
    await store.discard(snapshot_key(1), operation_id)
    assert host.partials() == []
    await host.make_snapshot(1)


async def test_a_cancelled_snapshot_leaves_no_child(host: HostileSnapshotHost) -> None:
    operation_id = new_operation_id()
    gathering = asyncio.create_task(
        host.store.gather(host.running, snapshot_key(1), operation_id, None, ignore_progress)
    )
    await _stop_child(gathering)
    gathering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gathering
    assert _children() == []
    await host.make_snapshot(1)


async def test_the_error_of_a_killed_child_has_its_signal(host: HostileSnapshotHost) -> None:
    gathering = asyncio.create_task(
        host.store.gather(host.running, snapshot_key(1), new_operation_id(), None, ignore_progress)
    )
    os.kill(await _stop_child(gathering), signal.SIGKILL)
    with pytest.raises(SnapshotFailed, match="killed by signal 9"):
        await gathering
