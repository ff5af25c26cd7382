"""The loop backend after kill -9, and on a full disk."""

# These tests may block their event loop: no other task runs in it.
# ruff: noqa: ASYNC221, ASYNC240
from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from gpudock_server.adapters.volumes import (
    LoopBackend,
)
from gpudock_server.adapters.volumes.backing_folder import BackingFolder
from gpudock_server.errors import (
    DiskFull,
    VolumeFailed,
    VolumeInUse,
)

from tests.engine.volume_fixtures import (
    VOLUME_SIZE,
    attached_images,
    new_uid,
    root,
)
from tests.rig import Rig
from tests.rig.rig import REPOSITORY
from tests.selection import deep_except

__all__ = ["root"]


_OPERATION_SCRIPT = """
import asyncio, sys
from pathlib import Path
from gpudock_server.adapters.volumes import LoopBackend
from gpudock_server.adapters.volumes.backing_folder import BackingFolder

async def main(operation, root, uid):
    loop = LoopBackend(Path(root), local=True)
    print("begun", flush=True)
    if operation == "create":
        return await loop.create(uid, "data", {size})
    backing = BackingFolder(Path(root), uid).read()
    return await (loop.destroy(backing) if operation == "destroy" else loop.grow(backing, 2 * {size}))

asyncio.run(main(*sys.argv[1:]))
"""


async def _kill_during(operation: str, root: Path, uid: str, seconds: float) -> None:
    """Run an operation in another process, and kill the process `seconds` after the operation has begun."""
    command = [sys.executable, "-c", _OPERATION_SCRIPT.format(size=VOLUME_SIZE), operation, str(root), uid]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"begun\n"
    await asyncio.sleep(seconds)
    if process.returncode is None:
        process.send_signal(signal.SIGKILL)
    await process.wait()


@pytest.mark.parametrize("seconds", deep_except([0.05], [0.0, 0.05, 0.1, 0.2, 0.3]))
async def test_create_grow_and_destroy_are_repeated_after_kill_9(root: Path, seconds: float) -> None:
    loop = LoopBackend(root, local=True)
    uid = new_uid()
    await _kill_during("create", root, uid, seconds)
    backing = await loop.create(uid, "data", VOLUME_SIZE)
    assert attached_images(root) == [f"{backing.folder}/image"]
    async with loop.open_files(backing) as folder:
        Path(folder, "kept").write_bytes(b"kept")
    await _kill_during("grow", root, uid, seconds)
    backing = await loop.grow(backing, 2 * VOLUME_SIZE)
    usage = await loop.usage(backing)
    assert 2 * VOLUME_SIZE <= usage.size_bytes < 2.1 * VOLUME_SIZE
    async with loop.open_files(backing) as folder:
        assert Path(folder, "kept").read_bytes() == b"kept"
    await _kill_during("destroy", root, uid, seconds)
    await loop.destroy(backing)
    assert list(root.iterdir()) == []


async def test_the_unfinished_image_of_a_killed_mkfs_is_replaced(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    backing = await loop.create(new_uid(), "data", VOLUME_SIZE)
    folder = BackingFolder(root, backing.uid)
    subprocess.run(["losetup", "--detach", folder.device.readlink()], check=True)
    folder.image.unlink()
    folder.unfinished.write_bytes(b"half")
    assert await loop.create(backing.uid, "data", VOLUME_SIZE) == backing
    assert not folder.unfinished.exists()
    assert (await loop.usage(backing)).size_bytes >= VOLUME_SIZE
    await loop.destroy(backing)


_OPEN_SCRIPT = """
import asyncio, sys
from pathlib import Path
from gpudock_server.adapters.volumes import LoopBackend
from gpudock_server.adapters.volumes.backing_folder import BackingFolder

async def main(root, uid):
    loop = LoopBackend(Path(root), local=True)
    async with loop.open_files(BackingFolder(Path(root), uid).read()):
        print("opened", flush=True)
        await asyncio.sleep(1000)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.deep
async def test_kill_9_of_a_process_closes_the_volume_that_it_opened(root: Path) -> None:
    loop = LoopBackend(root, local=True)
    backing = await loop.create(new_uid(), "data", VOLUME_SIZE)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _OPEN_SCRIPT, str(root), backing.uid, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"opened\n"
    with pytest.raises(VolumeInUse):
        await loop.destroy(backing)
    process.kill()
    await process.wait()
    await loop.destroy(backing)


_DESTROY_OTHER_SCRIPT = """
import asyncio, subprocess, sys
from pathlib import Path
from gpudock_server.adapters.volumes import LoopBackend
from gpudock_server.adapters.volumes.backing_folder import BackingFolder
from gpudock_server.errors import VolumeInUse

async def main(root, opened_uid, mounted_uid, mount_point):
    loop = LoopBackend(Path(root), local=True)
    opened, mounted = (BackingFolder(Path(root), uid).read() for uid in (opened_uid, mounted_uid))
    subprocess.run(["mount", Path(mounted.folder, "device"), mount_point], check=True)
    async with loop.open_files(opened):
        try:
            await loop.destroy(mounted)
        except VolumeInUse:
            print("in use", flush=True)
        subprocess.run(["umount", mount_point], check=True)
        await loop.destroy(mounted)
        print("destroyed", flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.deep
async def test_an_opened_volume_does_not_keep_another_in_use(rig: Rig, root: Path) -> None:
    loop = LoopBackend(root, local=True)
    opened, mounted = [await loop.create(new_uid(), name, VOLUME_SIZE) for name in ("opened", "mounted")]
    mount_point = rig.folder / "a folder\twith special characters"
    mount_point.mkdir()
    # In another mount namespace: a namespace that another test makes meanwhile would get a copy of the mount.
    command = ["unshare", "--mount", "--propagation", "private", "--", sys.executable, "-c", _DESTROY_OTHER_SCRIPT]
    arguments = [str(root), opened.uid, mounted.uid, str(mount_point)]
    process = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True)
    assert (process.stdout, process.returncode) == ("in use\ndestroyed\n", 0), process.stderr
    await loop.destroy(opened)
    mount_point.rmdir()


async def test_a_create_on_a_full_disk_fails_and_can_be_destroyed(root: Path) -> None:
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", root], check=True)
    try:
        loop = LoopBackend(root, local=True)
        uid = new_uid()
        with pytest.raises((DiskFull, VolumeFailed)):
            await loop.create(uid, "data", VOLUME_SIZE)
        backing = BackingFolder(root, uid).read()
        assert backing is not None
        await loop.destroy(backing)
        assert list(root.iterdir()) == []
    finally:
        subprocess.run(["umount", root], check=True)
