"""VolumeService on a real engine: sizes are limits inside containers, and change without loss of data."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator

import grpc
import pytest
from gpudock.v1 import (
    container_pb2,
    container_revision_pb2,
    container_service_pb2,
    node_service_pb2,
    operation_service_pb2,
    volume_pb2,
    volume_service_pb2,
)

from tests.calls import Caller, Failure, failure, failure_of
from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.engine.loop_devices import detach_loop_devices, loop_devices_below
from tests.engine.volume_containers import volume_container
from tests.engine.volume_fixtures import mount
from tests.rig import GLIBC, Rig

__all__ = ["daemons"]

MIB = 1 << 20
VOLUME_SIZE = 320 * MIB
# Writes blocks and their checksums until a write fails, which ends the container.
WRITER = (
    "trap 'exit 0' TERM; i=0; while :; do dd if=/dev/urandom of=/data/b$i bs=64k count=1 conv=fsync 2>/dev/null ||"
    " exit 1; sha256sum /data/b$i >> /data/sums || exit 1; i=$((i+1)); done"
)
WRITE_FILES = (
    "mkdir -p /data/deep && dd if=/dev/urandom of=/data/deep/blob bs=64k count=64 2>/dev/null &&"
    " ln /data/deep/blob /data/link && ln -s deep/blob /data/soft && chmod 4751 /data/deep/blob"
)
READ_FILES = (
    "cd /data && find . -not -name lost+found | sort && md5sum deep/blob link && stat -c '%a %h %u %Y' deep/blob"
)


async def df_size(caller: Caller, container: str) -> int:
    """The size of /data in bytes, from `df` inside the container."""
    return int((await caller.shell(container, "df -P -k /data")).splitlines()[1].split()[1]) << 10


async def test_the_size_of_a_volume_is_a_limit_inside_containers(caller: Caller) -> None:
    created = await caller.create_volume("data", VOLUME_SIZE, labels={"a": "b"}, owner="alice")
    assert (created.size_bytes, created.revision, created.state) == (VOLUME_SIZE, 1, volume_pb2.VOLUME_STATE_READY)
    assert created.backend in (volume_pb2.VOLUME_BACKEND_LOOP, volume_pb2.VOLUME_BACKEND_PROJECT_QUOTA)
    await caller.create("one", mounts=[mount("data")])
    await caller.create("two", mounts=[mount("data", read_only=True)])
    assert abs(await df_size(caller, "one") - VOLUME_SIZE) < VOLUME_SIZE // 50
    result = await caller.run("one", "dd", "if=/dev/zero", "of=/data/fill", "bs=64k")
    assert (result.code, b"No space left" in result.stderr) == (1, True)
    assert (await caller.run("two", "sh", "-c", "test -s /data/fill && touch /data/x")).code == 1
    volume_now = await caller.volume("data")
    assert list(volume_now.attached_containers) == ["one", "two"]
    assert volume_now.used_bytes > VOLUME_SIZE * 9 // 10
    refused = await failure(caller.delete_volume("data"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VOLUME_IN_USE")
    assert refused.metadata["holders"] == "one,two"


@pytest.mark.deep
async def test_growing_under_a_writer_loses_nothing(caller: Caller) -> None:
    await caller.create_volume("data", VOLUME_SIZE)
    await caller.create("writer", mounts=[mount("data")], command=["sh", "-c", WRITER])
    before = await caller.get("writer")
    pid = await caller.shell("writer", "cat /proc/1/stat | cut -d' ' -f22")
    size = VOLUME_SIZE
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
    # The last block may have no checksum; every checksum must match its block.
    await caller.shell("reader", "sha256sum -c /data/sums >/dev/null")
    revisions = await revisions_of(caller, "data")
    assert [revision.revision for revision in revisions] == list(range(1, 22))
    assert revisions[0].cause == volume_pb2.VOLUME_REVISION_CAUSE_CREATED
    assert {revision.cause for revision in revisions[1:]} == {volume_pb2.VOLUME_REVISION_CAUSE_GROWN}
    assert revisions[-1].size_bytes == size


async def revisions_of(caller: Caller, name: str) -> list[volume_pb2.VolumeRevision]:
    """The revisions of a volume, oldest first."""
    request = volume_service_pb2.ListVolumeRevisionsRequest(name=name)
    return list((await caller.volumes.ListVolumeRevisions(request)).revisions)


async def test_shrinking_below_the_used_bytes_is_refused(caller: Caller) -> None:
    await caller.create_volume("data", 2 * VOLUME_SIZE)
    await caller.create("one", mounts=[mount("data")])
    await caller.shell("one", "dd if=/dev/zero of=/data/fill bs=1M count=400 conv=fsync 2>/dev/null")
    refused = await failure(caller.resize_volume("data", VOLUME_SIZE))
    assert refused.reason == "VOLUME_TOO_SMALL_FOR_DATA"
    assert int(refused.metadata["used_bytes"]) > 400 * MIB
    assert int(refused.metadata["minimum_bytes"]) > VOLUME_SIZE
    assert (await caller.volume("data")).size_bytes == 2 * VOLUME_SIZE


async def test_shrinking_under_running_containers(caller: Caller) -> None:
    await caller.create_volume("data", 2 * VOLUME_SIZE)
    await caller.create("one", mounts=[mount("data")])
    await caller.create("two", mounts=[mount("data", read_only=True)])
    await caller.stop("two")
    await caller.shell("one", WRITE_FILES)
    files = await caller.shell("one", READ_FILES)
    before = await caller.get("one")
    plan = await caller.resize_volume("data", VOLUME_SIZE, validate_only=True)
    shrunk = await caller.resize_volume("data", VOLUME_SIZE)
    assert shrunk.result.size_bytes == VOLUME_SIZE
    assert plan.snapshots[0].plan.stages == shrunk.snapshots[-1].plan.stages
    after = await caller.get("one")
    assert after.status.state == container_pb2.CONTAINER_STATE_RUNNING
    assert after.status.engine_id == before.status.engine_id
    assert (after.status.start_time.ToNanoseconds() > before.status.start_time.ToNanoseconds()) == plan.snapshots[
        0
    ].plan.restarts_process
    assert await caller.shell("one", READ_FILES) == files
    assert abs(await df_size(caller, "one") - VOLUME_SIZE) < VOLUME_SIZE // 50
    await caller.start("two")
    assert await caller.shell("two", READ_FILES) == files
    assert [revision.cause for revision in await revisions_of(caller, "data")][
        -1
    ] == volume_pb2.VOLUME_REVISION_CAUSE_SHRUNK


@pytest.mark.deep
async def test_a_cancelled_shrink_leaves_the_volume_as_it_was(caller: Caller) -> None:
    await caller.create_volume("data", 2 * VOLUME_SIZE)
    await caller.create("one", mounts=[mount("data")])
    await caller.shell("one", WRITE_FILES)
    files = await caller.shell("one", READ_FILES)
    stream = caller.volumes.ResizeVolume(volume_service_pb2.ResizeVolumeRequest(name="data", size_bytes=VOLUME_SIZE))
    async for event in stream:
        if event.operation.stage == "exchange":
            break
    else:
        pytest.skip("this backend shrinks in place")
    request = operation_service_pb2.CancelOperationRequest(id=event.operation.id)
    await caller.operations.CancelOperation(request)
    await caller.until_idle()
    volume_now = await caller.volume("data")
    assert (volume_now.size_bytes, volume_now.revision, volume_now.operation_id) == (2 * VOLUME_SIZE, 1, "")
    assert (await caller.get("one")).status.state == container_pb2.CONTAINER_STATE_RUNNING
    assert await caller.shell("one", READ_FILES) == files
    assert abs(await df_size(caller, "one") - 2 * VOLUME_SIZE) < VOLUME_SIZE // 50


async def test_a_refusal_to_shrink_names_the_smallest_size_that_works(caller: Caller) -> None:
    """The minimum includes what the filesystem needs, and not only the size of the files."""
    await caller.create_volume("data", 2 * VOLUME_SIZE)
    refused = await failure(caller.resize_volume("data", 10 * MIB))
    minimum = int(refused.metadata["minimum_bytes"])
    assert f"its minimum size is {minimum // MIB} MiB" in refused.message
    await caller.resize_volume("data", minimum)
    assert (await caller.volume("data")).size_bytes == minimum


async def test_mounts_of_unknown_volumes_are_refused(caller: Caller, clean_engine: Rig) -> None:
    await caller.create_volume("data")
    missing = await failure(caller.create("one", mounts=[mount("dota")]))
    assert (missing.reason, missing.metadata["available"]) == ("VOLUME_NOT_FOUND", "data")
    clean_engine.engine.call("POST", "/volumes/create", send={"Name": "theirs", "Labels": {"gpudock.adopt": "true"}})
    not_adopted = await failure(caller.create("one", mounts=[mount("theirs")]))
    assert not_adopted.reason == "VOLUME_NOT_FOUND"
    assert "AdoptVolume" in not_adopted.message
    assert (await failure(caller.create_volume("data"))).reason == "VOLUME_EXISTS"
    assert (await failure(caller.resize_volume("data", VOLUME_SIZE))).reason == "SIZE_NOT_SUPPORTED"


async def test_adopting_a_volume_of_the_engine(caller: Caller, clean_engine: Rig) -> None:
    clean_engine.engine.call("POST", "/volumes/create", send={"Name": "theirs", "Labels": {"gpudock.adopt": "true"}})
    with volume_container(clean_engine, "theirs") as other_container:
        other_container.run("sh", "-c", WRITE_FILES)
        files = other_container.run("sh", "-c", READ_FILES).stdout
        assert (await failure(caller.adopt_volume("sized", "theirs", VOLUME_SIZE))).reason == "VOLUME_IN_USE"
    sized = await caller.adopt_volume("sized", "theirs", VOLUME_SIZE)
    assert sized.size_bytes == VOLUME_SIZE
    plain = await caller.adopt_volume("plain", "theirs")
    assert (plain.backend, plain.size_bytes) == (volume_pb2.VOLUME_BACKEND_PLAIN, 0)
    assert (await failure(caller.adopt_volume("again", "theirs"))).reason == "VOLUME_EXISTS"
    assert (await failure(caller.adopt_volume("none", "nowhere"))).reason == "VOLUME_NOT_FOUND"
    for name in ("sized", "plain"):
        await caller.create(name, mounts=[mount(name)])
        assert await caller.shell(name, READ_FILES) == files
        assert [revision.cause for revision in await revisions_of(caller, name)] == [
            volume_pb2.VOLUME_REVISION_CAUSE_ADOPTED
        ]
    assert abs(await df_size(caller, "sized") - VOLUME_SIZE) < VOLUME_SIZE // 50


async def test_delete_with_force_removes_the_mount_from_containers_that_do_not_run(caller: Caller) -> None:
    await caller.create_volume("data", VOLUME_SIZE)
    await caller.create_volume("other")
    mounts = [mount("data"), mount("data", "/again", read_only=True), mount("other", "/other")]
    for name in ("one", "two"):
        await caller.create(name, mounts=mounts)
        await caller.shell(name, "echo kept > /root/file; echo kept > /other/file; echo gone > /data/file")
    await caller.stop("one")
    # A running container keeps its mount.
    running = await failure(caller.delete_volume("data", force=True))
    assert (running.reason, running.metadata["holders"]) == ("VOLUME_IN_USE", "two")
    await caller.stop("two")
    assert (await failure(caller.delete_volume("data"))).metadata["holders"] == "one,two"
    plan = (await caller.delete_volume("data", force=True, validate_only=True)).plan
    assert [stage.name for stage in plan.stages] == ["detach", "check", "engine-volume", "destroy", "commit"]
    assert [warning.split()[1].rstrip(":") for warning in plan.plan.warnings[:2]] == ["one", "two"]
    assert list((await caller.volume("data")).attached_containers) == ["one", "two"], "validate_only changed the mounts"
    assert not (await caller.delete_volume("data", force=True)).HasField("plan")
    assert (await failure(caller.volume("data"))).reason == "VOLUME_NOT_FOUND"
    for name in ("one", "two"):
        container = await caller.get(name)
        assert (list(container.spec.mounts), container.revision) == ([mount("other", "/other")], 2)
        assert container.status.state == container_pb2.CONTAINER_STATE_STOPPED
        await caller.start(name)
        assert await caller.shell(name, "cat /root/file /other/file; find /data /again -type f") == "kept\nkept\n"
        history = await caller.revisions(name)
        assert history[-1].cause == container_revision_pb2.REVISION_CAUSE_UPDATED
        refused = await failure(caller.rollback(name, 1))
        assert (refused.reason, refused.metadata["volume"]) == ("VOLUME_NOT_FOUND", "data")
        assert await caller.shell(name, "cat /root/file") == "kept\n"


async def test_delete_with_force_is_refused_while_a_container_outside_gpudock_has_the_volume(
    caller: Caller, clean_engine: Rig
) -> None:
    created = await caller.create_volume("data")
    await caller.create("one", mounts=[mount("data")])
    await caller.stop("one")
    engine_volume = created.mountpoint.split("/")[-2]
    with volume_container(clean_engine, engine_volume) as other_container:
        other_container.stop()
        refused = await failure(caller.delete_volume("data", force=True))
        assert refused.reason == "VOLUME_IN_USE"
        assert "one" not in refused.metadata["holders"].split(",")
    assert list((await caller.get("one")).spec.mounts) == [mount("data")]
    await caller.delete_volume("data", force=True)


@pytest.mark.deep
@pytest.mark.parametrize("force", [False, True])
async def test_of_a_simultaneous_delete_and_mount_one_is_refused(caller: Caller, *, force: bool) -> None:
    """No container is ever without a volume that its spec names."""
    await caller.create("joins")
    refusals = {"VOLUME_NOT_FOUND", "VOLUME_BUSY", "VOLUME_IN_USE", "VOLUME_FAILED"}
    for number in range(24):
        await caller.create_volume("data", VOLUME_SIZE if number % 8 == 0 else 0)
        updates_container = number % 2 == 1
        mounts = [mount("data")]
        mount_call = (
            caller.update("joins", mounts=mounts) if updates_container else caller.create("made", mounts=mounts)
        )

        async def delete_volume(delay: float) -> None:
            await asyncio.sleep(delay)
            await caller.delete_volume("data", force=force)

        results = await asyncio.gather(mount_call, delete_volume(number // 2 * 0.002), return_exceptions=True)
        failures = [failure_of(result) if isinstance(result, grpc.aio.AioRpcError) else result for result in results]
        refused = [isinstance(failure, Failure) for failure in failures]
        assert sum(refused) == 1, failures
        assert {failure.reason for failure in failures if isinstance(failure, Failure)} <= refusals, failures
        name = "joins" if updates_container else "made"
        if refused[1]:
            volume_now = await caller.volume("data")
            assert (volume_now.state, list(volume_now.attached_containers)) == (volume_pb2.VOLUME_STATE_READY, [name])
            await caller.shell(name, "echo there > /data/file && cat /data/file")
            await (caller.update("joins", "mounts") if updates_container else caller.delete("made"))
            await caller.delete_volume("data")
        else:
            assert (await failure(caller.volume("data"))).reason == "VOLUME_NOT_FOUND"
            listed = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest())
            mounting_containers = [
                container.name for container in listed.containers if any(item.volume for item in container.spec.mounts)
            ]
            assert mounting_containers == []


@pytest.fixture
def detach_at_end(daemons: IsolatedDaemons) -> Iterator[None]:
    """Remove engine containers and detach loop devices, which the test's daemons leave when they are killed."""
    yield
    daemons.rig.engine.remove_all()
    detach_loop_devices(daemons.rig.folder)


async def test_a_create_beyond_the_volume_pool_is_refused_before_any_change(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--volume-overcommit", "0.0001")
    async with Caller(daemon.target) as caller:
        result = await failure(caller.create_volume("data", 1 << 50))
        assert (result.code, result.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
        assert int(result.metadata["available_bytes"]) < 1 << 50
        node = (await caller.nodes.GetNode(node_service_pb2.GetNodeRequest())).node
        assert node.volume_pool.overcommit == 0.0001
        assert node.volume_pool.total_bytes > node.volume_pool.free_bytes > 0
        listed = await caller.volumes.ListVolumes(volume_service_pb2.ListVolumesRequest())
        assert not listed.volumes


FOLDER_NAME = "n" * 199
# Together with the folder of the backing, the path of the file is longer than PATH_MAX.
WRITE_DEEP_FILES = f"""
import os
os.chdir("/data")
for number in range(20):
    os.mkdir("{FOLDER_NAME}")
    os.chdir("{FOLDER_NAME}")
    os.utime(".", (number, number))
open("file", "w").write("at the bottom")
"""
READ_DEEP_FILES = f"""
import os
os.chdir("/data")
for _ in range(20):
    os.chdir("{FOLDER_NAME}")
    print(os.stat(".").st_mtime_ns, os.listdir("."))
print(open("file").read())
"""


@pytest.mark.deep
@pytest.mark.usefixtures("detach_at_end")
async def test_a_volume_with_deep_folders_is_shrunk_by_copy(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--volume-backend", "loop", "--volume-filesystem", "xfs")
    async with Caller(daemon.target) as caller:
        await caller.create_volume("data", 2 * VOLUME_SIZE)
        await caller.create("one", image=GLIBC, mounts=[mount("data")])
        await caller.shell("one", f"python3 -c '{WRITE_DEEP_FILES}'")
        files = await caller.shell("one", f"python3 -c '{READ_DEEP_FILES}'")
        assert files.count(FOLDER_NAME) == 19
        assert files.endswith("at the bottom\n")
        shrunk = await caller.resize_volume("data", VOLUME_SIZE)
        assert "exchange" in shrunk.snapshots[-1].plan.stages, "the volume was shrunk in place, not by a copy"
        assert abs(await df_size(caller, "one") - VOLUME_SIZE) < VOLUME_SIZE // 50
        assert await caller.shell("one", f"python3 -c '{READ_DEEP_FILES}'") == files
        await caller.delete_all()


@pytest.mark.deep
@pytest.mark.usefixtures("detach_at_end")
async def test_loop_volumes_are_attached_again_after_a_reboot(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--volume-backend", "loop")
    async with Caller(daemon.target) as caller:
        await caller.create_volume("data", VOLUME_SIZE)
        await caller.create("one", mounts=[mount("data")])
        await caller.shell("one", WRITE_FILES)
        files = await caller.shell("one", READ_FILES)
        await caller.stop("one")
    assert await asyncio.to_thread(daemon.stop) == 0, daemon.log_text
    # A reboot detaches loop devices. The systemd unit attaches them before the engine starts, without a daemon.
    detach_loop_devices(daemons.rig.folder)
    assert not loop_devices_below(daemons.rig.folder)
    command = [sys.executable, "-m", "gpudock_server", "--attach-volumes", "--state-dir", str(daemon.state_dir)]
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == 0
    assert len(loop_devices_below(daemons.rig.folder)) == 1
    # A daemon also attaches them when it starts.
    detach_loop_devices(daemons.rig.folder)
    daemon = await daemons.start("--volume-backend", "loop", after=daemon)
    async with Caller(daemon.target) as caller:
        await caller.start("one")
        assert await caller.shell("one", READ_FILES) == files
        assert abs(await df_size(caller, "one") - VOLUME_SIZE) < VOLUME_SIZE // 50
        await caller.delete_all()
    assert not loop_devices_below(daemons.rig.folder)
