"""Copies and exchanges of layers that the test makes itself: losses, interruptions, full disks and missing rights."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from gpudock_server.adapters.host.disk_usage import tree_bytes
from gpudock_server.adapters.host.trees.comparison import differences
from gpudock_server.adapters.host.trees.interrupt import Interrupt
from gpudock_server.adapters.layers import OverlayLayerStore
from gpudock_server.errors import DiskFull, LayerCarryFailed
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.ports import LayerPair

from tests.engine.sample_trees import (
    create_layer_folders,
    read_tree,
    tree_differences,
)
from tests.engine.snapshot_host import ignore_progress
from tests.rig.patience import limit
from tests.rig.rig import REPOSITORY

MIB = 1 << 20


@pytest.fixture
def pair(tmp_path: Path) -> LayerPair:
    """Two layers below tmp_path: one with an entry of each kind, and one as the engine creates it."""
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
    with open(os.fsencode(old) + b"/odd\xff\n", "wb"):  # noqa: PTH123 - the name is no UTF-8
        pass
    old.chmod(0o710)
    os.setxattr(new, "user.of_the_new", b"goes")
    (new / "made-by-the-engine").mkdir()
    return LayerPair(old_path=str(old), old_inode=old.stat().st_ino, new_path=str(new), new_inode=new.stat().st_ino)


def _current_inodes(pair: LayerPair) -> tuple[int, int]:
    """The inodes of the folders that lie at the two paths now."""
    return Path(pair.old_path).stat().st_ino, Path(pair.new_path).stat().st_ino


def _copying_store(tmp_path: Path) -> OverlayLayerStore:
    return OverlayLayerStore(LayerTransferMethod.COPY, str(tmp_path), local=True)


async def test_a_copy_has_everything_that_overlayfs_keeps_in_a_layer(tmp_path: Path, pair: LayerPair) -> None:
    await _copying_store(tmp_path).copy(pair, ignore_progress)
    new = Path(pair.new_path)
    root, whiteout = os.stat(new), os.stat(new / "whiteout")  # noqa: PTH116 - Path.stat is refused by ASYNC240
    assert os.getxattr(new / "opaque", "trusted.overlay.opaque") == b"y"
    assert (stat.S_ISCHR(whiteout.st_mode), whiteout.st_rdev) == (True, 0)
    assert (root.st_mode & 0o777, os.listxattr(new)) == (0o710, ["trusted.overlay.origin"])
    assert tree_differences(read_tree(pair.old_path), read_tree(pair.new_path)) == ""


# What `differences` reports -> how the test damages the copy.
DAMAGES: dict[str, Callable[[Path], object]] = {
    "/opaque differs in extended attributes": lambda new: os.removexattr(new / "opaque", "trusted.overlay.opaque"),
    "/whiteout is missing": lambda new: (new / "whiteout").unlink(),
    "/more is unexpected": lambda new: (new / "more").touch(),
    "/folder/file differs in size": lambda new: _write_with_old_time(new / "folder/file", b"longer content"),
    "/folder/file differs in mode": lambda new: (new / "folder/file").chmod(0o4755),
    "/folder/file differs in owner": lambda new: os.chown(new / "folder/file", 99, -1),
    "/folder/file differs in group": lambda new: os.chown(new / "folder/file", -1, 99),
    "/folder/file differs in time of modification": lambda new: os.utime(new / "folder/file", ns=(0, 1)),
    "/sparse differs in holes": lambda new: _write_with_old_time(new / "sparse", bytes(8 * MIB)),
    "/folder/link differs in hard links": lambda new: _break_hard_link(new / "folder/link"),
    "/setgid differs in mode": lambda new: (new / "setgid").chmod(0o755),
    "/ differs in mode": lambda new: new.chmod(0o777),
    "/symlink differs in size, target": lambda new: _change_target(new / "symlink", "elsewhere"),
    "/fifo differs in type": lambda new: _replace_by_file(new / "fifo"),
    "/odd\\udcff\\n is missing": lambda new: os.unlink(os.fsencode(new) + b"/odd\xff\n"),  # noqa: PTH108 - the name is no UTF-8
}


def _change_target(link: Path, target: str) -> None:
    times = link.lstat().st_mtime_ns
    link.unlink()
    link.symlink_to(target)
    os.utime(link, ns=(times, times), follow_symlinks=False)


def _replace_by_file(path: Path) -> None:
    path.unlink()
    path.touch()


def _write_with_old_time(path: Path, content: bytes) -> None:
    """Write a file without holes, and restore its modification time."""
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before, before))


def _break_hard_link(path: Path) -> None:
    """Replace one of several hard links by a copy of the file."""
    times = path.parent.stat().st_mtime_ns
    subprocess.run(["cp", "-a", path, path.with_name("copy")], check=True)
    path.with_name("copy").rename(path)
    os.utime(path.parent, ns=(times, times))


@pytest.mark.parametrize("difference", DAMAGES)
async def test_every_difference_of_a_copy_is_found(tmp_path: Path, pair: LayerPair, difference: str) -> None:
    await _copying_store(tmp_path).copy(pair, ignore_progress)
    assert differences(pair.old_path, pair.new_path, Interrupt()) == []
    DAMAGES[difference](Path(pair.new_path))
    assert difference in "; ".join(differences(pair.old_path, pair.new_path, Interrupt(), limit=10))


async def test_folders_other_than_the_recorded_ones_are_not_touched(tmp_path: Path, pair: LayerPair) -> None:
    store = _copying_store(tmp_path)
    for change in (
        {"old_inode": 1},
        {"new_inode": 1},
        {"old_inode": pair.new_inode},
        {"new_inode": pair.old_inode},
        {"new_path": pair.old_path, "new_inode": pair.old_inode},
        {"old_path": ""},
        {"new_path": "/"},
        {"new_path": f"{pair.new_path}/.."},
    ):
        wrong_pair = pair.model_copy(update=change)
        for call in (store.exchange(wrong_pair), store.copy(wrong_pair, ignore_progress)):
            with pytest.raises(LayerCarryFailed):
                await call
    with pytest.raises(LayerCarryFailed):
        await store.exchange_back(pair.model_copy(update={"old_inode": 1}))
    assert _current_inodes(pair) == (pair.old_inode, pair.new_inode)
    assert (Path(pair.new_path) / "made-by-the-engine").is_dir()


async def test_an_exchanged_pair_is_not_copied(tmp_path: Path, pair: LayerPair) -> None:
    store = _copying_store(tmp_path)
    before = read_tree(pair.old_path)
    assert await store.exchange(pair)
    with pytest.raises(LayerCarryFailed, match="exchanged"):
        await store.copy(pair, ignore_progress)
    assert tree_differences(before, read_tree(pair.new_path)) == ""


async def test_exchange_back_does_nothing_without_an_exchange(tmp_path: Path, pair: LayerPair) -> None:
    Path(pair.new_path).parent.rename(tmp_path / "removed")
    await _copying_store(tmp_path).exchange_back(pair)
    with pytest.raises(LayerCarryFailed):
        await _copying_store(tmp_path).exchange(pair)


# ---- interrupted copies ----


def _copying_processes(pair: LayerPair) -> list[int]:
    """Ids of the child processes that have the folder of the new layer open."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"trees.child" not in (process / "cmdline").read_bytes():
                continue
            opened = [link.readlink() for link in (process / "fd").iterdir()]
            if Path(pair.new_path) in opened:
                pids.append(int(process.name))
    return pids


def _add_large_files(pair: LayerPair) -> None:
    for number in range(4):
        (Path(pair.old_path) / f"heavy{number}").write_bytes(os.urandom(MIB) * 128)


async def _start_copy_and_freeze(store: OverlayLayerStore, pair: LayerPair) -> asyncio.Task[None]:
    """Start a copy and stop its child process, so that the copy does not end before the test continues."""
    async with asyncio.timeout(limit(60)):
        while True:
            copy = asyncio.create_task(store.copy(pair, ignore_progress))
            while not (pids := _copying_processes(pair)) and not copy.done():
                await asyncio.sleep(0.001)
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
            if _copying_processes(pair):
                return copy
            # The copy ended before its child process was stopped, and is repeated.
            await copy


@pytest.mark.deep
async def test_a_cancelled_copy_leaves_no_process_and_can_be_repeated(tmp_path: Path, pair: LayerPair) -> None:
    _add_large_files(pair)
    store = _copying_store(tmp_path)
    copy = await _start_copy_and_freeze(store, pair)
    copy.cancel()
    with pytest.raises(asyncio.CancelledError):
        await copy
    assert _copying_processes(pair) == []
    await store.copy(pair, ignore_progress)
    assert tree_differences(read_tree(pair.old_path), read_tree(pair.new_path)) == ""


@pytest.mark.deep
async def test_a_copy_of_a_killed_daemon_ends_with_it_and_can_be_repeated(tmp_path: Path, pair: LayerPair) -> None:
    _add_large_files(pair)
    daemon = _start_scenario(_copy_until_killed, tmp_path, pair)
    assert daemon.stdout is not None
    assert daemon.stdout.readline() == b"copying\n"
    (copier,) = _copying_processes(pair)
    os.kill(daemon.pid, signal.SIGKILL)
    daemon.wait()
    daemon.stdout.close()
    await _copying_store(tmp_path).copy(pair, ignore_progress)
    assert copier not in _copying_processes(pair)
    assert tree_differences(read_tree(pair.old_path), read_tree(pair.new_path)) == ""


async def _copy_until_killed(root: Path, pair: LayerPair) -> None:
    task = await _start_copy_and_freeze(_copying_store(root), pair)
    sys.stdout.write("copying\n")
    sys.stdout.flush()
    await task


# ---- in another process: with another filesystem, other mounts, fewer capabilities ----


def _start_scenario(
    scenario: Callable[..., object], root: Path, pair: LayerPair, *wrapper: str
) -> subprocess.Popen[bytes]:
    """Run a function of this module in another Python process, whose mounts, made by `wrapper`, end with it."""
    run = (
        f"import asyncio, pathlib; from tests.engine import test_layer_copies as tests; "
        f"from gpudock_server.ports import LayerPair; "
        f"asyncio.run(tests.{scenario.__name__}(pathlib.Path({str(root)!r}), "
        f"LayerPair.model_validate_json({pair.model_dump_json()!r})))"
    )
    path = os.pathsep.join([str(REPOSITORY), *sys.path])
    command = [*wrapper, sys.executable, "-c", run]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path})


def _check_scenario(scenario: Callable[..., object], root: Path, pair: LayerPair, *wrapper: str) -> None:
    process = _start_scenario(scenario, root, pair, *wrapper)
    process.communicate(timeout=limit(60))
    assert process.returncode == 0


def _with_mount(script: str) -> list[str]:
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", f'{script} && exec "$@"', "mounted"]


def test_a_copy_that_does_not_fit_on_the_disk_is_not_begun(tmp_path: Path, pair: LayerPair) -> None:
    mount = f"mount -t tmpfs -o size=100m none {tmp_path}"
    _check_scenario(_copy_too_large_layer, tmp_path, pair, *_with_mount(mount))


async def _copy_too_large_layer(root: Path, pair: LayerPair) -> None:
    old, new = create_layer_folders(root, 1, 2)
    (old / "heavy").write_bytes(bytes(60 * MIB))
    pair = pair.model_copy(update={"old_inode": old.stat().st_ino, "new_inode": new.stat().st_ino})
    with pytest.raises(DiskFull) as full:
        await _copying_store(root).copy(pair, ignore_progress)
    assert full.value.needed_bytes >= 60 * MIB > 40 * MIB >= full.value.available_bytes
    assert list(new.iterdir()) == []


def test_a_copy_that_fills_the_disk_fails_with_disk_full(tmp_path: Path, pair: LayerPair) -> None:
    mount = f"mount -t tmpfs -o size=100m,nr_inodes=160 none {tmp_path}"
    _check_scenario(_copy_too_many_files, tmp_path, pair, *_with_mount(mount))


async def _copy_too_many_files(root: Path, pair: LayerPair) -> None:
    old, new = create_layer_folders(root, 1, 2)
    for number in range(100):
        (old / f"small{number}").touch()
    pair = pair.model_copy(update={"old_inode": old.stat().st_ino, "new_inode": new.stat().st_ino})
    with pytest.raises(DiskFull):
        await _copying_store(root).copy(pair, ignore_progress)


def test_an_exchange_across_mounts_changes_nothing_and_returns_false(tmp_path: Path, pair: LayerPair) -> None:
    folder = Path(pair.new_path).parent
    _check_scenario(_exchange_across_mounts, tmp_path, pair, *_with_mount(f"mount --bind {folder} {folder}"))


async def _exchange_across_mounts(root: Path, pair: LayerPair) -> None:
    """Renaming between two mounts of a filesystem fails with the same error as between two project quotas."""
    assert await _copying_store(root).exchange(pair) is False
    assert _current_inodes(pair) == (pair.old_inode, pair.new_inode)


def test_without_cap_sys_admin_nothing_is_copied(tmp_path: Path, pair: LayerPair) -> None:
    without_capability = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    _check_scenario(_copy_without_capability, tmp_path, pair, *without_capability)


async def _copy_without_capability(root: Path, pair: LayerPair) -> None:
    assert dict(await _copying_store(root).methods()) == {
        LayerTransferMethod.EXCHANGE: "",
        LayerTransferMethod.COPY: "the daemon is missing the capabilities CAP_SYS_ADMIN",
        LayerTransferMethod.COMMIT: "",
    }
    with pytest.raises(LayerCarryFailed, match="CAP_SYS_ADMIN"):
        await _copying_store(root).copy(pair, ignore_progress)
    assert (Path(pair.new_path) / "made-by-the-engine").is_dir()


async def test_tree_bytes_counts_hard_links_once_and_holes_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(MIB))
    (tmp_path / "link").hardlink_to(tmp_path / "file")
    with (tmp_path / "hole").open("wb") as hole:
        hole.truncate(100 * MIB)
    assert MIB <= await tree_bytes(str(tmp_path), apparent=False, timeout_seconds=10) < 2 * MIB
    assert await tree_bytes(str(tmp_path), apparent=True, timeout_seconds=10) > 101 * MIB
    with pytest.raises(ValueError, match="no size"):
        await tree_bytes(str(tmp_path / "nowhere"), apparent=False, timeout_seconds=10)
