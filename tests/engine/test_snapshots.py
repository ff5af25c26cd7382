"""Snapshots of writable layers: of trees on the test's disk and on XFS with reflinks, and of a real engine's layers."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gpudock_server.adapters.host.trees.comparison import differences
from gpudock_server.adapters.host.trees.interrupt import Interrupt
from gpudock_server.adapters.layers import OverlaySnapshotStore
from gpudock_server.errors import DiskFull, SnapshotFailed
from gpudock_server.model.engine import EngineContainer
from gpudock_server.model.operation import new_operation_id
from gpudock_server.model.snapshot import SnapshotKey, SnapshotMethod
from pydantic import ValidationError

from tests.engine.drift import engine_action
from tests.engine.engine_api import create_container, engine_container, run_in_container
from tests.engine.sample_trees import (
    TreeEntry,
    create_tree,
    create_tree_command,
    image_files,
    read_tree,
    tree_differences,
)
from tests.engine.snapshot_host import IMAGE_ID, UID, SnapshotHost, ignore_progress, snapshot_key
from tests.rig.images import GLIBC
from tests.rig.patience import limit
from tests.rig.rig import Rig

IMAGE = "gpudock/snapshot:test"
MIB = 1 << 20
# The link count differs where snapshots share files by hard links.
IGNORED_FIELDS = frozenset({"nlink"})


@contextmanager
def _mounted_filesystem(folder: Path, kind: str, megabytes: int) -> Iterator[Path]:
    """Make a filesystem in an image file and mount it; unmount it at the end."""
    image, mount = folder / "image", folder / "mount"
    with image.open("wb") as file:
        file.truncate(megabytes * MIB)
    subprocess.run([f"mkfs.{kind}", "-q", str(image)], check=True, capture_output=True)
    mount.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.fixture(params=["disk", pytest.param("xfs", marks=pytest.mark.deep)])
def host(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SnapshotHost]:
    """A host on the disk of the tests, and one on XFS, which has reflinks."""
    if request.param == "disk":
        yield SnapshotHost(tmp_path)
        return
    with _mounted_filesystem(tmp_path, "xfs", 512) as mount:
        host = SnapshotHost(mount / "engine")
        yield host


def _assert_equal_trees(first: Path, second: Path) -> None:
    assert tree_differences(_comparable_tree(first), _comparable_tree(second), ignored_fields=IGNORED_FIELDS) == ""
    assert differences(str(first), str(second), Interrupt()) == []


def _comparable_tree(tree: Path) -> dict[bytes, TreeEntry]:
    """The entries of a tree, without hard links between whiteouts: the kernel links them to each other as it likes."""
    return {
        path: dataclasses.replace(entry, links=b"") if entry.kind == "c" else entry
        for path, entry in read_tree(str(tree)).items()
    }


def _fill_layer(layer: Path) -> None:
    """Create a sample tree, with a whiteout and the extended attributes of overlayfs."""
    create_tree(str(layer), 1500)
    os.mknod(layer / "whiteout", 0o020000)
    (layer / "opaque").mkdir()
    os.setxattr(layer / "opaque", "trusted.overlay.opaque", b"y")
    os.setxattr(layer, "trusted.overlay.origin", b"where from")


async def test_snapshots_are_equal_share_what_is_unchanged_and_never_change(host: SnapshotHost) -> None:
    layer = host.layers[0]
    _fill_layer(layer)
    method, reason = await host.store.method(host.old)
    expected = SnapshotMethod.REFLINK if "mount" in str(host.root) else SnapshotMethod.LINK
    assert (method, reason) == (expected, "")
    await host.make_snapshot(1)
    _assert_equal_trees(layer, host.tree(1))
    first = read_tree(str(host.tree(1)))
    (layer / "grown/d1/f1").write_text("changed")
    (layer / "grown/d2").rename(layer / "grown/renamed")
    (layer / "grown/sparse/dense").unlink()
    await host.make_snapshot(2, previous=1)
    _assert_equal_trees(layer, host.tree(2))
    assert tree_differences(first, read_tree(str(host.tree(1))), ignored_fields=IGNORED_FIELDS) == ""
    assert await host.store.find() == (snapshot_key(1), snapshot_key(2))
    if method is SnapshotMethod.LINK:
        first_inode, second_inode = ((host.tree(revision) / "grown/d3/f9").stat().st_ino for revision in (1, 2))
        assert first_inode == second_inode
    await host.store.remove(snapshot_key(1))
    await host.store.remove(snapshot_key(1))
    _assert_equal_trees(layer, host.tree(2))
    assert await host.store.find() == (snapshot_key(2),)
    await host.store.remove_all(UID)
    await host.store.remove_all(UID)
    assert await host.store.find() == ()
    assert list(host.snapshots.iterdir()) == []


async def test_a_snapshot_takes_disk_space_for_changes_alone(host: SnapshotHost) -> None:
    layer = host.layers[0]
    (layer / "big").write_bytes(os.urandom(24 * MIB))
    plan = await host.store.plan(host.old, None)
    reflink = plan.method is SnapshotMethod.REFLINK
    assert plan.bytes_to_copy == 0 if reflink else 24 * MIB <= plan.bytes_to_copy < 25 * MIB
    await _wait_until_old(layer / "big")
    await host.make_snapshot(1)
    (layer / "small").write_bytes(os.urandom(MIB))
    assert (await host.store.plan(host.old, snapshot_key(1))).bytes_to_copy < 2 * MIB
    operation_id = new_operation_id()
    free = os.statvfs(host.root).f_bfree
    await host.store.complete(host.old, snapshot_key(2), operation_id, snapshot_key(1), ignore_progress)
    sealed = await host.store.seal(snapshot_key(2), operation_id, IMAGE_ID)
    assert sealed.layer_bytes >= 25 * MIB
    assert sealed.new_bytes < 2 * MIB
    assert sealed.entries == 2
    if reflink:  # Other programs write to the disk of the tests, but not to the XFS of this test.
        assert (free - os.statvfs(host.root).f_bfree) * os.statvfs(host.root).f_frsize < 3 * MIB


async def _wait_until_old(path: Path) -> None:
    """Wait until a snapshot store trusts the times of a file: it copies files again that changed shortly before."""
    probe = path.parent / "probe"
    async with asyncio.timeout(limit(30)):
        while True:
            probe.touch()
            if probe.stat().st_ctime_ns > path.stat().st_ctime_ns + 1_500_000_000:  # noqa: ASYNC240 - a moment
                break
            await asyncio.sleep(0.05)
    probe.unlink()


@pytest.mark.deep
async def test_every_step_can_be_repeated_by_another_daemon(host: SnapshotHost) -> None:
    _fill_layer(host.layers[0])
    key, operation_id = snapshot_key(3), new_operation_id()
    for _ in range(2):
        await host.store.gather(host.running, key, operation_id, None, ignore_progress)
        host.store = host.fresh_store()
    for _ in range(2):
        await host.store.complete(host.old, key, operation_id, None, ignore_progress)
        host.store = host.fresh_store()
    sealed = await host.store.seal(key, operation_id, IMAGE_ID)
    for store in (host.store, host.fresh_store()):
        await store.gather(host.running, key, operation_id, None, ignore_progress)
        await store.complete(host.old, key, operation_id, None, ignore_progress)
        assert await store.seal(key, operation_id, IMAGE_ID) == sealed
    _assert_equal_trees(host.layers[0], host.tree(3))
    # A restored etcd does not know this snapshot, so another operation makes it again.
    again = new_operation_id()
    await host.store.gather(host.running, key, again, key, ignore_progress)
    await host.store.complete(host.old, key, again, key, ignore_progress)
    assert await host.store.seal(key, again, IMAGE_ID) != sealed
    _assert_equal_trees(host.layers[0], host.tree(3))
    await host.store.discard(key, again)
    assert list(host.snapshots.iterdir()) == []


@pytest.mark.deep
@pytest.mark.parametrize("damage", ["no index", "torn index"])
async def test_a_partial_snapshot_without_a_complete_index_is_started_over(tmp_path: Path, damage: str) -> None:
    host = SnapshotHost(tmp_path)
    _fill_layer(host.layers[0])
    key, operation_id = snapshot_key(1), new_operation_id()
    await host.store.gather(host.running, key, operation_id, None, ignore_progress)
    partial = host.snapshots / UID / f"1.partial-{operation_id}"
    if damage == "no index":
        (partial / "index").unlink()
    else:
        (partial / "index").write_bytes((partial / "index").read_bytes()[:-9])
    (partial / "tree/grown/d1/f1").write_text("half written")
    (partial / "tree/left-behind").mkdir()
    host.store = host.fresh_store()
    await host.store.complete(host.old, key, operation_id, None, ignore_progress)
    await host.store.seal(key, operation_id, IMAGE_ID)
    _assert_equal_trees(host.layers[0], host.tree(1))


async def test_a_cancelled_gather_stops_and_can_be_repeated(tmp_path: Path) -> None:
    host = SnapshotHost(tmp_path)
    _fill_layer(host.layers[0])
    key = snapshot_key(1)
    operation_id = await _cancel_gather(host, key)
    await host.store.complete(host.old, key, operation_id, None, ignore_progress)
    await host.store.seal(key, operation_id, IMAGE_ID)
    _assert_equal_trees(host.layers[0], host.tree(1))


async def _cancel_gather(host: SnapshotHost, key: SnapshotKey) -> str:
    """Cancel a gather that has copied some files; returns the id of its operation."""
    async with asyncio.timeout(limit(60)):
        while True:
            operation_id = new_operation_id()
            gather = asyncio.create_task(host.store.gather(host.running, key, operation_id, None, ignore_progress))
            copied = host.snapshots / UID / f"1.partial-{operation_id}/tree/grown"
            while not copied.is_dir():
                await asyncio.sleep(0.001)
            gather.cancel()
            await asyncio.wait({gather})
            if gather.cancelled():
                return operation_id
            # The child process has copied everything before this process noticed that it had begun.
            await host.store.discard(key, operation_id)


async def test_a_snapshot_is_restored_with_everything(host: SnapshotHost) -> None:
    _fill_layer(host.layers[0])
    await host.make_snapshot(1)
    (host.layers[1] / "left-by-a-killed-restore").mkdir()
    for _ in range(2):
        await host.store.restore(snapshot_key(1), host.new, ignore_progress)
        _assert_equal_trees(host.tree(1), host.layers[1])
    (host.layers[1] / "grown/d1/f1").write_text("the container's own")
    _assert_equal_trees(host.layers[0], host.tree(1))
    with pytest.raises(SnapshotFailed, match="not a container layer"):
        await host.store.restore(snapshot_key(1), dataclasses.replace(host.new, upper_dir="/etc"), ignore_progress)


async def test_a_layer_is_mirrored_into_another(host: SnapshotHost) -> None:
    _fill_layer(host.layers[0])
    (host.layers[1] / "made-by-the-engine").mkdir()
    operation_id = new_operation_id()
    await host.store.mirror(host.running, host.new, operation_id, still=False, progress=ignore_progress)
    (host.layers[0] / "grown/d1").rename(host.layers[0] / "grown/renamed")
    (host.layers[0] / "later").write_text("later")
    for _ in range(2):
        await host.store.mirror(host.old, host.new, operation_id, still=True, progress=ignore_progress)
        _assert_equal_trees(host.layers[0], host.layers[1])


async def test_progress_is_reported(tmp_path: Path) -> None:
    host = SnapshotHost(tmp_path)
    (host.layers[0] / "big").write_bytes(bytes(64 * MIB))
    calls: list[tuple[int, int]] = []
    await host.store.gather(
        host.running, snapshot_key(1), new_operation_id(), None, lambda current, total: calls.append((current, total))
    )
    assert calls
    assert all(0 < current <= total and total >= 64 * MIB for current, total in calls)


async def test_a_full_disk_is_reported_by_the_plan_and_a_failed_gather_leaves_nothing(tmp_path: Path) -> None:
    with _mounted_filesystem(tmp_path, "ext4", 96) as mount:
        host = SnapshotHost(mount / "engine")
        (host.layers[0] / "big").write_bytes(os.urandom(50 * MIB))
        with pytest.raises(DiskFull) as full:
            await host.store.plan(host.old, None)
        assert full.value.needed_bytes >= 50 * MIB > full.value.available_bytes
        with pytest.raises(DiskFull):
            await host.store.gather(host.running, snapshot_key(1), new_operation_id(), None, ignore_progress)
        assert await host.store.partials() == ()
        assert list(host.snapshots.iterdir()) == []
        assert (host.layers[0] / "big").stat().st_size == 50 * MIB


@pytest.mark.parametrize("uid", ["", ".", "..", "../x", UID.upper() + "A", f"{UID}/..", f"{UID}\n"])
async def test_invalid_uids_and_operation_ids_are_refused(tmp_path: Path, uid: str) -> None:
    host = SnapshotHost(tmp_path)
    with pytest.raises(ValidationError):
        SnapshotKey(uid=uid, revision=1)
    for act in (
        host.store.remove_all(uid),
        host.store.discard(snapshot_key(1), uid),
        host.store.seal(snapshot_key(1), uid, "x"),
    ):
        with pytest.raises(SnapshotFailed):
            await act
    with pytest.raises(ValidationError):
        SnapshotKey(uid=UID, revision=0)


@pytest.mark.parametrize("root", ["", "/", "relative", "/a/../b", "/a/"])
def test_a_root_that_is_not_a_normalized_absolute_path_is_refused(root: str) -> None:
    with pytest.raises(ValueError, match="must be an absolute, normalized path"):
        OverlaySnapshotStore(root, "/var/lib/docker", local=True)


async def test_a_snapshot_of_another_container_is_refused_as_the_previous_one(tmp_path: Path) -> None:
    host = SnapshotHost(tmp_path)
    other = SnapshotKey(uid=str(uuid.UUID(int=8)), revision=1)
    with pytest.raises(SnapshotFailed, match="of the same container"):
        await host.store.complete(host.old, snapshot_key(1), new_operation_id(), other, ignore_progress)


async def test_an_inaccessible_layer_has_no_snapshot_method(tmp_path: Path) -> None:
    host = SnapshotHost(tmp_path)
    remote = OverlaySnapshotStore(str(host.snapshots), str(host.root), local=False)
    assert await remote.method(host.old) == (None, "the engine runs on another host")
    unsupported = dataclasses.replace(host.old, storage_driver="overlayfs")
    method, reason = await host.store.method(unsupported)
    assert (method, "overlay2" in reason) == (None, True)
    with pytest.raises(SnapshotFailed):
        await host.store.plan(unsupported, None)


@pytest.mark.deep
async def test_files_are_copied_without_copy_file_range(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", fail)
    host = SnapshotHost(tmp_path)
    _fill_layer(host.layers[0])
    await host.make_snapshot(1)
    _assert_equal_trees(host.layers[0], host.tree(1))


# ---- containers of a real engine ----

_WRITER = """
import mmap, os, random
os.makedirs('/busy')
file = open('/busy/mapped', 'w+b'); file.truncate(1 << 20)
memory = mmap.mmap(file.fileno(), 0)
number = 0
while True:
    number += 1
    memory[number * 4096 % (1 << 20)] = number % 256
    name = '/busy/%d' % (number % 200)
    open(name, 'wb').write(os.urandom(number % 5000))
    if number % 7 == 0: os.rename(name, '/busy/renamed')
    if number % 11 == 0: os.unlink('/busy/renamed') if os.path.exists('/busy/renamed') else None
    if number % 50 == 0: os.makedirs('/busy/d%d/x' % number)
"""


def _after_action(rig: Rig, engine_id: str, action: str) -> EngineContainer:
    engine_action(rig, engine_id, action)
    return engine_container(rig, engine_id)


async def test_a_snapshot_of_a_writing_container_is_restored(rig: Rig) -> None:
    rig.images.derive(IMAGE, GLIBC, files=image_files())
    root = rig.engine.call("GET", "/info")["DockerRootDir"]
    (Path(root) / "gpudock").mkdir(exist_ok=True)
    store = OverlaySnapshotStore(f"{root}/gpudock/snapshots", root, local=True)
    try:
        engine_id = create_container(rig, IMAGE)
        container = _after_action(rig, engine_id, "start")
        run_in_container(rig, engine_id, create_tree_command(files=3000))
        run_in_container(rig, engine_id, ["python3", "-c", _WRITER], wait=False)
        key, operation_id = snapshot_key(1), new_operation_id()
        await store.gather(container, key, operation_id, None, ignore_progress)
        paused = _after_action(rig, engine_id, "pause")
        await store.complete(paused, key, operation_id, None, ignore_progress)
        tree = Path(root, "gpudock/snapshots", UID, f"1.partial-{operation_id}", "tree")
        _assert_equal_trees(Path(paused.upper_dir), tree)
        before = read_tree(f"/proc/{paused.pid}/root")
        await store.seal(key, operation_id, container.image_id)
        container = _after_action(rig, engine_id, "unpause")
        second = new_operation_id()
        await store.gather(container, snapshot_key(2), second, key, ignore_progress)
        stopped = _after_action(rig, engine_id, "stop?t=0")
        await store.complete(stopped, snapshot_key(2), second, key, ignore_progress)
        await store.seal(snapshot_key(2), second, container.image_id)
        _assert_equal_trees(Path(stopped.upper_dir), Path(root, "gpudock/snapshots", UID, "2/tree"))
        successor_id = create_container(rig, IMAGE)
        await store.restore(key, engine_container(rig, successor_id), ignore_progress)
        successor = _after_action(rig, successor_id, "start")
        assert tree_differences(before, read_tree(f"/proc/{successor.pid}/root")) == ""
    finally:
        rig.engine.remove_all()
        await store.remove_all(UID)
