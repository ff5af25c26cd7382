"""Volumes by RPC on a real engine: sizes that hold inside containers, change under them, and keep every byte."""

from __future__ import annotations

import grpc
import pytest
from gpudock.v1 import container_pb2, operation_service_pb2, volume_pb2, volume_service_pb2

from tests.calls import Caller, failure

pytest_plugins: list[str] = []

MIB = 1 << 20
SIZE = 320 * MIB
# Writes blocks and their checksums until a write fails, which ends the container.
WRITER = (
    "trap 'exit 0' TERM; i=0; while :; do dd if=/dev/urandom of=/data/b$i bs=64k count=1 conv=fsync 2>/dev/null ||"
    " exit 1; sha256sum /data/b$i >> /data/sums || exit 1; i=$((i+1)); done"
)
PLANT = (
    "mkdir -p /data/deep && dd if=/dev/urandom of=/data/deep/blob bs=64k count=64 2>/dev/null &&"
    " ln /data/deep/blob /data/link && ln -s deep/blob /data/soft && chmod 4751 /data/deep/blob"
)
LOOK = "cd /data && find . -not -name lost+found | sort && md5sum deep/blob link && stat -c '%a %h %u %Y' deep/blob"


def mount(volume: str, target: str = "/data", *, read_only: bool = False) -> container_pb2.Mount:
    """A volume, mounted."""
    return container_pb2.Mount(volume=volume, target=target, read_only=read_only)


async def df_size(caller: Caller, container: str) -> int:
    """What `df` inside says."""
    return int((await caller.shell(container, "df -P -k /data")).splitlines()[1].split()[1]) << 10


async def test_the_size_holds_inside(caller: Caller) -> None:
    made = await caller.create_volume("data", SIZE, labels={"a": "b"}, owner="alice")
    assert (made.size_bytes, made.revision, made.state) == (SIZE, 1, volume_pb2.VOLUME_STATE_READY)
    assert made.backend in (volume_pb2.VOLUME_BACKEND_LOOP, volume_pb2.VOLUME_BACKEND_PROJECT_QUOTA)
    await caller.create("one", mounts=[mount("data")])
    await caller.create("two", mounts=[mount("data", read_only=True)])
    assert abs(await df_size(caller, "one") - SIZE) < SIZE // 50
    full = await caller.run("one", "dd", "if=/dev/zero", "of=/data/fill", "bs=64k")
    assert (full.code, b"No space left" in full.stderr) == (1, True)
    assert (await caller.run("two", "sh", "-c", "test -s /data/fill && touch /data/x")).code == 1
    seen = await caller.volume("data")
    assert list(seen.attached_containers) == ["one", "two"]
    assert seen.used_bytes > SIZE * 9 // 10
    refused = await failure(caller.delete_volume("data"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VOLUME_IN_USE")
    assert refused.metadata["holders"] == "one,two"


async def test_growing_under_a_writer_loses_nothing(caller: Caller) -> None:
    await caller.create_volume("data", SIZE)
    await caller.create("writer", mounts=[mount("data")], command=["sh", "-c", WRITER])
    before = await caller.get("writer")
    pid = await caller.shell("writer", "cat /proc/1/stat | cut -d' ' -f22")
    size = SIZE
    for _ in range(20):
        size += 4 * MIB
        assert (await caller.resize_volume("data", size)).result.size_bytes == size
    assert await caller.shell("writer", "cat /proc/1/stat | cut -d' ' -f22") == pid
    after = await caller.get("writer")
    assert after.status.engine_id == before.status.engine_id
    assert after.status.state == container_pb2.CONTAINER_STATE_RUNNING
    assert abs(await df_size(caller, "writer") - size) < size // 50
    await caller.stop("writer")
    await caller.create("reader", mounts=[mount("data", read_only=True)])
    # The last block may have no checksum yet; every checksum has its block.
    await caller.shell("reader", "sha256sum -c /data/sums >/dev/null")
    revisions = await revisions_of(caller, "data")
    assert [one.revision for one in revisions] == list(range(1, 22))
    assert revisions[0].cause == volume_pb2.VOLUME_REVISION_CAUSE_CREATED
    assert {one.cause for one in revisions[1:]} == {volume_pb2.VOLUME_REVISION_CAUSE_GROWN}
    assert revisions[-1].size_bytes == size


async def revisions_of(caller: Caller, name: str) -> list[volume_pb2.VolumeRevision]:
    """The history, oldest first."""
    request = volume_service_pb2.ListVolumeRevisionsRequest(name=name)
    return list((await caller.volumes.ListVolumeRevisions(request)).revisions)


async def test_shrinking_below_what_is_in_use_is_refused(caller: Caller) -> None:
    await caller.create_volume("data", 2 * SIZE)
    await caller.create("one", mounts=[mount("data")])
    await caller.shell("one", "dd if=/dev/zero of=/data/fill bs=1M count=400 conv=fsync 2>/dev/null")
    refused = await failure(caller.resize_volume("data", SIZE))
    assert refused.reason == "VOLUME_TOO_SMALL_FOR_DATA"
    assert int(refused.metadata["used_bytes"]) > 400 * MIB
    assert int(refused.metadata["minimum_bytes"]) > SIZE
    assert (await caller.volume("data")).size_bytes == 2 * SIZE


async def test_shrinking_under_running_containers(caller: Caller) -> None:
    await caller.create_volume("data", 2 * SIZE)
    await caller.create("one", mounts=[mount("data")])
    await caller.create("two", mounts=[mount("data", read_only=True)])
    await caller.stop("two")
    await caller.shell("one", PLANT)
    files = await caller.shell("one", LOOK)
    before = await caller.get("one")
    plan = await caller.resize_volume("data", SIZE, validate_only=True)
    shrunk = await caller.resize_volume("data", SIZE)
    assert shrunk.result.size_bytes == SIZE
    assert plan.snapshots[0].plan.stages == shrunk.snapshots[-1].plan.stages
    after = await caller.get("one")
    assert after.status.state == container_pb2.CONTAINER_STATE_RUNNING
    assert after.status.engine_id == before.status.engine_id
    assert (after.status.start_time.ToNanoseconds() > before.status.start_time.ToNanoseconds()) == plan.snapshots[
        0
    ].plan.restarts_process
    assert await caller.shell("one", LOOK) == files
    assert abs(await df_size(caller, "one") - SIZE) < SIZE // 50
    await caller.start("two")
    assert await caller.shell("two", LOOK) == files
    assert [one.cause for one in await revisions_of(caller, "data")][-1] == volume_pb2.VOLUME_REVISION_CAUSE_SHRUNK


async def test_cancelling_a_shrink_leaves_the_old_one(caller: Caller) -> None:
    await caller.create_volume("data", 2 * SIZE)
    await caller.create("one", mounts=[mount("data")])
    await caller.shell("one", PLANT)
    files = await caller.shell("one", LOOK)
    stream = caller.volumes.ResizeVolume(volume_service_pb2.ResizeVolumeRequest(name="data", size_bytes=SIZE))
    async for event in stream:
        if event.operation.stage == "exchange":
            break
    else:
        pytest.skip("this backend shrinks in place")
    request = operation_service_pb2.CancelOperationRequest(id=event.operation.id)
    await caller.operations.CancelOperation(request)
    await caller.settled()
    seen = await caller.volume("data")
    assert (seen.size_bytes, seen.revision, seen.operation_id) == (2 * SIZE, 1, "")
    assert (await caller.get("one")).status.state == container_pb2.CONTAINER_STATE_RUNNING
    assert await caller.shell("one", LOOK) == files
    assert abs(await df_size(caller, "one") - 2 * SIZE) < SIZE // 50
