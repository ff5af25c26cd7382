"""Volumes of the loop backend, mounted by a real engine: their size is a limit, and files survive each change."""

# These tests may block their event loop: no other task runs in it.
# ruff: noqa: ASYNC221, ASYNC240
from __future__ import annotations

import asyncio
import subprocess
import time
from pathlib import Path

import pytest
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.adapters.volumes import (
    LoopBackend,
    ProjectQuotaBackend,
    attach_all_volumes,
)
from gpudock_server.adapters.volumes.backing_folder import BackingFolder
from gpudock_server.adapters.volumes.loop import _exchange_images
from gpudock_server.errors import (
    SizeNotSupported,
    VolumeFailed,
    VolumeInUse,
    VolumeTooSmallForData,
)
from gpudock_server.model.volume import VolumeBackendKind, VolumeBacking
from gpudock_server.ports import ShrinkNeedsCopy

from tests.engine.loop_devices import loop_devices_below
from tests.engine.volume_containers import TARGET, VolumeContainer, volume_container
from tests.engine.volume_fixtures import (
    MIB,
    VOLUME_SIZE,
    attached_images,
    create_engine_volume,
    engine,
    loop,
    new_uid,
    remove_volume,
    root,
)
from tests.rig import HttpStatusError, Rig
from tests.rig.patience import limit

__all__ = ["engine", "loop", "root"]

# Writes blocks and their checksums until a write fails, which ends the container.
WRITER = (
    "i=0; while :; do dd if=/dev/urandom of=/data/b$i bs=64k count=1 conv=fsync 2>/dev/null || exit 1;"
    " sha256sum /data/b$i >> /data/sums || exit 1; i=$((i+1)); done"
)


def _attach_at_device_of(backing: VolumeBacking, *, link_of: VolumeBacking) -> Path:
    """Attach the image of a backing, and make the device link of another backing point to its device.

    Returns the device. The link is changed, not the device number, which another program could take meanwhile.
    """
    command = ["losetup", "--find", "--show", f"{backing.folder}/image"]
    device = Path(subprocess.run(command, check=True, capture_output=True).stdout.decode().strip())
    link = Path(link_of.folder, "device")
    link.unlink()
    link.symlink_to(device)
    return device


def _checked_blocks(container: VolumeContainer) -> int:
    """The number of blocks that the writer has written with a checksum; each of them must match."""
    container.run("sh", "-c", f"cd / && sha256sum -c {TARGET}/sums")
    return len(container.run("cat", f"{TARGET}/sums").stdout.splitlines())


async def test_a_volume_cannot_be_filled_beyond_its_size(rig: Rig, engine: DockerEngine, loop: LoopBackend) -> None:
    backing = await loop.create(new_uid(), "data", VOLUME_SIZE)
    assert await loop.create(backing.uid, "data", VOLUME_SIZE) == backing
    volume = await create_engine_volume(engine, backing)
    with volume_container(rig, volume) as container:
        size, used = container.df()
        assert VOLUME_SIZE <= size < VOLUME_SIZE * 1.05
        assert used < 40 * MIB
        assert "No space left" in container.fill()
        filled = container.run("stat", "-c", "%s", f"{TARGET}/fill").stdout
        assert VOLUME_SIZE * 0.85 < int(filled) <= VOLUME_SIZE
        usage = await loop.usage(backing)
        assert (usage.size_bytes, usage.used_bytes) == container.df()
        assert usage.minimum_bytes > usage.used_bytes
    await remove_volume(engine, loop, backing)
    await loop.destroy(backing)
    assert not Path(backing.folder).exists()


@pytest.mark.deep
async def test_a_volume_grows_under_a_writer_without_losing_a_block(
    rig: Rig, engine: DockerEngine, loop: LoopBackend
) -> None:
    backing = await loop.create(new_uid(), "data", VOLUME_SIZE)
    volume = await create_engine_volume(engine, backing)
    with volume_container(rig, volume, "sh", "-c", WRITER) as container:
        pid = container.pid
        for step in range(1, 21):
            backing = await loop.grow(backing, VOLUME_SIZE + step * 20 * MIB)
            assert await loop.grow(backing, backing.size_bytes) == backing
            size, _ = container.df()
            assert backing.size_bytes <= size < backing.size_bytes * 1.05
        before = len(container.run("cat", f"{TARGET}/sums").stdout.splitlines())
        deadline = time.monotonic() + limit(30)
        while len(container.run("cat", f"{TARGET}/sums").stdout.splitlines()) <= before + 3:
            assert time.monotonic() < deadline, "the writer has stopped"
            await asyncio.sleep(0.05)
        assert container.pid == pid
        container.stop()
    with volume_container(rig, volume) as reader:
        assert _checked_blocks(reader) > before
    assert BackingFolder(Path(backing.folder).parent, backing.uid).read() == backing
    await remove_volume(engine, loop, backing)


async def test_a_volume_shrinks_in_place_or_needs_a_copy(rig: Rig, engine: DockerEngine, loop: LoopBackend) -> None:
    backing = await loop.create(new_uid(), "data", 600 * MIB)
    volume = await create_engine_volume(engine, backing)
    with volume_container(rig, volume) as container:
        container.run("dd", "if=/dev/urandom", f"of={TARGET}/kept", "bs=1M", "count=150", "conv=fsync")
        digest = container.run("sha256sum", f"{TARGET}/kept").stdout
        with pytest.raises(VolumeTooSmallForData) as raised:
            await loop.shrink(backing, 150 * MIB)
        assert 150 * MIB < raised.value.used_bytes < raised.value.minimum_bytes <= 256 * MIB
        assert raised.value.requested_bytes == 150 * MIB
        if backing.filesystem == "btrfs":
            backing = await loop.shrink(backing, 400 * MIB)
            assert await loop.shrink(backing, 400 * MIB) == backing
            assert container.df()[0] == 400 * MIB
            assert Path(backing.folder, "image").stat().st_size == 400 * MIB
            assert "No space left" in container.fill()
        else:
            with pytest.raises(ShrinkNeedsCopy):
                await loop.shrink(backing, 400 * MIB)
            assert container.df()[0] >= 600 * MIB
        assert container.run("sha256sum", f"{TARGET}/kept").stdout == digest
    await remove_volume(engine, loop, backing)


@pytest.mark.deep
async def test_two_volumes_exchange_their_contents(
    rig: Rig, engine: DockerEngine, loop: LoopBackend, root: Path
) -> None:
    old = await loop.create(new_uid(), "data", 600 * MIB)
    new = await loop.replacement(old, new_uid(), 400 * MIB)
    assert await loop.replacement(old, new.uid, 400 * MIB) == new
    volume, content = await create_engine_volume(engine, old), await loop.content(old)
    for backing, text in ((old, "old"), (new, "new")):
        async with loop.open_files(backing) as folder:
            Path(folder, "which").write_text(text)
    # The backings after the exchange: the sizes are exchanged with the contents.
    small, large = old.model_copy(update={"size_bytes": 400 * MIB}), new.model_copy(update={"size_bytes": 600 * MIB})
    with volume_container(rig, volume) as container:
        with pytest.raises(VolumeInUse):
            await loop.exchange(large, small, content)
        assert container.run("cat", f"{TARGET}/which").stdout == "old"
        container.stop()
        for _ in range(2):
            await loop.exchange(large, small, content)
            container.start()
            assert container.run("cat", f"{TARGET}/which").stdout == "new"
            assert container.df()[0] < 440 * MIB
            container.stop()
        # A daemon that is killed right after the rename leaves neither a device nor a link; the next one completes it.
        one_folder, other_folder = (BackingFolder(root, backing.uid) for backing in (old, new))
        for device in loop_devices_below(root):
            subprocess.run(["losetup", "--detach", device], check=True)
        one_folder.device.unlink()
        _exchange_images(one_folder, other_folder)
        await loop.exchange(old, new, content)
        assert (one_folder.read(), other_folder.read()) == (old, new)
        container.start()
        assert container.run("cat", f"{TARGET}/which").stdout == "old"
        assert container.df()[0] > 560 * MIB
    with pytest.raises(VolumeFailed, match="neither"):
        await loop.exchange(old, new, "1")
    await loop.destroy(new)
    await remove_volume(engine, loop, old)


@pytest.mark.deep
async def test_a_mounted_volume_is_not_destroyed(rig: Rig, engine: DockerEngine, loop: LoopBackend) -> None:
    backing = await loop.create(new_uid(), "data", VOLUME_SIZE)
    volume = await create_engine_volume(engine, backing)
    with volume_container(rig, volume) as container:
        container.run("sh", "-c", f"echo kept > {TARGET}/file")
        with pytest.raises(VolumeInUse):
            await loop.destroy(backing)
        container.stop()
        container.start()
        assert container.run("cat", f"{TARGET}/file").stdout == "kept\n"
    await remove_volume(engine, loop, backing)


async def test_deleted_files_free_disk_space_of_the_host(rig: Rig, engine: DockerEngine, loop: LoopBackend) -> None:
    backing = await loop.create(new_uid(), "data", VOLUME_SIZE)
    volume = await create_engine_volume(engine, backing)
    empty = await loop.pool()
    assert empty.promised_bytes == VOLUME_SIZE
    with volume_container(rig, volume) as container:
        container.run("dd", "if=/dev/urandom", f"of={TARGET}/file", "bs=1M", "count=100", "conv=fsync")
        raised = await loop.pool()
        assert raised.allocated_bytes >= empty.allocated_bytes + 95 * MIB
        container.run("rm", f"{TARGET}/file")
        # Blocks are discarded when the journal is written, which happens at intervals and at unmount.
        container.run("sync")
        if backing.filesystem == "xfs":
            container.stop()
        deadline = time.monotonic() + limit(60)
        while (await loop.pool()).allocated_bytes > raised.allocated_bytes - 90 * MIB:
            assert time.monotonic() < deadline, "the image has not become smaller"
            await asyncio.sleep(0.1)
    await remove_volume(engine, loop, backing)
    assert (await loop.pool()).promised_bytes == 0


async def test_volumes_are_attached_again_after_a_reboot(rig: Rig, engine: DockerEngine, root: Path) -> None:
    loop = LoopBackend(root, local=True)
    backing, other = [await loop.create(new_uid(), name, VOLUME_SIZE) for name in ("data", "other")]
    volume = await create_engine_volume(engine, backing)
    with volume_container(rig, volume) as container:
        container.run("sh", "-c", f"echo kept > {TARGET}/file")
        container.stop()
        devices = [Path(item.folder, "device").readlink() for item in (backing, other)]
        for device in devices:
            subprocess.run(["losetup", "--detach", device], check=True)
        with pytest.raises(HttpStatusError):
            container.start()
        device = _attach_at_device_of(other, link_of=backing)
        assert await attach_all_volumes(root) == ()
        assert await attach_all_volumes(root) == ()
        assert attached_images(root) == sorted(f"{item.folder}/image" for item in (backing, other))
        assert Path(other.folder, "device").readlink() == device
        assert Path(backing.folder, "device").readlink() != device
        container.start()
        assert container.run("cat", f"{TARGET}/file").stdout == "kept\n"
    await remove_volume(engine, loop, backing)
    await loop.destroy(other)


async def test_a_stale_device_link_does_not_mount_another_volume(rig: Rig, engine: DockerEngine, root: Path) -> None:
    loop = LoopBackend(root, local=True)
    backing, other = [await loop.create(new_uid(), name, VOLUME_SIZE) for name in ("data", "other")]
    volume = await create_engine_volume(engine, backing)
    device = Path(backing.folder, "device").readlink()
    other_device = Path(other.folder, "device").readlink()
    for attached in (device, other_device):
        subprocess.run(["losetup", "--detach", attached], check=True)
    _attach_at_device_of(other, link_of=backing)
    await loop.attach(other)
    with pytest.raises(HttpStatusError), volume_container(rig, volume):
        pass
    await engine.remove_volume(volume)
    await loop.destroy(backing)
    await loop.destroy(other)


async def test_volumes_that_cannot_be_attached_are_reported_and_others_attached(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    backing, broken = [await loop.create(new_uid(), name, VOLUME_SIZE) for name in ("data", "broken")]
    for item in (backing, broken):
        subprocess.run(["losetup", "--detach", Path(item.folder, "device").readlink()], check=True)
    Path(broken.folder, "image").unlink()
    damaged = BackingFolder(root, new_uid())
    damaged.path.mkdir()
    damaged.record.write_text("{")
    problems = await attach_all_volumes(root)
    assert {problem.uid for problem in problems} == {broken.uid, damaged.uid}
    assert attached_images(root) == [f"{backing.folder}/image"]
    with pytest.raises(VolumeFailed, match="does not exist"):
        await loop.attach(broken)
    await damaged.remove()
    for item in (backing, broken):
        await loop.destroy(item)


@pytest.mark.parametrize("size", [16 * MIB, 100 * MIB])
async def test_volumes_too_small_for_xfs_have_another_filesystem(root: Path, size: int) -> None:
    loop = LoopBackend(root, local=True)
    try:
        backing = await loop.create(new_uid(), "small", size)
    except SizeNotSupported as error:
        pytest.skip(str(error))
    assert backing.filesystem != "xfs"
    assert (await loop.usage(backing)).size_bytes >= size
    backing = await loop.grow(backing, 10 * size)
    assert (await loop.usage(backing)).size_bytes >= 10 * size
    await loop.destroy(backing)


async def test_a_size_below_every_minimum_is_refused(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    with pytest.raises(SizeNotSupported, match="xfs needs at least 236 MiB"):
        await loop.create(new_uid(), "tiny", 1 * MIB)
    assert not root.exists()


async def test_invalid_uids_are_refused(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    for uid in ("", "../etc", "6FA459EA-EE8A-3CA4-894E-DB77E160355E", "6fa459ea-ee8a-3ca4-894e-db77e160355e/"):
        with pytest.raises(VolumeFailed):
            await loop.create(uid, "data", VOLUME_SIZE)
    assert not root.exists()


async def test_a_backing_of_another_kind_is_not_changed(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    folder = BackingFolder(root, new_uid())
    folder.write(
        VolumeBacking(
            kind=VolumeBackendKind.PROJECT_QUOTA, uid=folder.uid, name="data", engine_volume="data", filesystem="xfs"
        )
    )
    with pytest.raises(VolumeFailed, match="is a volume of kind PROJECT_QUOTA"):
        await loop.create(folder.uid, "data", VOLUME_SIZE)
    assert [path.name for path in folder.path.iterdir()] == ["volume.json"]
    await folder.remove()
    assert list(root.iterdir()) == []


async def test_backends_are_unavailable_for_an_engine_on_another_host(root: Path) -> None:
    assert await LoopBackend(root, local=False).unavailable_reason() == "the engine runs on another host"
    assert await ProjectQuotaBackend(root, local=False).unavailable_reason() == "the engine runs on another host"
