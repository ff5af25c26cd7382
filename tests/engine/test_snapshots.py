"""Snapshots of writable layers: real trees on this disk and on one that shares extents, and a real engine's layers."""

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
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.operation import new_operation_id
from gpudock_server.model.snapshot import SnapshotKey, SnapshotMethod
from pydantic import ValidationError

from tests.engine.sample_trees import (
    TreeEntry,
    create_layer_folders,
    create_tree,
    create_tree_command,
    image_files,
    read_tree,
    tree_differences,
)
from tests.rig.images import GLIBC
from tests.rig.patience import limit
from tests.rig.rig import Rig

IMAGE = "gpudock/snapshot:test"
IMAGE_ID = f"sha256:{1:064x}"
MIB = 1 << 20
BUT = frozenset({"nlink"})
UID = str(uuid.UUID(int=7))


def _no_progress(_current: int, _total: int) -> None:
    pass


def _key(revision: int) -> SnapshotKey:
    return SnapshotKey(uid=UID, revision=revision)


def _container(upper: Path, state: EngineState = EngineState.EXITED) -> EngineContainer:
    return EngineContainer(
        id=upper.parent.name,
        name="planted",
        image_id=IMAGE_ID,
        state=state,
        pid=0,
        exit_code=0,
        oom_killed=False,
        error="",
        labels={},
        gpu_uuids=(),
        upper_dir=str(upper),
        storage_driver="overlay2",
    )


class Place:
    """An engine's data folder with planted layers, and a snapshot store over it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layers = create_layer_folders(root, 1, 2)
        (root / "gpudock").mkdir()
        self.snapshots = root / "gpudock/snapshots"
        self.store = self.fresh_store()
        self.old, self.new = map(_container, self.layers)
        self.running = dataclasses.replace(self.old, state=EngineState.RUNNING)

    def fresh_store(self) -> OverlaySnapshotStore:
        """As a daemon has it that has just started."""
        return OverlaySnapshotStore(str(self.snapshots), str(self.root), local=True)

    def tree(self, revision: int) -> Path:
        """The files of a sealed snapshot."""
        return self.snapshots / UID / str(revision) / "tree"

    async def make(self, revision: int, previous: int = 0, *, gathers: bool = True) -> str:
        """A sealed snapshot; the operation that made it."""
        operation_id, key = new_operation_id(), _key(revision)
        before = _key(previous) if previous else None
        if gathers:
            await self.store.gather(self.running, key, operation_id, before, _no_progress)
        await self.store.complete(self.old, key, operation_id, before, _no_progress)
        await self.store.seal(key, operation_id, IMAGE_ID)
        return operation_id


@contextmanager
def _mounted(folder: Path, kind: str, megabytes: int) -> Iterator[Path]:
    """A filesystem of its own."""
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
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """On the disk of the tests, and on an XFS, which shares extents."""
    if request.param == "disk":
        yield Place(tmp_path)
        return
    with _mounted(tmp_path, "xfs", 512) as mount:
        place = Place(mount / "engine")
        yield place


def _equal(one: Path, other: Path) -> None:
    assert tree_differences(_seen(one), _seen(other), ignored_fields=BUT) == ""
    assert differences(str(one), str(other), Interrupt()) == []


def _seen(tree: Path) -> dict[bytes, TreeEntry]:
    """The tree, with whiteouts as what they are: the kernel hard-links them to each other as it likes."""
    return {
        path: dataclasses.replace(entry, links=b"") if entry.kind == "c" else entry
        for path, entry in read_tree(str(tree)).items()
    }


def _grow_layer(layer: Path) -> None:
    """A small tree of everything, with what only overlayfs puts into a layer."""
    create_tree(str(layer), 1500)
    os.mknod(layer / "whiteout", 0o020000)
    (layer / "opaque").mkdir()
    os.setxattr(layer / "opaque", "trusted.overlay.opaque", b"y")
    os.setxattr(layer, "trusted.overlay.origin", b"where from")


async def test_snapshots_are_equal_share_what_is_unchanged_and_never_change(place: Place) -> None:
    layer = place.layers[0]
    _grow_layer(layer)
    method, reason = await place.store.method(place.old)
    expected = SnapshotMethod.REFLINK if "mount" in str(place.root) else SnapshotMethod.LINK
    assert (method, reason) == (expected, "")
    await place.make(1)
    _equal(layer, place.tree(1))
    first = read_tree(str(place.tree(1)))
    (layer / "grown/d1/f1").write_text("changed")
    (layer / "grown/d2").rename(layer / "grown/renamed")
    (layer / "grown/sparse/dense").unlink()
    await place.make(2, previous=1)
    _equal(layer, place.tree(2))
    assert tree_differences(first, read_tree(str(place.tree(1))), ignored_fields=BUT) == ""
    assert await place.store.find() == (_key(1), _key(2))
    if method is SnapshotMethod.LINK:
        one, two = ((place.tree(revision) / "grown/d3/f9").stat().st_ino for revision in (1, 2))
        assert one == two
    await place.store.remove(_key(1))
    await place.store.remove(_key(1))
    _equal(layer, place.tree(2))
    assert await place.store.find() == (_key(2),)
    await place.store.remove_all(UID)
    await place.store.remove_all(UID)
    assert await place.store.find() == ()
    assert list(place.snapshots.iterdir()) == []


async def test_what_a_snapshot_costs_is_what_changed(place: Place) -> None:
    layer = place.layers[0]
    (layer / "big").write_bytes(os.urandom(24 * MIB))
    plan = await place.store.plan(place.old, None)
    reflink = plan.method is SnapshotMethod.REFLINK
    assert plan.bytes_to_copy == 0 if reflink else 24 * MIB <= plan.bytes_to_copy < 25 * MIB
    await _until_trusted(layer / "big")
    await place.make(1)
    (layer / "small").write_bytes(os.urandom(MIB))
    assert (await place.store.plan(place.old, _key(1))).bytes_to_copy < 2 * MIB
    operation_id = new_operation_id()
    free = os.statvfs(place.root).f_bfree
    await place.store.complete(place.old, _key(2), operation_id, _key(1), _no_progress)
    sealed = await place.store.seal(_key(2), operation_id, IMAGE_ID)
    assert sealed.layer_bytes >= 25 * MIB
    assert sealed.new_bytes < 2 * MIB
    assert sealed.entries == 2
    if reflink:  # of the tests' disk others take too
        assert (free - os.statvfs(place.root).f_bfree) * os.statvfs(place.root).f_frsize < 3 * MIB


async def _until_trusted(path: Path) -> None:
    """Wait until a change of a file is older than what a store takes for new."""
    probe = path.parent / "probe"
    async with asyncio.timeout(limit(30)):
        while True:
            probe.touch()
            if probe.stat().st_ctime_ns > path.stat().st_ctime_ns + 1_500_000_000:  # noqa: ASYNC240 - a moment
                break
            await asyncio.sleep(0.05)
    probe.unlink()


@pytest.mark.deep
async def test_every_step_may_be_resumed_by_another_daemon(place: Place) -> None:
    _grow_layer(place.layers[0])
    key, operation_id = _key(3), new_operation_id()
    for _ in range(2):
        await place.store.gather(place.running, key, operation_id, None, _no_progress)
        place.store = place.fresh_store()
    for _ in range(2):
        await place.store.complete(place.old, key, operation_id, None, _no_progress)
        place.store = place.fresh_store()
    sealed = await place.store.seal(key, operation_id, IMAGE_ID)
    for store in (place.store, place.fresh_store()):
        await store.gather(place.running, key, operation_id, None, _no_progress)
        await store.complete(place.old, key, operation_id, None, _no_progress)
        assert await store.seal(key, operation_id, IMAGE_ID) == sealed
    _equal(place.layers[0], place.tree(3))
    # A store that was put back knows nothing of it, and the revision's files are kept once more.
    again = new_operation_id()
    await place.store.gather(place.running, key, again, key, _no_progress)
    await place.store.complete(place.old, key, again, key, _no_progress)
    assert await place.store.seal(key, again, IMAGE_ID) != sealed
    _equal(place.layers[0], place.tree(3))
    await place.store.discard(key, again)
    assert list(place.snapshots.iterdir()) == []


@pytest.mark.deep
@pytest.mark.parametrize("spoil", ["no index", "torn index"])
async def test_a_partial_without_a_whole_index_is_started_over(tmp_path: Path, spoil: str) -> None:
    place = Place(tmp_path)
    _grow_layer(place.layers[0])
    key, operation_id = _key(1), new_operation_id()
    await place.store.gather(place.running, key, operation_id, None, _no_progress)
    partial = place.snapshots / UID / f"1.partial-{operation_id}"
    if spoil == "no index":
        (partial / "index").unlink()
    else:
        (partial / "index").write_bytes((partial / "index").read_bytes()[:-9])
    (partial / "tree/grown/d1/f1").write_text("half written")
    (partial / "tree/left-behind").mkdir()
    place.store = place.fresh_store()
    await place.store.complete(place.old, key, operation_id, None, _no_progress)
    await place.store.seal(key, operation_id, IMAGE_ID)
    _equal(place.layers[0], place.tree(1))


async def test_a_cancelled_gathering_stops_and_can_be_repeated(tmp_path: Path) -> None:
    place = Place(tmp_path)
    _grow_layer(place.layers[0])
    key, operation_id = _key(1), new_operation_id()
    task = asyncio.create_task(place.store.gather(place.running, key, operation_id, None, _no_progress))
    async with asyncio.timeout(limit(30)):
        while not (place.snapshots / UID / f"1.partial-{operation_id}/tree/grown").is_dir():
            await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await place.store.complete(place.old, key, operation_id, None, _no_progress)
    await place.store.seal(key, operation_id, IMAGE_ID)
    _equal(place.layers[0], place.tree(1))


async def test_a_snapshot_is_restored_with_everything(place: Place) -> None:
    _grow_layer(place.layers[0])
    await place.make(1)
    (place.layers[1] / "of-a-restore-that-was-killed").mkdir()
    for _ in range(2):
        await place.store.restore(_key(1), place.new, _no_progress)
        _equal(place.tree(1), place.layers[1])
    (place.layers[1] / "grown/d1/f1").write_text("the container's own")
    _equal(place.layers[0], place.tree(1))
    with pytest.raises(SnapshotFailed, match="not a container layer"):
        await place.store.restore(_key(1), dataclasses.replace(place.new, upper_dir="/etc"), _no_progress)


async def test_a_layer_is_mirrored_into_another(place: Place) -> None:
    _grow_layer(place.layers[0])
    (place.layers[1] / "made-by-the-engine").mkdir()
    operation_id = new_operation_id()
    await place.store.mirror(place.running, place.new, operation_id, still=False, progress=_no_progress)
    (place.layers[0] / "grown/d1").rename(place.layers[0] / "grown/renamed")
    (place.layers[0] / "later").write_text("later")
    for _ in range(2):
        await place.store.mirror(place.old, place.new, operation_id, still=True, progress=_no_progress)
        _equal(place.layers[0], place.layers[1])


async def test_progress_is_told(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (place.layers[0] / "big").write_bytes(bytes(64 * MIB))
    told: list[tuple[int, int]] = []
    await place.store.gather(
        place.running, _key(1), new_operation_id(), None, lambda current, total: told.append((current, total))
    )
    assert told
    assert all(0 < current <= total and total >= 64 * MIB for current, total in told)


async def test_no_room_is_said_before_and_leaves_nothing_behind_when_it_runs_out(tmp_path: Path) -> None:
    with _mounted(tmp_path, "ext4", 96) as mount:
        place = Place(mount / "engine")
        (place.layers[0] / "big").write_bytes(os.urandom(50 * MIB))
        with pytest.raises(DiskFull) as full:
            await place.store.plan(place.old, None)
        assert full.value.needed_bytes >= 50 * MIB > full.value.available_bytes
        with pytest.raises(DiskFull):
            await place.store.gather(place.running, _key(1), new_operation_id(), None, _no_progress)
        assert await place.store.partials() == ()
        assert list(place.snapshots.iterdir()) == []
        assert (place.layers[0] / "big").stat().st_size == 50 * MIB


@pytest.mark.parametrize("uid", ["", ".", "..", "../x", UID.upper() + "A", f"{UID}/..", f"{UID}\n"])
async def test_no_path_is_made_of_what_is_no_uid(tmp_path: Path, uid: str) -> None:
    place = Place(tmp_path)
    with pytest.raises(ValidationError):
        SnapshotKey(uid=uid, revision=1)
    for act in (place.store.remove_all(uid), place.store.discard(_key(1), uid), place.store.seal(_key(1), uid, "x")):
        with pytest.raises(SnapshotFailed):
            await act
    with pytest.raises(ValidationError):
        SnapshotKey(uid=UID, revision=0)


@pytest.mark.parametrize("root", ["", "/", "relative", "/a/../b", "/a/"])
def test_a_root_that_is_none_is_refused(root: str) -> None:
    with pytest.raises(ValueError, match="must be an absolute, normalized path"):
        OverlaySnapshotStore(root, "/var/lib/docker", local=True)


async def test_files_are_shared_with_no_other_container(tmp_path: Path) -> None:
    place = Place(tmp_path)
    other = SnapshotKey(uid=str(uuid.UUID(int=8)), revision=1)
    with pytest.raises(SnapshotFailed, match="of the same container"):
        await place.store.complete(place.old, _key(1), new_operation_id(), other, _no_progress)


async def test_a_layer_that_is_not_to_be_seen_is_not_kept_as_a_tree(tmp_path: Path) -> None:
    place = Place(tmp_path)
    far = OverlaySnapshotStore(str(place.snapshots), str(place.root), local=False)
    assert await far.method(place.old) == (None, "the engine runs on another host")
    shown = dataclasses.replace(place.old, storage_driver="overlayfs")
    method, reason = await place.store.method(shown)
    assert (method, "overlay2" in reason) == (None, True)
    with pytest.raises(SnapshotFailed):
        await place.store.plan(shown, None)


@pytest.mark.deep
async def test_a_filesystem_that_copies_in_its_own_way_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_args: object) -> int:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuses)
    place = Place(tmp_path)
    _grow_layer(place.layers[0])
    await place.make(1)
    _equal(place.layers[0], place.tree(1))


# ---- containers of a real engine ----


def _inspect(rig: Rig, engine_id: str) -> EngineContainer:
    shown = rig.engine.call("GET", f"/containers/{engine_id}/json")
    return dataclasses.replace(
        _container(Path(shown["GraphDriver"]["Data"]["UpperDir"]), EngineState(shown["State"]["Status"])),
        id=engine_id,
        image_id=shown["Image"],
        pid=shown["State"]["Pid"],
    )


def _create(rig: Rig) -> EngineContainer:
    made = rig.engine.call("POST", "/containers/create", send={"Image": IMAGE, "Cmd": ["sleep", "infinity"]})
    return _inspect(rig, made["Id"])


def _act(rig: Rig, container: EngineContainer, action: str) -> EngineContainer:
    query = {"t": "0"} if action == "stop" else {}
    rig.engine.call("POST", f"/containers/{container.id}/{action}", query=query)
    return _inspect(rig, container.id)


def _run(rig: Rig, container: EngineContainer, command: list[str], *, waits: bool = True) -> None:
    made = rig.engine.call("POST", f"/containers/{container.id}/exec", send={"Cmd": command})["Id"]
    rig.engine.call("POST", f"/exec/{made}/start", send={"Detach": True})
    while waits and rig.engine.call("GET", f"/exec/{made}/json")["Running"]:
        pass


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


async def test_a_running_container_is_kept_and_brought_back(rig: Rig) -> None:
    rig.images.derive(IMAGE, GLIBC, files=image_files())
    root = rig.engine.call("GET", "/info")["DockerRootDir"]
    (Path(root) / "gpudock").mkdir(exist_ok=True)
    store = OverlaySnapshotStore(f"{root}/gpudock/snapshots", root, local=True)
    try:
        container = _act(rig, _create(rig), "start")
        _run(rig, container, create_tree_command(files=3000))
        _run(rig, container, ["python3", "-c", _WRITER], waits=False)
        key, operation_id = _key(1), new_operation_id()
        await store.gather(container, key, operation_id, None, _no_progress)
        paused = _act(rig, container, "pause")
        await store.complete(paused, key, operation_id, None, _no_progress)
        tree = Path(root, "gpudock/snapshots", UID, f"1.partial-{operation_id}", "tree")
        _equal(Path(paused.upper_dir), tree)
        seen = read_tree(f"/proc/{paused.pid}/root")
        await store.seal(key, operation_id, container.image_id)
        container = _act(rig, container, "unpause")
        second = new_operation_id()
        await store.gather(container, _key(2), second, key, _no_progress)
        stopped = _act(rig, container, "stop")
        await store.complete(stopped, _key(2), second, key, _no_progress)
        await store.seal(_key(2), second, container.image_id)
        _equal(Path(stopped.upper_dir), Path(root, "gpudock/snapshots", UID, "2/tree"))
        successor = _create(rig)
        await store.restore(key, successor, _no_progress)
        successor = _act(rig, successor, "start")
        assert tree_differences(seen, read_tree(f"/proc/{successor.pid}/root")) == ""
    finally:
        rig.engine.remove_all()
        await store.remove_all(UID)
