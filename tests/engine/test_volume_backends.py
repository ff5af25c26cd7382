"""Volume backends on real filesystems, mounted by a real engine: sizes that hold, and data that stays."""

# Nothing else waits for these tests' loops.
# ruff: noqa: ASYNC221, ASYNC240
from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.adapters.volumes import (
    LoopBackend,
    MirrorVolumeCopier,
    PlainBackend,
    ProjectQuotaBackend,
    attach_all_volumes,
)
from gpudock_server.adapters.volumes.backing_folder import BackingFolder
from gpudock_server.adapters.volumes.filesystems import FILESYSTEMS
from gpudock_server.adapters.volumes.loop import _exchange_images
from gpudock_server.core.volumes.backends import choose_backend
from gpudock_server.errors import (
    DiskFull,
    SizeNotSupported,
    VolumeFailed,
    VolumeInUse,
    VolumeTooSmallForData,
)
from gpudock_server.model.engine import LABEL_UID
from gpudock_server.model.volume import VolumeBackendKind, VolumeBacking
from gpudock_server.ports import ShrinkNeedsCopy

from tests.engine.loop_devices import loop_devices_below
from tests.engine.sample_trees import create_tree
from tests.engine.volume_containers import TARGET, VolumeContainer, volume_container
from tests.rig import HttpStatusError, Rig
from tests.rig.patience import limit
from tests.rig.rig import REPOSITORY
from tests.selection import deep_except

MIB = 1 << 20
SIZE = 320 * MIB
# Writes blocks and their checksums until a write fails, which ends the container.
WRITER = (
    "i=0; while :; do dd if=/dev/urandom of=/data/b$i bs=64k count=1 conv=fsync 2>/dev/null || exit 1;"
    " sha256sum /data/b$i >> /data/sums || exit 1; i=$((i+1)); done"
)


@pytest.fixture
def root(rig: Rig) -> Iterator[Path]:
    """A folder for stores; what is attached below it when the test ends is a leak that the rig would not show."""
    folder = rig.folder / f"volumes-{uuid.uuid4()}"
    yield folder
    assert _loops(folder) == [], "a test destroys what it makes"


@pytest_asyncio.fixture
async def engine(clean_engine: Rig) -> AsyncIterator[DockerEngine]:
    made = await DockerEngine.connect(clean_engine.engine.url)
    yield made
    await made.close()


@pytest_asyncio.fixture(params=deep_except(["xfs"], [filesystem.name for filesystem in FILESYSTEMS]))
async def loop(request: pytest.FixtureRequest, root: Path) -> LoopBackend:
    """The loop backend on each filesystem that this host has."""
    backend = LoopBackend(root, local=True, filesystem=request.param)
    if reason := await backend.unavailable_reason():
        pytest.skip(reason)
    return backend


def _loops(folder: Path) -> list[str]:
    """The images below a folder that have a loop device, each as often as it has one."""
    shown = subprocess.run(
        ["losetup", "--noheadings", "--list", "--output", "BACK-FILE"], check=True, capture_output=True
    )
    return [line.strip() for line in shown.stdout.decode().splitlines() if line.strip().startswith(f"{folder}/")]


def _attached_where_a_link_leads(store: VolumeBacking, *, link_of: VolumeBacking) -> Path:
    """Attach a store's image to some device, which the link of another store leads to, as after a reboot; the device.

    The link is changed, and no number is asked for: between a test's detaching and attaching, others attach theirs.
    """
    command = ["losetup", "--find", "--show", f"{store.folder}/image"]
    device = Path(subprocess.run(command, check=True, capture_output=True).stdout.decode().strip())
    link = Path(link_of.folder, "device")
    link.unlink()
    link.symlink_to(device)
    return device


def _new_uid() -> str:
    return str(uuid.uuid4())


async def _given(engine: DockerEngine, backing: VolumeBacking) -> str:
    """The backing as an engine volume; its name."""
    await engine.create_volume(
        backing.engine_volume, labels={LABEL_UID: backing.uid}, driver_options=backing.driver_options
    )
    return backing.engine_volume


async def _taken(engine: DockerEngine, backend: LoopBackend | ProjectQuotaBackend, backing: VolumeBacking) -> None:
    await engine.remove_volume(backing.engine_volume)
    await backend.destroy(backing)


def _checked_blocks(one: VolumeContainer) -> int:
    """How many blocks the writer has written; every one but perhaps the last has its checksum."""
    one.run("sh", "-c", f"cd / && sha256sum -c {TARGET}/sums")
    return len(one.run("cat", f"{TARGET}/sums").stdout.splitlines())


# ---- loop images ----


async def test_size_is_a_limit(rig: Rig, engine: DockerEngine, loop: LoopBackend) -> None:
    backing = await loop.create(_new_uid(), "data", SIZE)
    assert await loop.create(backing.uid, "data", SIZE) == backing
    volume = await _given(engine, backing)
    with volume_container(rig, volume) as one:
        size, used = one.df()
        assert SIZE <= size < SIZE * 1.05
        assert used < 40 * MIB
        assert "No space left" in one.fill()
        filled = one.run("stat", "-c", "%s", f"{TARGET}/fill").stdout
        assert SIZE * 0.85 < int(filled) <= SIZE
        usage = await loop.usage(backing)
        assert (usage.size_bytes, usage.used_bytes) == one.df()
        assert usage.minimum_bytes > usage.used_bytes
    await _taken(engine, loop, backing)
    await loop.destroy(backing)
    assert not Path(backing.folder).exists()


@pytest.mark.deep
async def test_growing_under_a_writer(rig: Rig, engine: DockerEngine, loop: LoopBackend) -> None:
    backing = await loop.create(_new_uid(), "data", SIZE)
    volume = await _given(engine, backing)
    with volume_container(rig, volume, "sh", "-c", WRITER) as one:
        pid = one.pid
        for step in range(1, 21):
            backing = await loop.grow(backing, SIZE + step * 20 * MIB)
            assert await loop.grow(backing, backing.size_bytes) == backing
            size, _ = one.df()
            assert backing.size_bytes <= size < backing.size_bytes * 1.05
        before = len(one.run("cat", f"{TARGET}/sums").stdout.splitlines())
        deadline = time.monotonic() + limit(30)
        while len(one.run("cat", f"{TARGET}/sums").stdout.splitlines()) <= before + 3:
            assert time.monotonic() < deadline, "the writer has stopped"
            await asyncio.sleep(0.05)
        assert one.pid == pid
        one.stop()
    with volume_container(rig, volume) as reader:
        assert _checked_blocks(reader) > before
    assert BackingFolder(Path(backing.folder).parent, backing.uid).read() == backing
    await _taken(engine, loop, backing)


async def test_shrinking(rig: Rig, engine: DockerEngine, loop: LoopBackend) -> None:
    backing = await loop.create(_new_uid(), "data", 600 * MIB)
    volume = await _given(engine, backing)
    with volume_container(rig, volume) as one:
        one.run("dd", "if=/dev/urandom", f"of={TARGET}/kept", "bs=1M", "count=150", "conv=fsync")
        digest = one.run("sha256sum", f"{TARGET}/kept").stdout
        with pytest.raises(VolumeTooSmallForData) as refused:
            await loop.shrink(backing, 150 * MIB)
        assert 150 * MIB < refused.value.used_bytes < refused.value.minimum_bytes <= 256 * MIB
        assert refused.value.requested_bytes == 150 * MIB
        if backing.filesystem == "btrfs":
            backing = await loop.shrink(backing, 400 * MIB)
            assert await loop.shrink(backing, 400 * MIB) == backing
            assert one.df()[0] == 400 * MIB
            assert Path(backing.folder, "image").stat().st_size == 400 * MIB
            assert "No space left" in one.fill()
        else:
            with pytest.raises(ShrinkNeedsCopy):
                await loop.shrink(backing, 400 * MIB)
            assert one.df()[0] >= 600 * MIB
        assert one.run("sha256sum", f"{TARGET}/kept").stdout == digest
    await _taken(engine, loop, backing)


@pytest.mark.deep
async def test_two_stores_change_their_places(rig: Rig, engine: DockerEngine, loop: LoopBackend, root: Path) -> None:
    old = await loop.create(_new_uid(), "data", 600 * MIB)
    new = await loop.replacement(old, _new_uid(), 400 * MIB)
    assert await loop.replacement(old, new.uid, 400 * MIB) == new
    volume, content = await _given(engine, old), await loop.content(old)
    for backing, text in ((old, "old"), (new, "new")):
        async with loop.open_files(backing) as folder:
            Path(folder, "which").write_text(text)
    # What they are to be afterwards: the sizes go with the contents.
    small, large = old.model_copy(update={"size_bytes": 400 * MIB}), new.model_copy(update={"size_bytes": 600 * MIB})
    with volume_container(rig, volume) as one:
        with pytest.raises(VolumeInUse):
            await loop.exchange(large, small, content)
        assert one.run("cat", f"{TARGET}/which").stdout == "old"
        one.stop()
        for _ in range(2):
            await loop.exchange(large, small, content)
            one.start()
            assert one.run("cat", f"{TARGET}/which").stdout == "new"
            assert one.df()[0] < 440 * MIB
            one.stop()
        # A daemon that dies right after the rename leaves neither device nor link, and the next one goes on.
        one_folder, other_folder = (BackingFolder(root, backing.uid) for backing in (old, new))
        for device in loop_devices_below(root):
            subprocess.run(["losetup", "--detach", device], check=True)
        one_folder.device.unlink()
        _exchange_images(one_folder, other_folder)
        await loop.exchange(old, new, content)
        assert (one_folder.read(), other_folder.read()) == (old, new)
        one.start()
        assert one.run("cat", f"{TARGET}/which").stdout == "old"
        assert one.df()[0] > 560 * MIB
    with pytest.raises(VolumeFailed, match="neither"):
        await loop.exchange(old, new, "1")
    await loop.destroy(new)
    await _taken(engine, loop, old)


@pytest.mark.deep
async def test_what_is_mounted_is_not_destroyed(rig: Rig, engine: DockerEngine, loop: LoopBackend) -> None:
    backing = await loop.create(_new_uid(), "data", SIZE)
    volume = await _given(engine, backing)
    with volume_container(rig, volume) as one:
        one.run("sh", "-c", f"echo kept > {TARGET}/file")
        with pytest.raises(VolumeInUse):
            await loop.destroy(backing)
        one.stop()
        one.start()
        assert one.run("cat", f"{TARGET}/file").stdout == "kept\n"
    await _taken(engine, loop, backing)


async def test_deleted_files_give_their_room_back(rig: Rig, engine: DockerEngine, loop: LoopBackend) -> None:
    backing = await loop.create(_new_uid(), "data", SIZE)
    volume = await _given(engine, backing)
    empty = await loop.pool()
    assert empty.promised_bytes == SIZE
    with volume_container(rig, volume) as one:
        one.run("dd", "if=/dev/urandom", f"of={TARGET}/file", "bs=1M", "count=100", "conv=fsync")
        full = await loop.pool()
        assert full.allocated_bytes >= empty.allocated_bytes + 95 * MIB
        one.run("rm", f"{TARGET}/file")
        # Discarded when the journal is written, which each does now and then by itself, or when it is unmounted.
        one.run("sync")
        if backing.filesystem == "xfs":
            one.stop()
        deadline = time.monotonic() + limit(60)
        while (await loop.pool()).allocated_bytes > full.allocated_bytes - 90 * MIB:
            assert time.monotonic() < deadline, "the image is as large as before"
            await asyncio.sleep(0.1)
    await _taken(engine, loop, backing)
    assert (await loop.pool()).promised_bytes == 0


async def test_after_a_reboot(rig: Rig, engine: DockerEngine, root: Path) -> None:
    loop = LoopBackend(root, local=True)
    backing, other = [await loop.create(_new_uid(), name, SIZE) for name in ("data", "other")]
    volume = await _given(engine, backing)
    with volume_container(rig, volume) as one:
        one.run("sh", "-c", f"echo kept > {TARGET}/file")
        one.stop()
        devices = [Path(each.folder, "device").readlink() for each in (backing, other)]
        for device in devices:
            subprocess.run(["losetup", "--detach", device], check=True)
        with pytest.raises(HttpStatusError):
            one.start()
        device = _attached_where_a_link_leads(other, link_of=backing)
        assert await attach_all_volumes(root) == ()
        assert await attach_all_volumes(root) == ()
        assert sorted(_loops(root)) == sorted(f"{each.folder}/image" for each in (backing, other))
        assert Path(other.folder, "device").readlink() == device
        assert Path(backing.folder, "device").readlink() != device
        one.start()
        assert one.run("cat", f"{TARGET}/file").stdout == "kept\n"
    await _taken(engine, loop, backing)
    await loop.destroy(other)


async def test_a_stale_link_leads_nowhere(rig: Rig, engine: DockerEngine, root: Path) -> None:
    loop = LoopBackend(root, local=True)
    backing, other = [await loop.create(_new_uid(), name, SIZE) for name in ("data", "other")]
    volume = await _given(engine, backing)
    device = Path(backing.folder, "device").readlink()
    other_device = Path(other.folder, "device").readlink()
    for each in (device, other_device):
        subprocess.run(["losetup", "--detach", each], check=True)
    _attached_where_a_link_leads(other, link_of=backing)
    await loop.attach(other)
    with pytest.raises(HttpStatusError), volume_container(rig, volume):
        pass
    await engine.remove_volume(volume)
    await loop.destroy(backing)
    await loop.destroy(other)


async def test_one_that_cannot_be_attached_does_not_keep_others_from_it(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    backing, broken = [await loop.create(_new_uid(), name, SIZE) for name in ("data", "broken")]
    for each in (backing, broken):
        subprocess.run(["losetup", "--detach", Path(each.folder, "device").readlink()], check=True)
    Path(broken.folder, "image").unlink()
    damaged = BackingFolder(root, _new_uid())
    damaged.path.mkdir()
    damaged.record.write_text("{")
    problems = await attach_all_volumes(root)
    assert {problem.uid for problem in problems} == {broken.uid, damaged.uid}
    assert _loops(root) == [f"{backing.folder}/image"]
    with pytest.raises(VolumeFailed, match="does not exist"):
        await loop.attach(broken)
    await damaged.remove()
    for each in (backing, broken):
        await loop.destroy(each)


@pytest.mark.parametrize("small", [16 * MIB, 100 * MIB])
async def test_small_volumes(root: Path, small: int) -> None:
    loop = LoopBackend(root, local=True)
    try:
        backing = await loop.create(_new_uid(), "small", small)
    except SizeNotSupported as error:
        pytest.skip(str(error))
    assert backing.filesystem != "xfs"
    assert (await loop.usage(backing)).size_bytes >= small
    backing = await loop.grow(backing, 10 * small)
    assert (await loop.usage(backing)).size_bytes >= 10 * small
    await loop.destroy(backing)


async def test_sizes_that_no_filesystem_takes(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    with pytest.raises(SizeNotSupported, match="xfs needs at least 236 MiB"):
        await loop.create(_new_uid(), "tiny", 1 * MIB)
    assert not root.exists()


async def test_a_uid_that_is_none(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    for uid in ("", "../etc", "6FA459EA-EE8A-3CA4-894E-DB77E160355E", "6fa459ea-ee8a-3ca4-894e-db77e160355e/"):
        with pytest.raises(VolumeFailed):
            await loop.create(uid, "data", SIZE)
    assert not root.exists()


async def test_a_store_of_another_kind_is_left_alone(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    folder = BackingFolder(root, _new_uid())
    folder.write(
        VolumeBacking(
            kind=VolumeBackendKind.PROJECT_QUOTA, uid=folder.uid, name="data", engine_volume="data", filesystem="xfs"
        )
    )
    with pytest.raises(VolumeFailed, match="is a volume of kind PROJECT_QUOTA"):
        await loop.create(folder.uid, "data", SIZE)
    assert [path.name for path in folder.path.iterdir()] == ["volume.json"]
    await folder.remove()
    assert list(root.iterdir()) == []


async def test_what_the_engine_elsewhere_cannot_have(root: Path) -> None:
    assert await LoopBackend(root, local=False).unavailable_reason() == "the engine runs on another host"
    assert await ProjectQuotaBackend(root, local=False).unavailable_reason() == "the engine runs on another host"


# ---- kill -9 ----

_CUT_OFF = """
import asyncio, sys
from pathlib import Path
from gpudock_server.adapters.volumes import LoopBackend
from gpudock_server.adapters.volumes.backing_folder import BackingFolder

async def main(what, root, uid):
    loop = LoopBackend(Path(root), local=True)
    print("begun", flush=True)
    if what == "create":
        return await loop.create(uid, "data", {size})
    backing = BackingFolder(Path(root), uid).read()
    return await (loop.destroy(backing) if what == "destroy" else loop.grow(backing, 2 * {size}))

asyncio.run(main(*sys.argv[1:]))
"""


async def _killed(what: str, root: Path, uid: str, seconds: float) -> None:
    """Do it in a process of its own, which is killed `seconds` after it has begun."""
    words = [sys.executable, "-c", _CUT_OFF.format(size=SIZE), what, str(root), uid]
    process = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"begun\n"
    await asyncio.sleep(seconds)
    if process.returncode is None:
        process.send_signal(signal.SIGKILL)
    await process.wait()


@pytest.mark.parametrize("seconds", deep_except([0.05], [0.0, 0.05, 0.1, 0.2, 0.3]))
async def test_killed_and_repeated(root: Path, seconds: float) -> None:
    loop = LoopBackend(root, local=True)
    uid = _new_uid()
    await _killed("create", root, uid, seconds)
    backing = await loop.create(uid, "data", SIZE)
    assert _loops(root) == [f"{backing.folder}/image"]
    async with loop.open_files(backing) as folder:
        Path(folder, "kept").write_bytes(b"kept")
    await _killed("grow", root, uid, seconds)
    backing = await loop.grow(backing, 2 * SIZE)
    usage = await loop.usage(backing)
    assert 2 * SIZE <= usage.size_bytes < 2.1 * SIZE
    async with loop.open_files(backing) as folder:
        assert Path(folder, "kept").read_bytes() == b"kept"
    await _killed("destroy", root, uid, seconds)
    await loop.destroy(backing)
    assert list(root.iterdir()) == []


async def test_what_a_killed_mkfs_leaves_is_made_anew(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    backing = await loop.create(_new_uid(), "data", SIZE)
    folder = BackingFolder(root, backing.uid)
    subprocess.run(["losetup", "--detach", folder.device.readlink()], check=True)
    folder.image.unlink()
    folder.unfinished.write_bytes(b"half")
    assert await loop.create(backing.uid, "data", SIZE) == backing
    assert not folder.unfinished.exists()
    assert (await loop.usage(backing)).size_bytes >= SIZE
    await loop.destroy(backing)


@pytest.mark.deep
async def test_an_opened_volume_is_closed_by_kill_9(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    backing = await loop.create(_new_uid(), "data", SIZE)
    script = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom gpudock_server.adapters.volumes import LoopBackend\n"
        "from gpudock_server.adapters.volumes.backing_folder import BackingFolder\n"
        "async def main(root, uid):\n"
        "    loop = LoopBackend(Path(root), local=True)\n"
        "    async with loop.open_files(BackingFolder(Path(root), uid).read()) as folder:\n"
        "        print('begun', flush=True)\n"
        "        await asyncio.sleep(1000)\n"
        "asyncio.run(main(*sys.argv[1:]))\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(root), backing.uid, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"begun\n"
    with pytest.raises(VolumeInUse):
        await loop.destroy(backing)
    process.kill()
    await process.wait()
    await loop.destroy(backing)


_HOLDS_NO_OTHER = """
import asyncio, subprocess, sys
from pathlib import Path
from gpudock_server.adapters.volumes import LoopBackend
from gpudock_server.adapters.volumes.backing_folder import BackingFolder
from gpudock_server.errors import VolumeInUse

async def main(root, open_files, other, point):
    loop = LoopBackend(Path(root), local=True)
    first, second = (BackingFolder(Path(root), uid).read() for uid in (open_files, other))
    subprocess.run(["mount", Path(second.folder, "device"), point], check=True)
    async with loop.open_files(first):
        try:
            await loop.destroy(second)
        except VolumeInUse:
            print("in use", flush=True)
        subprocess.run(["umount", point], check=True)
        await loop.destroy(second)
        print("gone", flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.deep
async def test_an_opened_volume_holds_no_other(rig: Rig, root: Path) -> None:
    loop = LoopBackend(root, local=True)
    open_files, other = [await loop.create(_new_uid(), name, SIZE) for name in ("opened", "other")]
    point = rig.folder / "a folder\twith odd characters"
    point.mkdir()
    # In a namespace of its own: in ours, any other that begins meanwhile would begin with a copy of the mount.
    words = ["unshare", "--mount", "--propagation", "private", "--", sys.executable, "-c", _HOLDS_NO_OTHER]
    done = subprocess.run(
        [*words, str(root), open_files.uid, other.uid, str(point)], check=False, capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("in use\ngone\n", 0), done.stderr
    await loop.destroy(open_files)
    point.rmdir()


# ---- a full pool ----


async def test_no_room_for_the_image(root: Path) -> None:
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", root], check=True)
    try:
        loop = LoopBackend(root, local=True)
        uid = _new_uid()
        with pytest.raises((DiskFull, VolumeFailed)):
            await loop.create(uid, "data", SIZE)
        backing = BackingFolder(root, uid).read()
        assert backing is not None
        await loop.destroy(backing)
        assert list(root.iterdir()) == []
    finally:
        subprocess.run(["umount", root], check=True)


# ---- copies ----


async def test_copy_and_verify(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    copier = MirrorVolumeCopier([loop])
    old = await loop.create(_new_uid(), "data", 2 * SIZE)
    new = await loop.create(_new_uid(), "data", SIZE)
    told: list[tuple[int, int]] = []
    async with loop.open_files(old) as source:
        await asyncio.to_thread(create_tree, source, 1500)
        block = os.urandom(20 * MIB)
        Path(source, "block").write_bytes(block)
        await copier.copy(old, new, lambda current, total: told.append((current, total)), final=False)
        assert told[-1][0] == told[-1][1] > 20 * MIB

        # What the times do not show: a byte that changes behind them.
        before = Path(source, "block").stat()
        changed = bytes([block[0] ^ 1]) + block[1:]
        Path(source, "block").write_bytes(changed)
        os.utime(Path(source, "block"), ns=(before.st_atime_ns, before.st_mtime_ns))
        Path(source, "grown/odd/fifo").unlink()
        with pytest.raises(VolumeFailed, match="the copy differs from the source"):
            await copier.verify(old, new)
        await copier.copy(old, new, _no_progress, final=True)
        found = await copier.verify(old, new)
        assert found.entries > 1500
        assert found.content_bytes > 20 * MIB

        # Verification finds a damaged copy, also if only the content differs, and the next copy repairs it.
        async with loop.open_files(new) as target:
            copied = Path(target, "block")
            assert hashlib.sha256(copied.read_bytes()).digest() == hashlib.sha256(changed).digest()
            copied.write_bytes(block)
            os.utime(copied, ns=(before.st_atime_ns, before.st_mtime_ns))
            with pytest.raises(VolumeFailed, match="the content of a file"):
                await copier.verify(old, new)
            await copier.copy(old, new, _no_progress, final=True)
            assert await copier.verify(old, new) == found
            copied.chmod(0o600)
            with pytest.raises(VolumeFailed, match="/block differs in mode"):
                await copier.verify(old, new)
    for backing in (old, new):
        await loop.destroy(backing)


@pytest.mark.deep
async def test_a_copy_that_does_not_fit(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    copier = MirrorVolumeCopier([loop])
    old = await loop.create(_new_uid(), "data", 2 * SIZE)
    new = await loop.create(_new_uid(), "data", SIZE)
    async with loop.open_files(old) as source:
        Path(source, "block").write_bytes(os.urandom(SIZE))
        for final in (False, True):
            with pytest.raises(DiskFull):
                await copier.copy(old, new, _no_progress, final=final)
    with pytest.raises(VolumeFailed, match="same volume backing"):
        await copier.copy(old, old, _no_progress, final=True)
    for backing in (old, new):
        await loop.destroy(backing)


@pytest.mark.deep
async def test_a_copy_that_has_no_room_for_what_was_deleted_since(root: Path) -> None:
    """The target takes what the source has now, though not together with what it had at the copy before."""
    loop = LoopBackend(root, local=True)
    copier = MirrorVolumeCopier([loop])
    old = await loop.create(_new_uid(), "data", 2 * SIZE)
    new = await loop.create(_new_uid(), "data", SIZE)
    async with loop.open_files(old) as source:
        Path(source, "before").write_bytes(os.urandom(SIZE * 2 // 3))
        await copier.copy(old, new, _no_progress, final=False)
        Path(source, "before").unlink()
        Path(source, "after").write_bytes(os.urandom(SIZE * 2 // 3))
        await copier.copy(old, new, _no_progress, final=True)
        assert (await copier.verify(old, new)).entries == sum(1 for _ in Path(source).iterdir()) + 1
    for backing in (old, new):
        await loop.destroy(backing)


def _no_progress(_current: int, _total: int) -> None:
    """Tell nobody."""


# ---- hosts without quotas ----


async def test_what_a_host_without_quotas_needs(rig: Rig, root: Path) -> None:
    quota = ProjectQuotaBackend(root, local=True)
    image = rig.folder / "without-quotas"
    with image.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.xfs", "-q", image], check=True)
    root.mkdir()
    for words in (["-t", "tmpfs", "-o", "size=4m", "none"], ["-o", "loop,noquota", str(image)]):
        subprocess.run(["mount", *words, root], check=True)
        try:
            reason = await quota.unavailable_reason()
            with pytest.raises(SizeNotSupported) as refused:
                await quota.create(_new_uid(), "data", SIZE)
            assert refused.value.detail == reason
            assert list(root.iterdir()) == []
        finally:
            subprocess.run(["umount", root], check=True)
        if "tmpfs" in words:
            assert reason == f"{root} is on {root} (tmpfs); project quotas need xfs or ext4"
        else:
            assert reason.startswith(f"{root} is on {root} (xfs), which is mounted without project quotas: mount it")
    image.unlink()


# ---- the engine, and volumes without a size ----


async def test_plain(rig: Rig, engine: DockerEngine) -> None:
    plain = PlainBackend(rig.engine.data_root)
    with pytest.raises(SizeNotSupported):
        await plain.create(_new_uid(), "data", 1)
    backing = await plain.create(_new_uid(), "data", 0)
    volume = await _given(engine, backing)
    shown = await engine.inspect_volume(volume)
    assert shown is not None
    with pytest.raises(VolumeFailed, match="is not accessible from this host"):
        await plain.usage(backing)
    backing = backing.model_copy(update={"folder": shown.mountpoint})
    with volume_container(rig, volume) as one:
        one.run("dd", "if=/dev/urandom", f"of={TARGET}/file", "bs=1M", "count=10", "conv=fsync")
        usage = await plain.usage(backing)
        assert 10 * MIB <= usage.used_bytes < 11 * MIB
        assert usage.size_bytes == 0
    for change in (plain.grow, plain.shrink):
        with pytest.raises(SizeNotSupported):
            await change(backing, 20 * MIB)
    await engine.remove_volume(volume)
    await plain.destroy(backing)


async def test_the_best_backend_is_chosen(root: Path) -> None:
    elsewhere = [LoopBackend(root, local=False), PlainBackend(root)]
    here = [LoopBackend(root, local=True), PlainBackend(root)]
    assert (await choose_backend(here, name="data", size_bytes=SIZE)).kind is VolumeBackendKind.LOOP
    assert (await choose_backend(here, name="data", size_bytes=0)).kind is VolumeBackendKind.PLAIN
    with pytest.raises(SizeNotSupported, match="LOOP: the engine runs on another host; PLAIN: does not support a size"):
        await choose_backend(elsewhere, name="data", size_bytes=SIZE)
    with pytest.raises(SizeNotSupported, match="LOOP: available, but not requested; PLAIN: does not support a size"):
        await choose_backend(here, name="data", size_bytes=SIZE, forced=VolumeBackendKind.PLAIN)
    with pytest.raises(SizeNotSupported, match="LOOP: requires a size"):
        await choose_backend(here, name="data", size_bytes=0, forced=VolumeBackendKind.LOOP)
