"""The three ways to carry a writable layer, on a real engine's containers, and what each of them refuses."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from gpudock_server.adapters.host.disk_usage import tree_bytes
from gpudock_server.adapters.host.trees.comparison import differences
from gpudock_server.adapters.host.trees.interrupt import Interrupt
from gpudock_server.adapters.layers import OverlayLayerStore
from gpudock_server.errors import DiskFull, LayerCarryFailed
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.ports import LayerPair

from tests.engine.sample_trees import (
    TreeEntry,
    create_layer_folders,
    create_tree_command,
    image_files,
    read_tree,
    tree_differences,
)
from tests.rig.images import GLIBC
from tests.rig.patience import limit
from tests.rig.rig import REPOSITORY, Rig

IMAGE = "gpudock/tree:test"
MIB = 1 << 20
SMALL = 1500
_FIELDS = {field.name for field in dataclasses.fields(TreeEntry)}

# ---- containers of a real engine ----


def _no_progress(_current: int, _total: int) -> None:
    pass


def _inspect(rig: Rig, engine_id: str) -> EngineContainer:
    shown = rig.engine.call("GET", f"/containers/{engine_id}/json")
    return EngineContainer(
        id=engine_id,
        name=shown["Name"],
        image_id=shown["Image"],
        state=EngineState(shown["State"]["Status"]),
        pid=shown["State"]["Pid"],
        exit_code=0,
        oom_killed=False,
        error="",
        labels={},
        gpu_uuids=(),
        upper_dir=shown["GraphDriver"]["Data"]["UpperDir"],
        storage_driver=shown["GraphDriver"]["Name"],
    )


def _create(rig: Rig, image: str = IMAGE) -> EngineContainer:
    made = rig.engine.call("POST", "/containers/create", send={"Image": image, "Cmd": ["sleep", "infinity"]})
    return _inspect(rig, made["Id"])


def _start(rig: Rig, container: EngineContainer) -> EngineContainer:
    rig.engine.call("POST", f"/containers/{container.id}/start")
    return _inspect(rig, container.id)


def _stop(rig: Rig, container: EngineContainer) -> EngineContainer:
    rig.engine.call("POST", f"/containers/{container.id}/stop", query={"t": "0"})
    return _inspect(rig, container.id)


def _run(rig: Rig, container: EngineContainer, command: list[str]) -> None:
    made = rig.engine.call("POST", f"/containers/{container.id}/exec", send={"Cmd": command})["Id"]
    rig.engine.call("POST", f"/exec/{made}/start", send={"Detach": True})
    while (shown := rig.engine.call("GET", f"/exec/{made}/json"))["Running"]:
        time.sleep(0.02)
    assert shown["ExitCode"] == 0


def _seen_inside(container: EngineContainer) -> dict[bytes, TreeEntry]:
    return read_tree(f"/proc/{container.pid}/root")


def _store(rig: Rig, forced: LayerTransferMethod | None = None) -> OverlayLayerStore:
    return OverlayLayerStore(forced, rig.engine.call("GET", "/info")["DockerRootDir"], local=True)


@contextmanager
def _grown(rig: Rig, files: int) -> Iterator[tuple[EngineContainer, dict[bytes, TreeEntry]]]:
    """A stopped container with the tree in it, and what it looked like inside; all containers go afterwards."""
    rig.images.derive(IMAGE, GLIBC, files=image_files())
    try:
        container = _start(rig, _create(rig))
        _run(rig, container, create_tree_command(files=files))
        # Read after another start, so that what a start changes by itself is in it.
        _stop(rig, container)
        seen = _seen_inside(_start(rig, container))
        yield _stop(rig, container), seen
    finally:
        rig.engine.remove_all()


def _check_inside(rig: Rig, container: EngineContainer, before: dict[bytes, TreeEntry]) -> None:
    """Start it, compare what it sees, stop it again."""
    assert tree_differences(before, _seen_inside(_start(rig, container))) == ""
    _stop(rig, container)


@pytest.mark.deep
async def test_exchange_and_copy_carry_twenty_thousand_files_unchanged(rig: Rig) -> None:
    with _grown(rig, 20_000) as (first, before):
        assert len(before) > 20_000
        store = _store(rig)
        assert (await store.plan(first)).method is LayerTransferMethod.EXCHANGE

        second = _create(rig)
        pair = await store.locate(first, second)
        for _ in range(2):
            assert await store.exchange(pair)
        _check_inside(rig, second, before)
        for _ in range(2):
            await store.exchange_back(pair)

        store = _store(rig, LayerTransferMethod.COPY)
        plan = await store.plan(first)
        assert plan.method is LayerTransferMethod.COPY
        assert plan.bytes_available > plan.bytes_to_move > 20_000 * 4096
        third = _create(rig)
        told: list[tuple[int, int]] = []
        await store.copy(await store.locate(first, third), lambda current, total: told.append((current, total)))
        assert told == sorted(told)
        assert told[0] == (0, plan.bytes_to_move)
        assert told[-1] == (plan.bytes_to_move, plan.bytes_to_move)
        _check_inside(rig, third, before)


async def test_a_repeated_copy_is_equal_too(rig: Rig) -> None:
    with _grown(rig, SMALL) as (old, before):
        store = _store(rig, LayerTransferMethod.COPY)
        new = _create(rig)
        pair = await store.locate(old, new)
        for _ in range(2):
            await store.copy(pair, _no_progress)
        _check_inside(rig, new, before)


@pytest.mark.deep
async def test_a_commit_loses_what_its_plan_says_and_no_more(rig: Rig) -> None:
    with _grown(rig, SMALL) as (old, before):
        plan = await _store(rig, LayerTransferMethod.COMMIT).plan(old)
        assert plan.method is LayerTransferMethod.COMMIT
        assert plan.bytes_to_move > 48 * MIB  # the sparse files, written out
        committed = rig.engine.call("POST", "/commit", query={"container": old.id}, send={})["Id"]
        after = _seen_inside(_start(rig, _create(rig, committed)))
        said = " ".join(plan.warnings)
        for lost, warning in {"xattrs": "user.*", "mtime_ns": "whole seconds", "sparse": "sparse"}.items():
            assert warning in said
            assert tree_differences(before, after, ignored_fields=frozenset(_FIELDS - {lost}))
        sockets = {path for path, entry in before.items() if entry.kind == "s"}
        assert sockets
        assert "sockets" in said
        assert "time of /," in said
        kept = {path: entry for path, entry in before.items() if path not in sockets | {b"/"}}
        del after[b"/"]
        assert tree_differences(kept, after, ignored_fields=frozenset({"xattrs", "mtime_ns", "sparse"})) == ""
        for path, entry in kept.items():
            assert abs(after[path].mtime_ns - entry.mtime_ns) < 10**9 or entry.mtime_ns < 0
            assert set(entry.xattrs) - set(after[path].xattrs) <= {name for name in entry.xattrs if "user." in name}


async def test_what_is_no_pair_of_stopped_containers_of_one_image_is_refused(rig: Rig) -> None:
    rig.images.derive(IMAGE, GLIBC, files={"image": b""})
    rig.images.derive("gpudock/other:test", GLIBC, files={"image": b"other"})
    try:
        store, old, new, other = _store(rig), _create(rig), _create(rig), _create(rig, "gpudock/other:test")
        await store.locate(old, new)
        below = rig.engine.call("GET", f"/containers/{old.id}/json")["GraphDriver"]["Data"]["LowerDir"].split(":")
        for wrong in (
            old,
            other,
            _with(other, image_id=new.image_id),  # the engine's word, but other layers below
            _with(new, image_id=""),
            _with(new, upper_dir=""),
            _with(new, upper_dir="/"),
            _with(new, upper_dir=below[0]),  # an init layer
            _with(new, upper_dir=below[1]),  # an image's layer
            _with(new, upper_dir=f"{new.upper_dir}/.."),
            _with(new, storage_driver="overlayfs"),
        ):
            with pytest.raises(LayerCarryFailed):
                await store.locate(old, wrong)
            with pytest.raises(LayerCarryFailed):
                await store.locate(wrong, old)
    finally:
        rig.engine.remove_all()


async def test_a_layer_that_is_not_to_be_seen_is_committed(rig: Rig) -> None:
    rig.images.derive(IMAGE, GLIBC, files={"image": b""})
    try:
        container = _create(rig)
        root = str(rig.engine.data_root)
        for store, shown in (
            (OverlayLayerStore(None, root, local=False), container),
            (OverlayLayerStore(None, "/nowhere", local=True), container),
            (OverlayLayerStore(None, root, local=True), _with(container, upper_dir="", storage_driver="overlayfs")),
        ):
            plan = await store.plan(shown)
            assert (plan.method, plan.bytes_to_move) == (LayerTransferMethod.COMMIT, 0)
            assert plan.warnings[0].startswith("EXCHANGE is not possible: ")
        for forced in (LayerTransferMethod.EXCHANGE, LayerTransferMethod.COPY):
            with pytest.raises(LayerCarryFailed, match="another host"):
                await OverlayLayerStore(forced, root, local=False).plan(container)
        assert dict(await OverlayLayerStore(None, root, local=False).methods()) == {
            LayerTransferMethod.EXCHANGE: "the engine runs on another host",
            LayerTransferMethod.COPY: "the engine runs on another host",
            LayerTransferMethod.COMMIT: "",
        }
    finally:
        rig.engine.remove_all()


def _with(container: EngineContainer, **changes: Any) -> EngineContainer:
    return dataclasses.replace(container, **changes)


# ---- planted layers: what no engine shows on demand ----


@pytest.fixture
def pair(tmp_path: Path) -> LayerPair:
    """Two layers below tmp_path: a small one of everything, and one that the engine has just made."""
    old, new = create_layer_folders(tmp_path, 1, 2)
    for name in ("folder", "opaque", "setgid"):
        (old / name).mkdir()
    (old / "setgid").chmod(0o2755)
    (old / "folder/file").write_text("content")
    (old / "folder/link").hardlink_to(old / "folder/file")
    (old / "symlink").symlink_to("nowhere")
    os.mkfifo(old / "fifo")
    os.mknod(old / "whiteout", stat.S_IFCHR)
    os.setxattr(old / "opaque", "trusted.overlay.opaque", b"y")
    os.setxattr(old / "folder/file", "user.note", b"note")
    os.setxattr(old, "trusted.overlay.origin", b"where from")
    with (old / "sparse").open("wb") as sparse:
        sparse.truncate(8 * MIB)
    with open(os.fsencode(old) + b"/odd\xff\n", "wb"):  # noqa: PTH123 - no text
        pass
    old.chmod(0o710)
    os.setxattr(new, "user.of_the_new", b"goes")
    (new / "made-by-the-engine").mkdir()
    return LayerPair(old_path=str(old), old_inode=old.stat().st_ino, new_path=str(new), new_inode=new.stat().st_ino)


def _inodes(pair: LayerPair) -> tuple[int, int]:
    """Which trees stand at the two paths."""
    return Path(pair.old_path).stat().st_ino, Path(pair.new_path).stat().st_ino


def _planted(tmp_path: Path) -> OverlayLayerStore:
    return OverlayLayerStore(LayerTransferMethod.COPY, str(tmp_path), local=True)


async def test_a_copy_has_all_that_the_overlay_keeps_in_a_layer(tmp_path: Path, pair: LayerPair) -> None:
    await _planted(tmp_path).copy(pair, _no_progress)
    new = Path(pair.new_path)
    root, whiteout = os.stat(new), os.stat(new / "whiteout")  # noqa: PTH116 - ASYNC240 does not like the other way
    assert os.getxattr(new / "opaque", "trusted.overlay.opaque") == b"y"
    assert (stat.S_ISCHR(whiteout.st_mode), whiteout.st_rdev) == (True, 0)
    assert (root.st_mode & 0o777, os.listxattr(new)) == (0o710, ["trusted.overlay.origin"])
    assert tree_differences(read_tree(pair.old_path), read_tree(pair.new_path)) == ""


# By what `differences` calls it: something that a bad copy would do to a tree.
LOSSES: dict[str, Callable[[Path], object]] = {
    "/opaque differs in extended attributes": lambda new: os.removexattr(new / "opaque", "trusted.overlay.opaque"),
    "/whiteout is missing": lambda new: (new / "whiteout").unlink(),
    "/more is unexpected": lambda new: (new / "more").touch(),
    "/folder/file differs in size": lambda new: _keeping_time(new / "folder/file", b"longer content"),
    "/folder/file differs in mode": lambda new: (new / "folder/file").chmod(0o4755),
    "/folder/file differs in owner": lambda new: os.chown(new / "folder/file", 99, -1),
    "/folder/file differs in group": lambda new: os.chown(new / "folder/file", -1, 99),
    "/folder/file differs in time of modification": lambda new: os.utime(new / "folder/file", ns=(0, 1)),
    "/sparse differs in holes": lambda new: _keeping_time(new / "sparse", bytes(8 * MIB)),
    "/folder/link differs in hard links": lambda new: _apart(new / "folder/link"),
    "/setgid differs in mode": lambda new: (new / "setgid").chmod(0o755),
    "/ differs in mode": lambda new: new.chmod(0o777),
    "/symlink differs in size, target": lambda new: _point(new / "symlink", "elsewhere"),
    "/fifo differs in type": lambda new: _replaced(new / "fifo"),
    "/odd\\udcff\\n is missing": lambda new: os.unlink(os.fsencode(new) + b"/odd\xff\n"),  # noqa: PTH108 - no text
}


def _point(link: Path, target: str) -> None:
    times = link.lstat().st_mtime_ns
    link.unlink()
    link.symlink_to(target)
    os.utime(link, ns=(times, times), follow_symlinks=False)


def _replaced(path: Path) -> None:
    path.unlink()
    path.touch()


def _keeping_time(path: Path, content: bytes) -> None:
    """Write a file, its holes too, and set its times back, and those of its folder."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before, before))


def _apart(path: Path) -> None:
    """Make a copy of one of several names."""
    times = path.parent.stat().st_mtime_ns
    subprocess.run(["cp", "-a", path, path.with_name("copy")], check=True)
    path.with_name("copy").rename(path)
    os.utime(path.parent, ns=(times, times))


@pytest.mark.parametrize("named", LOSSES)
async def test_every_loss_of_a_copy_is_found(tmp_path: Path, pair: LayerPair, named: str) -> None:
    await _planted(tmp_path).copy(pair, _no_progress)
    assert differences(pair.old_path, pair.new_path, Interrupt()) == []
    LOSSES[named](Path(pair.new_path))
    assert named in "; ".join(differences(pair.old_path, pair.new_path, Interrupt(), limit=10))


async def test_trees_that_are_not_those_of_the_record_are_not_touched(tmp_path: Path, pair: LayerPair) -> None:
    store = _planted(tmp_path)
    for wrong in (
        {"old_inode": 1},
        {"new_inode": 1},
        {"old_inode": pair.new_inode},
        {"new_inode": pair.old_inode},
        {"new_path": pair.old_path, "new_inode": pair.old_inode},
        {"old_path": ""},
        {"new_path": "/"},
        {"new_path": f"{pair.new_path}/.."},
    ):
        spoilt = pair.model_copy(update=wrong)
        for act in (store.exchange(spoilt), store.copy(spoilt, _no_progress)):
            with pytest.raises(LayerCarryFailed):
                await act
    with pytest.raises(LayerCarryFailed):
        await store.exchange_back(pair.model_copy(update={"old_inode": 1}))
    assert _inodes(pair) == (pair.old_inode, pair.new_inode)
    assert (Path(pair.new_path) / "made-by-the-engine").is_dir()


async def test_an_exchanged_pair_is_not_copied_over(tmp_path: Path, pair: LayerPair) -> None:
    store = _planted(tmp_path)
    before = read_tree(pair.old_path)
    assert await store.exchange(pair)
    with pytest.raises(LayerCarryFailed, match="exchanged"):
        await store.copy(pair, _no_progress)
    assert tree_differences(before, read_tree(pair.new_path)) == ""


async def test_nothing_is_put_back_when_nothing_moved(tmp_path: Path, pair: LayerPair) -> None:
    Path(pair.new_path).parent.rename(tmp_path / "removed")
    await _planted(tmp_path).exchange_back(pair)
    with pytest.raises(LayerCarryFailed):
        await _planted(tmp_path).exchange(pair)


# ---- interrupted copies ----


def _copiers(pair: LayerPair) -> list[int]:
    """Child processes that have the new tree open."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"trees.child" not in (process / "cmdline").read_bytes():
                continue
            opened = [link.readlink() for link in (process / "fd").iterdir()]
            if Path(pair.new_path) in opened:
                found.append(int(process.name))
    return found


def _grow_heavy(pair: LayerPair) -> None:
    for number in range(4):
        (Path(pair.old_path) / f"heavy{number}").write_bytes(os.urandom(MIB) * 128)


async def _copying(store: OverlayLayerStore, pair: LayerPair) -> asyncio.Task[None]:
    """A copy that has begun, and whose process stands still: however quick the disk, it does not end by itself."""
    task = asyncio.create_task(store.copy(pair, _no_progress))
    async with asyncio.timeout(limit(60)):
        while not (copiers := _copiers(pair)):
            assert not task.done()
            await asyncio.sleep(0.001)
    for pid in copiers:
        os.kill(pid, signal.SIGSTOP)
    return task


@pytest.mark.deep
async def test_a_cancelled_copy_leaves_no_process_and_can_be_repeated(tmp_path: Path, pair: LayerPair) -> None:
    _grow_heavy(pair)
    store = _planted(tmp_path)
    task = await _copying(store, pair)
    assert _copiers(pair)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert _copiers(pair) == []
    await store.copy(pair, _no_progress)
    assert tree_differences(read_tree(pair.old_path), read_tree(pair.new_path)) == ""


@pytest.mark.deep
async def test_a_copy_of_a_killed_daemon_ends_with_it_and_can_be_repeated(tmp_path: Path, pair: LayerPair) -> None:
    _grow_heavy(pair)
    daemon = _elsewhere(_copies_and_says_so, tmp_path, pair)
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == b"copying\n"
    (copier,) = _copiers(pair)
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.wait()
    daemon.stdout.close()
    await _planted(tmp_path).copy(pair, _no_progress)
    assert copier not in _copiers(pair)
    assert tree_differences(read_tree(pair.old_path), read_tree(pair.new_path)) == ""


async def _copies_and_says_so(root: Path, pair: LayerPair) -> None:
    task = await _copying(_planted(root), pair)
    sys.stdout.write("copying\n")
    sys.stdout.flush()
    await task


# ---- in a process of its own: another filesystem, other mounts, fewer rights ----


def _elsewhere(scenario: Callable[..., object], root: Path, pair: LayerPair, *wrapper: str) -> subprocess.Popen[bytes]:
    """Run one of this module's scenarios in another Python; mounts that `wrapper` makes for it go with it."""
    run = (
        f"import asyncio, pathlib; from tests.engine import test_layers as tests; from gpudock_server.ports import "
        f"LayerPair; asyncio.run(tests.{scenario.__name__}(pathlib.Path({str(root)!r}), "
        f"LayerPair.model_validate_json({pair.model_dump_json()!r})))"
    )
    path = os.pathsep.join([str(REPOSITORY), *sys.path])
    words = [*wrapper, sys.executable, "-c", run]
    return subprocess.Popen(words, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path})


def _passes_elsewhere(scenario: Callable[..., object], root: Path, pair: LayerPair, *wrapper: str) -> None:
    ended = _elsewhere(scenario, root, pair, *wrapper)
    ended.communicate(timeout=limit(60))
    assert ended.returncode == 0


def _mounted(script: str) -> list[str]:
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", f'{script} && exec "$@"', "mounted"]


def test_a_layer_that_does_not_fit_is_not_begun(tmp_path: Path, pair: LayerPair) -> None:
    mount = f"mount -t tmpfs -o size=100m none {tmp_path}"
    _passes_elsewhere(_finds_no_room, tmp_path, pair, *_mounted(mount))


async def _finds_no_room(root: Path, pair: LayerPair) -> None:
    old, new = create_layer_folders(root, 1, 2)
    (old / "heavy").write_bytes(bytes(60 * MIB))
    pair = pair.model_copy(update={"old_inode": old.stat().st_ino, "new_inode": new.stat().st_ino})
    with pytest.raises(DiskFull) as full:
        await _planted(root).copy(pair, _no_progress)
    assert full.value.needed_bytes >= 60 * MIB > 40 * MIB >= full.value.available_bytes
    assert list(new.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_is_told_from_other_failures(tmp_path: Path, pair: LayerPair) -> None:
    mount = f"mount -t tmpfs -o size=100m,nr_inodes=160 none {tmp_path}"
    _passes_elsewhere(_runs_out_of_inodes, tmp_path, pair, *_mounted(mount))


async def _runs_out_of_inodes(root: Path, pair: LayerPair) -> None:
    old, new = create_layer_folders(root, 1, 2)
    for number in range(100):
        (old / f"small{number}").touch()
    pair = pair.model_copy(update={"old_inode": old.stat().st_ino, "new_inode": new.stat().st_ino})
    with pytest.raises(DiskFull):
        await _planted(root).copy(pair, _no_progress)


def test_an_exchange_across_a_boundary_changes_nothing_and_says_so(tmp_path: Path, pair: LayerPair) -> None:
    folder = Path(pair.new_path).parent
    _passes_elsewhere(_cannot_exchange, tmp_path, pair, *_mounted(f"mount --bind {folder} {folder}"))


async def _cannot_exchange(root: Path, pair: LayerPair) -> None:
    """Two mounts of one filesystem give the error that two project quotas give."""
    assert await _planted(root).exchange(pair) is False
    assert _inodes(pair) == (pair.old_inode, pair.new_inode)


def test_without_the_right_to_see_trusted_attributes_nothing_is_copied(tmp_path: Path, pair: LayerPair) -> None:
    rights = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    _passes_elsewhere(_refuses_to_copy, tmp_path, pair, *rights)


async def _refuses_to_copy(root: Path, pair: LayerPair) -> None:
    assert dict(await _planted(root).methods()) == {
        LayerTransferMethod.EXCHANGE: "",
        LayerTransferMethod.COPY: "the daemon is missing the capabilities CAP_SYS_ADMIN",
        LayerTransferMethod.COMMIT: "",
    }
    with pytest.raises(LayerCarryFailed, match="CAP_SYS_ADMIN"):
        await _planted(root).copy(pair, _no_progress)
    assert (Path(pair.new_path) / "made-by-the-engine").is_dir()


async def test_a_tree_is_measured_in_what_it_takes_on_disk(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    (tmp_path / "link").hardlink_to(tmp_path / "file")
    with (tmp_path / "hole").open("wb") as hole:
        hole.truncate(100 * MIB)
    assert MIB <= await tree_bytes(str(tmp_path), apparent=False, timeout_seconds=10) < 2 * MIB
    assert await tree_bytes(str(tmp_path), apparent=True, timeout_seconds=10) > 101 * MIB
    with pytest.raises(ValueError, match="no size"):
        await tree_bytes(str(tmp_path / "nowhere"), apparent=False, timeout_seconds=10)
