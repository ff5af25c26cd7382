"""Volumes by RPC on a real engine: sizes that hold inside containers, change under them, and keep every byte."""

from __future__ import annotations

import asyncio
import collections
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
from tests.rig import GLIBC, Rig

__all__ = ["daemons"]

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


@pytest.mark.deep
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
    assert [revision.revision for revision in revisions] == list(range(1, 22))
    assert revisions[0].cause == volume_pb2.VOLUME_REVISION_CAUSE_CREATED
    assert {revision.cause for revision in revisions[1:]} == {volume_pb2.VOLUME_REVISION_CAUSE_GROWN}
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
    assert [revision.cause for revision in await revisions_of(caller, "data")][
        -1
    ] == volume_pb2.VOLUME_REVISION_CAUSE_SHRUNK


@pytest.mark.deep
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
    await caller.until_idle()
    seen = await caller.volume("data")
    assert (seen.size_bytes, seen.revision, seen.operation_id) == (2 * SIZE, 1, "")
    assert (await caller.get("one")).status.state == container_pb2.CONTAINER_STATE_RUNNING
    assert await caller.shell("one", LOOK) == files
    assert abs(await df_size(caller, "one") - 2 * SIZE) < SIZE // 50


async def test_a_refusal_to_shrink_names_the_smallest_size_that_works(caller: Caller) -> None:
    """It named what the files take, and the filesystem then refused that size and named another one."""
    await caller.create_volume("data", 2 * SIZE)
    refused = await failure(caller.resize_volume("data", 10 * MIB))
    least = int(refused.metadata["minimum_bytes"])
    assert f"its minimum size is {least // MIB} MiB" in refused.message
    await caller.resize_volume("data", least)
    assert (await caller.volume("data")).size_bytes == least


async def test_a_mount_of_what_is_not_a_volume_is_refused(caller: Caller, clean_engine: Rig) -> None:
    await caller.create_volume("data")
    missing = await failure(caller.create("one", mounts=[mount("dota")]))
    assert (missing.reason, missing.metadata["available"]) == ("VOLUME_NOT_FOUND", "data")
    clean_engine.engine.call("POST", "/volumes/create", send={"Name": "theirs", "Labels": {"gpudock.adopt": "true"}})
    raw = await failure(caller.create("one", mounts=[mount("theirs")]))
    assert raw.reason == "VOLUME_NOT_FOUND"
    assert "AdoptVolume" in raw.message
    assert (await failure(caller.create_volume("data"))).reason == "VOLUME_EXISTS"
    assert (await failure(caller.resize_volume("data", SIZE))).reason == "SIZE_NOT_SUPPORTED"


async def test_adopting_a_volume_of_the_engine(caller: Caller, clean_engine: Rig) -> None:
    clean_engine.engine.call("POST", "/volumes/create", send={"Name": "theirs", "Labels": {"gpudock.adopt": "true"}})
    with volume_container(clean_engine, "theirs") as theirs:
        theirs.run("sh", "-c", PLANT)
        files = theirs.run("sh", "-c", LOOK).stdout
        assert (await failure(caller.adopt_volume("sized", "theirs", SIZE))).reason == "VOLUME_IN_USE"
    sized = await caller.adopt_volume("sized", "theirs", SIZE)
    assert sized.size_bytes == SIZE
    plain = await caller.adopt_volume("plain", "theirs")
    assert (plain.backend, plain.size_bytes) == (volume_pb2.VOLUME_BACKEND_PLAIN, 0)
    assert (await failure(caller.adopt_volume("again", "theirs"))).reason == "VOLUME_EXISTS"
    assert (await failure(caller.adopt_volume("none", "nowhere"))).reason == "VOLUME_NOT_FOUND"
    for name in ("sized", "plain"):
        await caller.create(name, mounts=[mount(name)])
        assert await caller.shell(name, LOOK) == files
        assert [revision.cause for revision in await revisions_of(caller, name)] == [
            volume_pb2.VOLUME_REVISION_CAUSE_ADOPTED
        ]
    assert abs(await df_size(caller, "sized") - SIZE) < SIZE // 50


async def test_force_takes_it_out_of_containers_that_do_not_run(caller: Caller) -> None:
    await caller.create_volume("data", SIZE)
    await caller.create_volume("other")
    mounts = [mount("data"), mount("data", "/again", read_only=True), mount("other", "/other")]
    for name in ("one", "two"):
        await caller.create(name, mounts=mounts)
        await caller.shell(name, "echo kept > /root/file; echo kept > /other/file; echo gone > /data/file")
    await caller.stop("one")
    # Nothing is taken from a process.
    running = await failure(caller.delete_volume("data", force=True))
    assert (running.reason, running.metadata["holders"]) == ("VOLUME_IN_USE", "two")
    await caller.stop("two")
    assert (await failure(caller.delete_volume("data"))).metadata["holders"] == "one,two"
    planned = (await caller.delete_volume("data", force=True, validate_only=True)).plan
    assert [stage.name for stage in planned.stages] == ["detach", "check", "engine-volume", "destroy", "commit"]
    assert [warning.split()[1].rstrip(":") for warning in planned.plan.warnings[:2]] == ["one", "two"]
    assert list((await caller.volume("data")).attached_containers) == ["one", "two"], "nothing was done"
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
        gone = await failure(caller.rollback(name, 1))
        assert (gone.reason, gone.metadata["volume"]) == ("VOLUME_NOT_FOUND", "data")
        assert await caller.shell(name, "cat /root/file") == "kept\n"


async def test_force_takes_nothing_from_strangers(caller: Caller, clean_engine: Rig) -> None:
    made = await caller.create_volume("data")
    await caller.create("one", mounts=[mount("data")])
    await caller.stop("one")
    engine_volume = made.mountpoint.split("/")[-2]
    with volume_container(clean_engine, engine_volume) as theirs:
        theirs.stop()
        refused = await failure(caller.delete_volume("data", force=True))
        assert refused.reason == "VOLUME_IN_USE"
        assert "one" not in refused.metadata["holders"].split(",")
    assert list((await caller.get("one")).spec.mounts) == [mount("data")]
    await caller.delete_volume("data", force=True)


@pytest.mark.deep
@pytest.mark.parametrize("force", [False, True])
async def test_a_deletion_and_a_mount_at_once(caller: Caller, *, force: bool) -> None:
    """One of them is refused; no container is ever without a volume that its spec names."""
    await caller.create("joins")
    refusals = {"VOLUME_NOT_FOUND", "VOLUME_BUSY", "VOLUME_IN_USE", "VOLUME_FAILED"}
    won = collections.Counter[str]()
    for number in range(24):
        await caller.create_volume("data", SIZE if number % 8 == 0 else 0)
        joining = number % 2 == 1
        mounts = [mount("data")]
        mounting = caller.update("joins", mounts=mounts) if joining else caller.create("made", mounts=mounts)

        async def deletion(after: float) -> None:
            await asyncio.sleep(after)
            await caller.delete_volume("data", force=force)

        ended = await asyncio.gather(mounting, deletion(number // 2 * 0.002), return_exceptions=True)
        failures = [failure_of(one) if isinstance(one, grpc.aio.AioRpcError) else one for one in ended]
        refused = [isinstance(failure, Failure) for failure in failures]
        assert sum(refused) == 1, failures
        assert {failure.reason for failure in failures if isinstance(failure, Failure)} <= refusals, failures
        name = "joins" if joining else "made"
        won["mount" if refused[1] else "deletion"] += 1
        if refused[1]:
            seen = await caller.volume("data")
            assert (seen.state, list(seen.attached_containers)) == (volume_pb2.VOLUME_STATE_READY, [name])
            await caller.shell(name, "echo there > /data/file && cat /data/file")
            await (caller.update("joins", "mounts") if joining else caller.delete("made"))
            await caller.delete_volume("data")
        else:
            assert (await failure(caller.volume("data"))).reason == "VOLUME_NOT_FOUND"
            listed = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest())
            there = [
                container.name
                for container in listed.containers
                if any(mount.volume for mount in container.spec.mounts)
            ]
            assert there == []
    assert won["mount"], won


@pytest.fixture
def detached(daemons: IsolatedDaemons) -> Iterator[None]:
    """Lets go of what is left to the volumes of daemons that are gone."""
    yield
    daemons.rig.engine.remove_all()
    detach_loop_devices(daemons.rig.folder)


async def test_a_full_pool_is_told_before_anything_is_made(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--volume-overcommit", "0.0001")
    async with Caller(daemon.target) as caller:
        full = await failure(caller.create_volume("data", 1 << 50))
        assert (full.code, full.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
        assert int(full.metadata["available_bytes"]) < 1 << 50
        node = (await caller.nodes.GetNode(node_service_pb2.GetNodeRequest())).node
        assert node.volume_pool.overcommit == 0.0001
        assert node.volume_pool.total_bytes > node.volume_pool.free_bytes > 0
        listed = await caller.volumes.ListVolumes(volume_service_pb2.ListVolumesRequest())
        assert not listed.volumes


NAME = "n" * 199
# With the folder of a store before it, the path of the file is longer than PATH_MAX.
PLANT_DEEP = f"""
import os
os.chdir("/data")
for number in range(20):
    os.mkdir("{NAME}")
    os.chdir("{NAME}")
    os.utime(".", (number, number))
open("file", "w").write("at the bottom")
"""
LOOK_DEEP = f"""
import os
os.chdir("/data")
for _ in range(20):
    os.chdir("{NAME}")
    print(os.stat(".").st_mtime_ns, os.listdir("."))
print(open("file").read())
"""


@pytest.mark.deep
@pytest.mark.usefixtures("detached")
async def test_a_volume_with_deep_folders_is_shrunk_by_copy(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--volume-backend", "loop", "--volume-filesystem", "xfs")
    async with Caller(daemon.target) as caller:
        await caller.create_volume("data", 2 * SIZE)
        await caller.create("one", image=GLIBC, mounts=[mount("data")])
        await caller.shell("one", f"python3 -c '{PLANT_DEEP}'")
        files = await caller.shell("one", f"python3 -c '{LOOK_DEEP}'")
        assert files.count(NAME) == 19
        assert files.endswith("at the bottom\n")
        shrunk = await caller.resize_volume("data", SIZE)
        assert "exchange" in shrunk.snapshots[-1].plan.stages, "it was shrunk in place"
        assert abs(await df_size(caller, "one") - SIZE) < SIZE // 50
        assert await caller.shell("one", f"python3 -c '{LOOK_DEEP}'") == files
        await caller.delete_all()


@pytest.mark.deep
@pytest.mark.usefixtures("detached")
async def test_loops_come_back_after_a_reboot(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--volume-backend", "loop")
    async with Caller(daemon.target) as caller:
        await caller.create_volume("data", SIZE)
        await caller.create("one", mounts=[mount("data")])
        await caller.shell("one", PLANT)
        files = await caller.shell("one", LOOK)
        await caller.stop("one")
    assert await asyncio.to_thread(daemon.stop) == 0, daemon.log_text
    # What a reboot does to loop devices. The unit attaches them before the engine starts, without a daemon.
    detach_loop_devices(daemons.rig.folder)
    assert not loop_devices_below(daemons.rig.folder)
    words = [sys.executable, "-m", "gpudock_server", "--attach-volumes", "--state-dir", str(daemon.state_dir)]
    attaching = await asyncio.create_subprocess_exec(*words)
    assert await attaching.wait() == 0
    assert len(loop_devices_below(daemons.rig.folder)) == 1
    # And so does a daemon that starts without that.
    detach_loop_devices(daemons.rig.folder)
    daemon = await daemons.start("--volume-backend", "loop", after=daemon)
    async with Caller(daemon.target) as caller:
        await caller.start("one")
        assert await caller.shell("one", LOOK) == files
        assert abs(await df_size(caller, "one") - SIZE) < SIZE // 50
        await caller.delete_all()
    assert not loop_devices_below(daemons.rig.folder)
