"""Volumes keep their files when the engine is killed or restarted, and when their pool is full."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from gpudock import Client
from gpudock.v1 import container_pb2, volume_pb2, volume_service_pb2

from tests.calls import Caller, failure
from tests.clients.command import run
from tests.conftest import FAST_FLAGS, own_state_flags
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until, until_state
from tests.engine.loop_devices import detach_loop_devices, loop_devices_below
from tests.faults.volume_pools import (
    SHOW_FILES,
    WRITE_FILES,
    Pool,
    container_has_files,
    filesystem_size,
    mount_of,
    mounted_pool,
)
from tests.rig import Rig

__all__ = ["daemons"]

pytestmark = pytest.mark.deep

MIB = 1 << 20
SIZE = 320 * MIB
RUNNING = container_pb2.CONTAINER_STATE_RUNNING
ALWAYS = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ALWAYS)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["killed", "restarted"])
async def test_volumes_keep_their_files_when_the_engine_is_killed_or_restarted(fragile_rig: Rig, how: str) -> None:
    rig = fragile_rig
    daemon = await rig.start_daemon(*FAST_FLAGS, *own_state_flags(), "--volume-backend", "loop")
    try:
        async with Caller(daemon.target) as caller:
            await caller.create_volume("data", SIZE)
            for name in ("one", "two"):
                await caller.create(name, mounts=[mount_of("data")], restart_policy=ALWAYS)
            await caller.shell("one", WRITE_FILES)
            files = await caller.shell("one", SHOW_FILES)
            if how == "killed":
                await asyncio.to_thread(rig.engine.kill9)
                await asyncio.to_thread(rig.engine.start)
            else:
                await asyncio.to_thread(rig.engine.restart)
            for name in ("one", "two"):
                await until(partial(container_has_files, caller, name, files), 60)
                await until_state(caller, name, RUNNING, 60)
                assert abs(await filesystem_size(caller, name) - SIZE) < SIZE // 50
            assert len(loop_devices_below(rig.folder)) == 1
            # The daemon is running, and volumes can be changed.
            await caller.resize_volume("data", SIZE + 64 * MIB)
            assert abs(await filesystem_size(caller, "two") - (SIZE + 64 * MIB)) < SIZE // 50
            assert await caller.shell("two", SHOW_FILES) == files
            assert (await failure(caller.delete_volume("data"))).metadata["holders"] == "one,two"
            for name in ("one", "two"):
                await caller.delete(name)
            await caller.delete_volume("data")
            assert not loop_devices_below(rig.folder)
            assert "Traceback" not in daemon.log_text, daemon.log_text
    finally:
        await asyncio.to_thread(daemon.stop)
        rig.engine.remove_all()
        detach_loop_devices(rig.folder)


@pytest.fixture
def pool(daemons: IsolatedDaemons, tmp_path: Path) -> Iterator[Pool]:
    """A pool of 1000 MiB of ext4, without reserved blocks."""
    rig, make = daemons.rig, ("mkfs.ext4", "-q", "-b", "4096", "-m", "0")
    image = tmp_path / "pool.image"
    with mounted_pool(rig, rig.folder / f"pool-{daemons.id}", image=image, size=1000 * MIB, make=make) as made:
        yield made


@pytest_asyncio.fixture
async def overcommitted(daemons: IsolatedDaemons, pool: Pool) -> AsyncIterator[Caller]:
    """A caller of a daemon that overcommits the pool."""
    flags = ("--volume-dir", str(pool.path), "--volume-backend", "loop", "--volume-overcommit", "10")
    daemon = await daemons.start(*flags)
    async with Caller(daemon.target) as caller:
        yield caller
        await caller.until_idle()
        assert "Traceback" not in daemon.log_text, daemon.log_text


async def test_calls_that_a_full_pool_refuses_change_nothing(overcommitted: Caller, pool: Pool) -> None:
    caller = overcommitted
    await caller.create_volume("data", SIZE)
    await caller.create("one", mounts=[mount_of("data")])
    await caller.shell("one", WRITE_FILES)
    files = await caller.shell("one", SHOW_FILES)
    pool.fill()
    full = await failure(caller.create_volume("more", SIZE))
    assert (full.code, full.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
    assert full.metadata["path"] == str(pool.path)
    assert (await failure(caller.volume("more"))).reason == "VOLUME_NOT_FOUND"
    # There is no space for a copy, which is checked before anything is changed.
    full = await failure(caller.resize_volume("data", SIZE - 10 * MIB))
    assert full.reason == "DISK_FULL"
    grown = await failure(caller.resize_volume("data", SIZE * 2))
    assert grown.reason == "DISK_FULL"
    volume = await caller.volume("data")
    assert (volume.size_bytes, volume.revision, volume.operation_id) == (SIZE, 1, "")
    assert (await caller.get("one")).status.state == RUNNING
    assert await caller.shell("one", SHOW_FILES) == files
    assert len(loop_devices_below(pool.path)) == 1
    pool.empty()
    # With space, the same calls succeed.
    await caller.resize_volume("data", SIZE * 2)
    await caller.shell("one", "dd if=/dev/zero of=/data/more bs=1M count=32 conv=fsync 2>/dev/null")
    assert (await caller.resize_volume("data", SIZE)).result.size_bytes == SIZE
    assert await caller.shell("one", SHOW_FILES) == files


async def test_a_writer_gets_an_error_when_the_pool_is_full(overcommitted: Caller, pool: Pool) -> None:
    """The pool has less space than the volume's size. What was written and synced before the error stays."""
    caller = overcommitted
    await caller.create_volume("data", SIZE)
    await caller.create("one", mounts=[mount_of("data")])
    await caller.shell("one", WRITE_FILES)
    files = await caller.shell("one", SHOW_FILES)
    pool.fill(leaving=40 * MIB)
    wrote = await caller.run("one", "dd", "if=/dev/zero", "of=/data/fill", "bs=1M", "count=200", "conv=fsync")
    assert wrote.code == 1, "the write must fail"
    assert b"No space left" in wrote.stderr or b"I/O error" in wrote.stderr, wrote.stderr
    volume = await caller.volume("data")
    assert (volume.size_bytes, volume.state) == (SIZE, volume_pb2.VOLUME_STATE_READY)
    pool.empty()
    # The filesystem may have shut itself down after failed writes; a restart mounts it again.
    await caller.restart("one")
    assert await caller.shell("one", SHOW_FILES) == files
    await caller.shell("one", "rm /data/fill && dd if=/dev/zero of=/data/fill bs=1M count=100 conv=fsync 2>/dev/null")
    assert await caller.shell("one", SHOW_FILES) == files


async def test_a_shrink_that_runs_out_of_space_while_it_copies_is_undone(overcommitted: Caller, pool: Pool) -> None:
    caller = overcommitted
    await caller.create_volume("data", 2 * SIZE)
    await caller.create("one", mounts=[mount_of("data")])
    await caller.shell("one", WRITE_FILES)
    await caller.shell("one", "dd if=/dev/urandom of=/data/bulk bs=1M count=200 conv=fsync 2>/dev/null")
    files = await caller.shell("one", f"{SHOW_FILES} && sha256sum bulk")
    request = volume_service_pb2.ResizeVolumeRequest(name="data", size_bytes=SIZE)
    stages: set[str] = set()

    async def shrink() -> None:
        async for event in caller.volumes.ResizeVolume(request):
            if "copy" not in stages and event.operation.stage == "copy":
                stages.add("copy")
                await asyncio.to_thread(pool.fill, 8 * MIB)

    failed = await failure(shrink())
    assert stages == {"copy"}
    assert failed.reason in {"DISK_FULL", "VOLUME_FAILED"}, failed
    await caller.until_idle()
    volume = await caller.volume("data")
    assert (volume.size_bytes, volume.revision, volume.operation_id) == (2 * SIZE, 1, "")
    assert len(loop_devices_below(pool.path)) == 1, "the loop device of the copy must be detached"
    assert (await caller.get("one")).status.state == RUNNING
    pool.empty()
    assert await caller.shell("one", f"{SHOW_FILES} && sha256sum bulk") == files
    assert (await caller.resize_volume("data", SIZE)).result.size_bytes == SIZE
    assert await caller.shell("one", f"{SHOW_FILES} && sha256sum bulk") == files


async def test_btrfs_shrinks_in_place_under_a_container(daemons: IsolatedDaemons) -> None:
    """By the client and by the command; neither stops the container."""
    daemon = await daemons.start("--volume-backend", "loop", "--volume-filesystem", "btrfs")
    try:
        async with Caller(daemon.target) as caller, Client(daemon.target) as client:
            made = await client.volumes.create("data", 2 * SIZE)
            assert made.filesystem == "btrfs"
            await caller.create("one", mounts=[mount_of("data")])
            await caller.shell("one", WRITE_FILES)
            files = await caller.shell("one", SHOW_FILES)
            before = await caller.get("one")
            plan = await client.volumes.resize("data", SIZE, validate_only=True).plan()
            assert (plan.restarts_process, plan.bytes_to_move) == (False, 0)
            assert (await client.volumes.resize("data", SIZE + 64 * MIB)).size_bytes == SIZE + 64 * MIB
            shrunk = await run(daemon.target, "volume", "resize", "data", "320M")
            assert shrunk.code == 0, shrunk
            assert abs(await filesystem_size(caller, "one") - SIZE) < SIZE // 50
            after = await caller.get("one")
            assert after.status.engine_id == before.status.engine_id
            assert after.status.start_time == before.status.start_time
            assert await caller.shell("one", SHOW_FILES) == files
            too_small = await run(daemon.target, "volume", "resize", "data", "16M")
            assert too_small.code != 0
            assert "VOLUME_TOO_SMALL_FOR_DATA" in too_small.err or "SIZE_NOT_SUPPORTED" in too_small.err, too_small.err
            assert await caller.shell("one", SHOW_FILES) == files
    finally:
        daemons.rig.engine.remove_all()
        detach_loop_devices(daemons.rig.folder)
