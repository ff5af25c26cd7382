"""Volumes with project quotas, on the filesystem of the rig's folder: XFS or ext4 with quotas.

Without quotas, the tests are skipped with the reason that the backend gives.
"""

# These tests may block their event loop: no other task runs in it.
# ruff: noqa: ASYNC221, ASYNC240

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path

import pytest
import pytest_asyncio
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.adapters.volumes import LoopBackend, MirrorVolumeCopier, ProjectQuotaBackend, attach_all_volumes
from gpudock_server.adapters.volumes.backing_folder import BackingFolder
from gpudock_server.errors import VolumeFailed, VolumeTooSmallForData
from gpudock_server.model.volume import VolumeBacking

from tests.engine.sample_trees import create_tree
from tests.engine.snapshot_host import ignore_progress
from tests.engine.volume_containers import TARGET, volume_container
from tests.engine.volume_fixtures import create_engine_volume, engine, new_uid
from tests.rig import Rig

__all__ = ["engine"]

MIB = 1 << 20
VOLUME_SIZE = 32 * MIB
# The first message is that of XFS, the second that of ext4.
FULL_MESSAGES = ("No space left on device", "Disk quota exceeded")


@pytest_asyncio.fixture
async def quota(rig: Rig) -> ProjectQuotaBackend:
    backend = ProjectQuotaBackend(
        rig.folder / f"volumes-{uuid.uuid4()}", local=True, project_ids=range(7_000_000, 7_000_099)
    )
    if reason := await backend.unavailable_reason():
        pytest.skip(reason)
    return backend


def _root(backing: VolumeBacking) -> Path:
    return Path(backing.folder).parent


async def test_a_mounted_volume_grows_and_shrinks_without_a_restart(
    rig: Rig, engine: DockerEngine, quota: ProjectQuotaBackend
) -> None:
    backing = await quota.create(new_uid(), "data", VOLUME_SIZE)
    assert await quota.create(backing.uid, "data", VOLUME_SIZE) == backing
    volume = await create_engine_volume(engine, backing)
    with volume_container(rig, volume) as container:
        pid = container.pid
        size, used = container.df()
        assert size == VOLUME_SIZE
        assert used <= 4096
        output = container.fill()
        assert any(phrase in output for phrase in FULL_MESSAGES)
        filled = int(container.run("stat", "-c", "%s", f"{TARGET}/fill").stdout)
        assert VOLUME_SIZE - 2 * MIB < filled <= VOLUME_SIZE

        grown = await quota.grow(backing, 3 * VOLUME_SIZE)
        assert await quota.grow(grown, 3 * VOLUME_SIZE) == grown
        assert container.df()[0] == grown.size_bytes == 3 * VOLUME_SIZE
        container.run("sh", "-c", f"echo kept > {TARGET}/kept")
        usage = await quota.usage(grown)
        assert filled <= usage.used_bytes <= filled + MIB
        assert usage.size_bytes == 3 * VOLUME_SIZE

        with pytest.raises(VolumeTooSmallForData) as raised:
            await quota.shrink(grown, VOLUME_SIZE // 2)
        assert (raised.value.used_bytes, raised.value.minimum_bytes) == (usage.used_bytes, usage.minimum_bytes)
        assert container.df()[0] == 3 * VOLUME_SIZE
        container.run("rm", f"{TARGET}/fill")
        shrunk = await quota.shrink(grown, VOLUME_SIZE // 2)
        assert await quota.shrink(shrunk, VOLUME_SIZE // 2) == shrunk
        assert container.df()[0] == shrunk.size_bytes == VOLUME_SIZE // 2
        assert any(phrase in container.fill() for phrase in FULL_MESSAGES)
        assert container.run("cat", f"{TARGET}/kept").stdout == "kept\n"
        assert container.pid == pid
    assert BackingFolder(_root(backing), backing.uid).read() == shrunk
    await engine.remove_volume(volume)
    await quota.destroy(shrunk)
    await quota.destroy(shrunk)
    assert list(_root(backing).iterdir()) == []


async def test_a_volume_shrinks_to_its_used_bytes_and_no_further(quota: ProjectQuotaBackend) -> None:
    backing = await quota.create(new_uid(), "data", VOLUME_SIZE)
    async with quota.open_files(backing) as folder:
        Path(folder, "file").write_bytes(os.urandom(8 * MIB))
    usage = await quota.usage(backing)
    with pytest.raises(VolumeTooSmallForData):
        await quota.shrink(backing, usage.used_bytes - 4096)
    backing = await quota.shrink(backing, usage.used_bytes)
    assert (await quota.usage(backing)).size_bytes == usage.used_bytes
    pool = await quota.pool()
    assert (pool.promised_bytes, pool.allocated_bytes) == (usage.used_bytes, usage.used_bytes)
    assert await LoopBackend(_root(backing), local=True).pool() == pool, "a pool includes the volumes of other backends"
    await quota.destroy(backing)


async def test_project_ids_are_unique_and_used_again_after_a_delete(quota: ProjectQuotaBackend) -> None:
    first, second = [await quota.create(new_uid(), name, VOLUME_SIZE) for name in ("first", "second")]
    assert (first.project_id, second.project_id) == (7_000_000, 7_000_001)
    await quota.destroy(first)
    third = await quota.create(new_uid(), "third", VOLUME_SIZE)
    assert third.project_id == first.project_id
    # Destroying the first backing again does not change the limit of the volume that has its id now.
    await quota.destroy(first)
    assert (await quota.usage(third)).size_bytes == VOLUME_SIZE
    # A project id that a folder outside gpudock has.
    unknown = _root(second) / "strange"
    unknown.mkdir()
    subprocess.run(["xfs_io", "-r", "-c", "chproj 7000002", str(unknown)], check=True)
    (unknown / "file").write_bytes(b"x" * MIB)
    subprocess.run(["xfs_io", "-r", "-c", "chproj 7000002", str(unknown / "file")], check=True)
    fourth = await quota.create(new_uid(), "fourth", VOLUME_SIZE)
    assert fourth.project_id == 7_000_003
    assert (await quota.usage(fourth)).used_bytes <= 4096
    for backing in (second, third, fourth):
        await quota.destroy(backing)


async def test_an_interrupted_create_or_destroy_is_completed(quota: ProjectQuotaBackend) -> None:
    backing = await quota.create(new_uid(), "data", VOLUME_SIZE)
    folder = BackingFolder(_root(backing), backing.uid)
    folder.data.rmdir()
    with pytest.raises(VolumeFailed, match="does not exist"):
        await quota.attach(backing)
    assert await quota.create(backing.uid, "data", VOLUME_SIZE) == backing
    assert (await quota.usage(backing)).size_bytes == VOLUME_SIZE
    # A destroy that was interrupted after the files were deleted leaves the limit of the project.
    await folder.remove()
    again = await quota.create(new_uid(), "data", VOLUME_SIZE)
    assert again.project_id != backing.project_id
    await quota.destroy(backing)
    await quota.destroy(again)


async def test_attaching_volumes_restores_their_limits(quota: ProjectQuotaBackend) -> None:
    backing = await quota.create(new_uid(), "data", VOLUME_SIZE)
    await quota.grow(backing, 2 * VOLUME_SIZE)
    BackingFolder(_root(backing), backing.uid).write(backing)
    assert (await quota.usage(backing)).size_bytes == 2 * VOLUME_SIZE
    assert await attach_all_volumes(_root(backing)) == ()
    assert (await quota.usage(backing)).size_bytes == VOLUME_SIZE
    await quota.destroy(backing)


async def test_a_copy_is_counted_for_the_new_volume(quota: ProjectQuotaBackend) -> None:
    old, new = [await quota.create(new_uid(), "data", 2 * VOLUME_SIZE) for _ in range(2)]
    async with quota.open_files(old) as folder:
        create_tree(folder, 1500)
    copier = MirrorVolumeCopier([quota])
    await copier.copy(old, new, ignore_progress, final=True)
    assert (await copier.verify(old, new)).entries > 1500
    assert abs((await quota.usage(new)).used_bytes - (await quota.usage(old)).used_bytes) < 2 * MIB
    for backing in (old, new):
        await quota.destroy(backing)
