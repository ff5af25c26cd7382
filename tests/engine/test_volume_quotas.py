"""Volumes by project quota, on the filesystem that the rig's folder lies on: XFS or ext4, where it has quotas.

Where it has none, and a kernel without them has none anywhere, the tests are skipped with what the backend says.
"""

# Nothing else waits for these tests' loops.
# ruff: noqa: ASYNC221, ASYNC240

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.adapters.volumes import LoopBackend, MirrorVolumeCopier, ProjectQuotaBackend, attach_all_volumes
from gpudock_server.adapters.volumes.backing_folder import BackingFolder
from gpudock_server.errors import VolumeFailed, VolumeTooSmallForData
from gpudock_server.model.engine import LABEL_UID
from gpudock_server.model.volume import VolumeBacking

from tests.engine.sample_trees import create_tree
from tests.engine.volume_containers import TARGET, volume_container
from tests.rig import Rig

MIB = 1 << 20
SIZE = 32 * MIB
# XFS says that there is no room, ext4 that it is the quota's doing.
FULL = ("No space left on device", "Disk quota exceeded")


@pytest_asyncio.fixture
async def quota(rig: Rig) -> ProjectQuotaBackend:
    backend = ProjectQuotaBackend(
        rig.folder / f"volumes-{uuid.uuid4()}", local=True, project_ids=range(7_000_000, 7_000_099)
    )
    if reason := await backend.unavailable_reason():
        pytest.skip(reason)
    return backend


@pytest_asyncio.fixture
async def engine(clean_engine: Rig) -> AsyncIterator[DockerEngine]:
    made = await DockerEngine.connect(clean_engine.engine.url)
    yield made
    await made.close()


def _new_uid() -> str:
    return str(uuid.uuid4())


def _root(backing: VolumeBacking) -> Path:
    return Path(backing.folder).parent


async def _given(engine: DockerEngine, backing: VolumeBacking) -> str:
    await engine.create_volume(
        backing.engine_volume, labels={LABEL_UID: backing.uid}, driver_options=backing.driver_options
    )
    return backing.engine_volume


async def test_a_size_that_changes_in_use(rig: Rig, engine: DockerEngine, quota: ProjectQuotaBackend) -> None:
    backing = await quota.create(_new_uid(), "data", SIZE)
    assert await quota.create(backing.uid, "data", SIZE) == backing
    volume = await _given(engine, backing)
    with volume_container(rig, volume) as one:
        pid = one.pid
        size, used = one.df()
        assert size == SIZE
        assert used <= 4096
        said = one.fill()
        assert any(phrase in said for phrase in FULL)
        filled = int(one.run("stat", "-c", "%s", f"{TARGET}/fill").stdout)
        assert SIZE - 2 * MIB < filled <= SIZE

        grown = await quota.grow(backing, 3 * SIZE)
        assert await quota.grow(grown, 3 * SIZE) == grown
        assert one.df()[0] == grown.size_bytes == 3 * SIZE
        one.run("sh", "-c", f"echo kept > {TARGET}/kept")
        usage = await quota.usage(grown)
        assert filled <= usage.used_bytes <= filled + MIB
        assert usage.size_bytes == 3 * SIZE

        with pytest.raises(VolumeTooSmallForData) as refused:
            await quota.shrink(grown, SIZE // 2)
        assert (refused.value.used_bytes, refused.value.minimum_bytes) == (usage.used_bytes, usage.minimum_bytes)
        assert one.df()[0] == 3 * SIZE
        one.run("rm", f"{TARGET}/fill")
        shrunk = await quota.shrink(grown, SIZE // 2)
        assert await quota.shrink(shrunk, SIZE // 2) == shrunk
        assert one.df()[0] == shrunk.size_bytes == SIZE // 2
        assert any(phrase in one.fill() for phrase in FULL)
        assert one.run("cat", f"{TARGET}/kept").stdout == "kept\n"
        assert one.pid == pid
    assert BackingFolder(_root(backing), backing.uid).read() == shrunk
    await engine.remove_volume(volume)
    await quota.destroy(shrunk)
    await quota.destroy(shrunk)
    assert list(_root(backing).iterdir()) == []


async def test_what_is_used_to_the_last_byte_does_not_shrink(quota: ProjectQuotaBackend) -> None:
    backing = await quota.create(_new_uid(), "data", SIZE)
    async with quota.open_files(backing) as folder:
        Path(folder, "file").write_bytes(os.urandom(8 * MIB))
    usage = await quota.usage(backing)
    with pytest.raises(VolumeTooSmallForData):
        await quota.shrink(backing, usage.used_bytes - 4096)
    backing = await quota.shrink(backing, usage.used_bytes)
    assert (await quota.usage(backing)).size_bytes == usage.used_bytes
    pool = await quota.pool()
    assert (pool.promised_bytes, pool.allocated_bytes) == (usage.used_bytes, usage.used_bytes)
    assert await LoopBackend(_root(backing), local=True).pool() == pool, "of whatever kind the others are"
    await quota.destroy(backing)


async def test_project_ids_never_collide(quota: ProjectQuotaBackend) -> None:
    first, second = [await quota.create(_new_uid(), name, SIZE) for name in ("first", "second")]
    assert (first.project_id, second.project_id) == (7_000_000, 7_000_001)
    await quota.destroy(first)
    third = await quota.create(_new_uid(), "third", SIZE)
    assert third.project_id == first.project_id
    # The first one's removal, replayed after its id has become another's.
    await quota.destroy(first)
    assert (await quota.usage(third)).size_bytes == SIZE
    # An id that only the filesystem knows.
    strange = _root(second) / "strange"
    strange.mkdir()
    subprocess.run(["xfs_io", "-r", "-c", "chproj 7000002", str(strange)], check=True)
    (strange / "file").write_bytes(b"x" * MIB)
    subprocess.run(["xfs_io", "-r", "-c", "chproj 7000002", str(strange / "file")], check=True)
    fourth = await quota.create(_new_uid(), "fourth", SIZE)
    assert fourth.project_id == 7_000_003
    assert (await quota.usage(fourth)).used_bytes <= 4096
    for each in (second, third, fourth):
        await quota.destroy(each)


async def test_what_a_killed_daemon_leaves_is_finished(quota: ProjectQuotaBackend) -> None:
    backing = await quota.create(_new_uid(), "data", SIZE)
    folder = BackingFolder(_root(backing), backing.uid)
    folder.data.rmdir()
    with pytest.raises(VolumeFailed, match="does not exist"):
        await quota.attach(backing)
    assert await quota.create(backing.uid, "data", SIZE) == backing
    assert (await quota.usage(backing)).size_bytes == SIZE
    # A removal that was cut off between the files and the limit.
    await folder.remove()
    again = await quota.create(_new_uid(), "data", SIZE)
    assert again.project_id != backing.project_id
    await quota.destroy(backing)
    await quota.destroy(again)


async def test_a_limit_that_was_lost_is_set_at_the_start(quota: ProjectQuotaBackend) -> None:
    backing = await quota.create(_new_uid(), "data", SIZE)
    await quota.grow(backing, 2 * SIZE)
    BackingFolder(_root(backing), backing.uid).write(backing)
    assert (await quota.usage(backing)).size_bytes == 2 * SIZE
    assert await attach_all_volumes(_root(backing)) == ()
    assert (await quota.usage(backing)).size_bytes == SIZE
    await quota.destroy(backing)


async def test_a_copy_counts_for_the_new_store(quota: ProjectQuotaBackend) -> None:
    old, new = [await quota.create(_new_uid(), "data", 2 * SIZE) for _ in range(2)]
    async with quota.open_files(old) as folder:
        create_tree(folder, 1500)
    copier = MirrorVolumeCopier([quota])
    await copier.copy(old, new, lambda _current, _total: None, final=True)
    assert (await copier.verify(old, new)).entries > 1500
    assert abs((await quota.usage(new)).used_bytes - (await quota.usage(old)).used_bytes) < 2 * MIB
    for backing in (old, new):
        await quota.destroy(backing)
