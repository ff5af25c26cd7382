"""In the VM: volumes by project quota, as callers of the daemon and programs in containers see them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial

import grpc
import pytest
import pytest_asyncio
from gpudock.v1 import container_pb2, node_service_pb2, volume_pb2, volume_service_pb2

from tests.calls import Caller, ExecResult, failure
from tests.conftest import FAST_FLAGS, own_state_flags
from tests.engine.isolated_daemons import until
from tests.faults.volume_pools import (
    SHOW_FILES,
    WRITE_FILES,
    Pool,
    container_has_files,
    filesystem_size,
    mount_of,
    mounted_pool,
)
from tests.rig import Daemon, Rig

from .conftest import QuotaFilesystem
from .machine import MKFS, MOUNT_OPTIONS

MIB = 1 << 20
SIZE = 64 * MIB
ALWAYS = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ALWAYS)


@pytest.fixture(scope="module")
def pool(rig: Rig, quota_filesystem: QuotaFilesystem, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """A pool of 600 MiB of the filesystem under test; it can be full while engine and store have space."""
    image = tmp_path_factory.mktemp("pool") / "image"
    make, options = MKFS[quota_filesystem.name], f"loop,{MOUNT_OPTIONS[quota_filesystem.name]}"
    with mounted_pool(rig, rig.folder / "pool", image=image, size=600 * MIB, make=make, options=options) as made:
        yield made


@pytest.fixture(scope="module")
def daemon(rig: Rig, pool: Pool) -> Iterator[Daemon]:
    """A daemon that overcommits the pool; one for all tests of the module, since a start takes seconds."""
    flags = ("--volume-dir", str(pool.path / "volumes"), "--volume-overcommit", "10")
    started = rig.daemon(*FAST_FLAGS, *own_state_flags(), *flags)
    yield started
    assert started.stop() == 0, started.log_text
    assert "Traceback" not in started.log_text, started.log_text


@pytest_asyncio.fixture
async def caller(daemon: Daemon) -> AsyncIterator[Caller]:
    """A caller of the daemon; its containers and volumes are deleted after the test."""
    async with Caller(daemon.target) as caller:
        yield caller
        await caller.delete_all()


async def _write(caller: Caller, name: str, mib: int) -> ExecResult:
    """Write a file of `mib` MiB to the volume, and sync it."""
    return await caller.run(
        "one", "dd", "if=/dev/zero", f"of=/data/{name}", "bs=64k", f"count={mib * 16}", "conv=fsync"
    )


def _is_full(result: ExecResult, message: str) -> bool:
    return result.code == 1 and message in result.stderr.decode()


async def test_a_size_limits_writes_and_changes_in_use(
    caller: Caller, quota_filesystem: QuotaFilesystem, pool: Pool
) -> None:
    made = await caller.create_volume("data", SIZE)
    assert (made.backend, made.filesystem) == (volume_pb2.VOLUME_BACKEND_PROJECT_QUOTA, quota_filesystem.name)
    await caller.create("one", mounts=[mount_of("data")])
    before = await caller.get("one")
    await caller.shell("one", WRITE_FILES)
    files = await caller.shell("one", SHOW_FILES)
    assert await filesystem_size(caller, "one") == SIZE
    assert _is_full(await _write(caller, "fill", 80), quota_filesystem.full_message)
    assert SIZE - MIB < (await caller.volume("data")).used_bytes <= SIZE

    assert (await caller.resize_volume("data", 2 * SIZE)).result.size_bytes == 2 * SIZE
    assert await filesystem_size(caller, "one") == 2 * SIZE
    assert (await _write(caller, "more", 4)).code == 0

    refused = await failure(caller.resize_volume("data", SIZE))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VOLUME_TOO_SMALL_FOR_DATA")
    assert int(refused.metadata["minimum_bytes"]) >= int(refused.metadata["used_bytes"]) > SIZE
    assert await filesystem_size(caller, "one") == 2 * SIZE

    await caller.shell("one", "rm /data/fill /data/more")
    assert (await caller.resize_volume("data", SIZE // 2)).result.size_bytes == SIZE // 2
    assert await filesystem_size(caller, "one") == SIZE // 2
    assert _is_full(await _write(caller, "fill", 40), quota_filesystem.full_message)
    assert await caller.shell("one", SHOW_FILES) == files
    after = await caller.get("one")
    assert (after.status.engine_id, after.status.start_time) == (before.status.engine_id, before.status.start_time)
    assert await _revision_causes(caller) == ["CREATED", "GROWN", "SHRUNK"]

    assert (await failure(caller.delete_volume("data"))).metadata["holders"] == "one"
    await caller.delete("one")
    await caller.delete_volume("data")
    assert pool.inside("ls", pool.path / "volumes") == ""
    assert (await caller.nodes.GetNode(node_service_pb2.GetNodeRequest())).node.volume_pool.promised_bytes == 0


async def _revision_causes(caller: Caller) -> list[str]:
    """The causes of the volume's revisions, oldest first."""
    request = volume_service_pb2.ListVolumeRevisionsRequest(name="data")
    revisions = (await caller.volumes.ListVolumeRevisions(request)).revisions
    name = volume_pb2.VolumeRevisionCause.Name
    return [name(revision.cause).removeprefix("VOLUME_REVISION_CAUSE_") for revision in revisions]


async def test_a_full_pool_and_a_killed_engine_lose_nothing(caller: Caller, pool: Pool) -> None:
    size = 400 * MIB
    await caller.create_volume("data", size)
    await caller.create("one", mounts=[mount_of("data")], restart_policy=ALWAYS)
    await caller.shell("one", WRITE_FILES)
    files = await caller.shell("one", SHOW_FILES)
    pool.fill(leaving=8 * MIB)
    assert _is_full(await _write(caller, "fill", 40), "No space left"), "the write must fail when the pool is full"
    for call in (caller.create_volume("more", size), caller.resize_volume("data", 2 * size)):
        full = await failure(call)
        assert (full.code, full.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL"), full
        assert full.metadata["path"] == str(pool.path / "volumes")
    assert (await failure(caller.volume("more"))).reason == "VOLUME_NOT_FOUND"
    volume = await caller.volume("data")
    assert (volume.size_bytes, volume.revision, volume.state) == (size, 1, volume_pb2.VOLUME_STATE_READY)
    assert volume.used_bytes < 40 * MIB, "the usage of the volume, and not of the pool"
    assert await caller.shell("one", SHOW_FILES) == files
    pool.empty()
    assert (await _write(caller, "fill", 40)).code == 0

    await asyncio.to_thread(pool.rig.engine.kill9)
    await asyncio.to_thread(pool.rig.engine.start)
    await until(partial(container_has_files, caller, "one", files), 60)
    assert await filesystem_size(caller, "one") == size
    assert (await caller.resize_volume("data", size + SIZE)).result.size_bytes == size + SIZE
    assert await filesystem_size(caller, "one") == size + SIZE
    assert await caller.shell("one", SHOW_FILES) == files
