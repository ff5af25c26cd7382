"""Containers from create to delete, on a real engine and a real etcd."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import grpc
import pytest
from google.protobuf import duration_pb2
from gpudock.v1 import container_pb2, container_service_pb2, operation_service_pb2

from tests.calls import IMAGE, Caller, failure, failure_of, progress_of, result_of, scale_request
from tests.rig import CUDA_LIKE, HttpStatusError, Rig
from tests.rig.patience import limit

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
STOPPED = container_pb2.CONTAINER_STATE_STOPPED
PAUSED = container_pb2.CONTAINER_STATE_PAUSED
EXITED = container_pb2.CONTAINER_STATE_EXITED

WRITE_FILES = "mkdir -p /work && echo kept > /work/file && rm -f /etc/group && ln /work/file /work/link"
CHECK_FILES = "cat /work/file; test ! -e /etc/group && stat -c %h /work/file"


async def gpu_device_count(caller: Caller, name: str) -> int:
    """The number of GPU devices in a container."""
    return int(await caller.shell(name, "ls /dev | grep -c '^nvidia[0-9]' || true"))


async def test_a_container_keeps_its_files_and_port_while_its_gpus_change(caller: Caller, rig: Rig) -> None:
    port = container_pb2.PortRequest(container_port=80)
    container = await caller.create("main", 2, ports=[port])
    assert container.status.state == RUNNING
    assert len(container.status.gpu_uuids) == 2
    assert await gpu_device_count(caller, "main") == 2
    first_port = container.status.ports[0].host_port
    await caller.shell("main", WRITE_FILES)

    first = list(container.status.gpu_uuids)
    for count in (4, 2, 0, 1, 8, 3):
        container = await caller.scale("main", count)
        assert container.status.state == RUNNING
        assert len(container.status.gpu_uuids) == count
        assert await gpu_device_count(caller, "main") == count
        assert await caller.shell("main", CHECK_FILES) == "kept\n2\n"
        assert container.status.ports[0].host_port == first_port
        if count in (4, 2):
            assert list(container.status.gpu_uuids)[:2] == first, "a kept GPU was replaced"
    assert container.revision == 7
    assert await caller.free_gpus() == 5
    assert len(rig.engine.call("GET", "/containers/json?all=1")) == 1, "an old engine container is left"

    stopped = await caller.stop("main")
    assert stopped.status.state == STOPPED
    assert not stopped.status.holds_resources
    assert await caller.free_gpus() == 8
    started = await caller.start("main")
    assert started.status.state == RUNNING
    assert len(started.status.gpu_uuids) == 3
    assert await caller.shell("main", CHECK_FILES) == "kept\n2\n"

    await caller.delete("main")
    assert await caller.free_gpus() == 8
    assert rig.engine.call("GET", "/containers/json?all=1") == []
    missing = await failure(caller.get("main"))
    assert (missing.code, missing.reason) == (grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND")


async def test_a_restarted_container_keeps_its_files_with_the_same_and_with_other_gpus(caller: Caller) -> None:
    await caller.create("box", 2)
    await caller.shell("box", WRITE_FILES)
    before = (await caller.get("box")).status.gpu_uuids
    for gpus in (None, None, 1, 0, 4):
        await caller.stop("box")
        started = await caller.start("box", gpus)
        assert await caller.shell("box", CHECK_FILES) == "kept\n2\n"
        if gpus is None:
            assert started.status.gpu_uuids == before
        else:
            assert await gpu_device_count(caller, "box") == gpus


async def test_a_start_gets_other_gpus_if_its_own_are_claimed(caller: Caller) -> None:
    first = await caller.create("first", 4)
    await caller.shell("first", WRITE_FILES)
    await caller.stop("first")
    await caller.create("second")
    second = await caller.scale("second", 4)
    assert set(second.status.gpu_uuids) == set(first.status.gpu_uuids)
    started = await caller.start("first")
    assert not set(started.status.gpu_uuids) & set(second.status.gpu_uuids)
    assert await caller.shell("first", CHECK_FILES) == "kept\n2\n"
    await caller.stop("first")
    await caller.scale("second", 6)
    refused = await failure(caller.start("first"))
    assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "GPU_EXHAUSTED")
    assert refused.metadata["free"] == "2"


async def test_a_stop_with_keep_resources_keeps_the_gpus_claimed(caller: Caller) -> None:
    await caller.create("holder", 8)
    stopped = await caller.stop("holder", keep_resources=True)
    assert stopped.status.holds_resources
    assert (await failure(caller.create("other", 1))).reason == "GPU_EXHAUSTED"
    assert (await caller.stop("holder")).status.holds_resources is False
    assert (await caller.create("other", 1)).status.state == RUNNING


async def test_restart_keeps_claims(caller: Caller) -> None:
    before = await caller.create("box", 3)
    await caller.shell("box", WRITE_FILES)
    after = await caller.restart("box")
    assert after.status.gpu_uuids == before.status.gpu_uuids
    assert after.status.engine_id == before.status.engine_id
    assert after.status.start_time.ToDatetime() > before.status.start_time.ToDatetime()
    assert await caller.shell("box", CHECK_FILES) == "kept\n2\n"
    assert await caller.free_gpus() == 5


async def test_pause_and_unpause(caller: Caller) -> None:
    await caller.create("paused", 1)
    pause = container_service_pb2.PauseContainerRequest(name="paused")
    unpause = container_service_pb2.UnpauseContainerRequest(name="paused")
    paused = (await caller.containers.PauseContainer(pause)).container
    assert paused.status.state == PAUSED
    assert paused.status.holds_resources
    assert (await failure(caller.containers.PauseContainer(pause))).reason == "CONTAINER_PAUSED"
    assert (await failure(caller.scale("paused", 2))).reason == "CONTAINER_PAUSED"
    assert (await failure(caller.run("paused", "true"))).reason == "CONTAINER_PAUSED"
    unpaused = (await caller.containers.UnpauseContainer(unpause)).container
    assert unpaused.status.state == RUNNING
    assert (await failure(caller.containers.UnpauseContainer(unpause))).reason == "CONTAINER_NOT_PAUSED"


async def test_limits_change_in_place(caller: Caller) -> None:
    before = await caller.create("limits", 1, cpus=0.5, memory_bytes=64 << 20)
    pid = await caller.shell("limits", "cat /proc/1/stat | cut -d' ' -f22")
    progress = await progress_of(
        caller.containers.ScaleContainer(scale_request("limits", cpus=1.0, memory_bytes=128 << 20))
    )
    after = progress.result
    assert after is not None
    assert after.status.engine_id == before.status.engine_id
    assert await caller.shell("limits", "cat /proc/1/stat | cut -d' ' -f22") == pid, "the process was restarted"
    assert "limits" in progress.stages
    read_limit = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup/memory.max"
    assert int(await caller.shell("limits", read_limit)) == 128 << 20


async def test_a_live_scale_that_needs_a_restart_is_refused(caller: Caller) -> None:
    await caller.create("live", 1)
    request = scale_request("live", 2, strategy=container_service_pb2.SCALE_STRATEGY_LIVE)
    refused = await failure(result_of(caller.containers.ScaleContainer(request)))
    assert refused.reason == "RESTART_REQUIRED"
    assert refused.metadata["changes"] == "gpus"


async def test_a_change_of_shm_replaces_the_engine_container_and_keeps_files(caller: Caller) -> None:
    await caller.create("shm", 1)
    await caller.shell("shm", WRITE_FILES)
    after = await caller.scale("shm", shm_size_bytes=128 << 20)
    assert await caller.shell("shm", "df -k /dev/shm | tail -1 | awk '{print $2}'") == f"{128 << 10}\n"
    assert await caller.shell("shm", CHECK_FILES) == "kept\n2\n"
    assert after.spec.shm_size_bytes == 128 << 20


async def test_an_anonymous_volume_is_kept_by_a_scale_and_deleted_with_the_container(caller: Caller, rig: Rig) -> None:
    await caller.create("declared", 1, image=CUDA_LIKE)
    await caller.shell("declared", "echo mine > /data/file")
    await caller.scale("declared", 2)
    assert await caller.shell("declared", "cat /data/file") == "mine\n"
    await caller.delete("declared")
    assert not rig.engine.call("GET", "/volumes")["Volumes"]


@pytest.mark.parametrize("gpus", [0, 1])
async def test_a_container_cannot_use_gpus_that_it_did_not_claim(caller: Caller, gpus: int) -> None:
    await caller.create("box", gpus, image=CUDA_LIKE, env={"NVIDIA_VISIBLE_DEVICES": "all"})
    assert await gpu_device_count(caller, "box") == gpus
    mknod = await caller.run("box", "mknod", "/dev/nvidia7", "c", "195", "7")
    assert mknod.code != 0
    assert await gpu_device_count(caller, "box") == gpus


async def test_no_switch_of_the_toolkit_is_on(caller: Caller, rig: Rig) -> None:
    switches = ("GDS", "MOFED", "GDRCOPY", "NVSWITCH", "IMEX_CHANNELS", "MIG_CONFIG_DEVICES", "MIG_MONITOR_DEVICES")
    values = {f"NVIDIA_{name}": "all" if "_" in name else "enabled" for name in switches}
    image = "gpudock/switches:test"
    rig.images.derive(image, changes=[f"ENV {name}={value}" for name, value in values.items()])
    spec_env = {name: value for name, value in values.items() if name not in {"NVIDIA_GDS", "NVIDIA_IMEX_CHANNELS"}}
    try:
        await caller.create("box", 1, image=image, env=spec_env)
        output = await caller.shell("box", "env | grep ^NVIDIA_")
        env = dict(line.split("=", 1) for line in output.splitlines())
        assert env.pop("NVIDIA_VISIBLE_DEVICES").startswith("GPU-")
        assert env == {name: "disabled" if value == "enabled" else "" for name, value in values.items()}
        # A committed image has the switches of its base image, and they are off in a container of it.
        commit = container_service_pb2.CommitContainerRequest(
            name="box", repository="gpudock/switches", tag="committed"
        )
        await progress_of(caller.containers.CommitContainer(commit))
        config = rig.engine.call("GET", "/images/gpudock/switches:committed/json")["Config"]
        assert dict(line.split("=", 1) for line in config["Env"] if line.startswith("NVIDIA_")) == values
        await caller.create("second", image="gpudock/switches:committed")
        assert "enabled" not in await caller.shell("second", "env | grep ^NVIDIA_")
        assert "all" not in await caller.shell("second", "env | grep ^NVIDIA_")
    finally:
        await caller.delete_all()
        for tag in ("committed", "test"):
            with contextlib.suppress(HttpStatusError):
                rig.engine.call("DELETE", f"/images/gpudock/switches:{tag}")


@pytest.mark.deep
async def test_a_hundred_concurrent_creates_allocate_each_gpu_once(caller: Caller) -> None:
    async def create(number: int) -> str:
        try:
            await caller.create(f"box-{number}", 1)
        except grpc.aio.AioRpcError as error:
            refused = failure_of(error)
            assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refused.reason == "GPU_EXHAUSTED"
            assert refused.metadata["free"] == "0"
            return ""
        return f"box-{number}"

    created = [name for name in await asyncio.gather(*(create(number) for number in range(100))) if name]
    assert len(created) == 8
    holders = await caller.holders()
    assert sorted(holders.values()) == sorted(created)
    for name in created:
        await caller.delete(name)
    assert await caller.free_gpus() == 8


async def test_a_repeated_request_id_creates_one_container(caller: Caller) -> None:
    request = container_service_pb2.CreateContainerRequest(
        name="once", spec=caller.spec(1), request_id=str(uuid.uuid4())
    )
    first, second = await asyncio.gather(
        result_of(caller.containers.CreateContainer(request)), result_of(caller.containers.CreateContainer(request))
    )
    assert first == second
    assert await caller.free_gpus() == 7
    other = container_service_pb2.CreateContainerRequest()
    other.CopyFrom(request)
    other.spec.gpus.count = 2
    reused = await failure(result_of(caller.containers.CreateContainer(other)))
    assert (reused.code, reused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")


async def test_a_stale_etag_changes_nothing(caller: Caller) -> None:
    created = await caller.create("tagged", 1)
    await caller.scale("tagged", 2)
    request = scale_request("tagged", 3, etag=created.etag)
    stale = await failure(result_of(caller.containers.ScaleContainer(request)))
    assert (stale.code, stale.reason) == (grpc.StatusCode.ABORTED, "STALE_ETAG")
    assert len((await caller.get("tagged")).status.gpu_uuids) == 2


async def test_validate_only_returns_a_plan_and_changes_nothing(caller: Caller) -> None:
    await caller.create("plan", 2)
    progress = await progress_of(caller.containers.ScaleContainer(scale_request("plan", 3, validate_only=True)))
    (planned,) = progress.snapshots
    assert progress.result is None
    assert planned.plan.restarts_process
    assert planned.plan.gpus_to_claim == 1
    assert list(planned.plan.stages) == [
        "create", "locate", "gather", "stop", "complete", "carry", "start", "verify", "seal", "commit", "retire",
    ]  # fmt: skip
    assert await caller.free_gpus() == 6


async def test_two_operations_on_one_container_never_run_together(caller: Caller) -> None:
    stop_timeout = duration_pb2.Duration()
    stop_timeout.FromMilliseconds(int(limit(1) * 1000))
    command = ("sh", "-c", "trap '' TERM; while :; do sleep 1; done")
    await caller.create("busy", 1, command=command, stop_timeout=stop_timeout)
    stream = caller.containers.ScaleContainer(scale_request("busy", 2))
    first = await anext(aiter(stream))
    refused = await failure(caller.scale("busy", 3))
    assert (refused.code, refused.reason) == (grpc.StatusCode.ABORTED, "CONTAINER_BUSY")
    assert refused.metadata["operation_id"] == first.operation.id
    assert (await caller.get("busy")).status.operation_id == first.operation.id
    await progress_of(stream)


async def test_a_disconnect_does_not_cancel_the_operation(caller: Caller) -> None:
    await caller.create("box", 1)
    stream = caller.containers.ScaleContainer(scale_request("box", 2))
    operation = (await anext(aiter(stream))).operation
    stream.cancel()
    watch = caller.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation.id))
    last = None
    async for response in watch:
        last = response
    assert last is not None
    assert len((await caller.get("box")).status.gpu_uuids) == 2


async def test_an_exit_changes_the_state_and_keeps_the_gpus(caller: Caller) -> None:
    container = await caller.create("brief", 1, command=("sh", "-c", "sleep 0.3; exit 7"))
    async with asyncio.timeout(limit(30)):
        while container.status.state != EXITED:
            await asyncio.sleep(0.05)
            container = await caller.get("brief")
    assert container.status.exit_code == 7
    assert container.status.holds_resources


async def test_a_create_with_a_missing_image_or_volume_or_a_used_port_or_name_is_refused(caller: Caller) -> None:
    never = container_service_pb2.PULL_POLICY_NEVER
    request = container_service_pb2.CreateContainerRequest(
        name="none", spec=caller.spec(1, image="no/such:image"), pull_policy=never
    )
    missing = await failure(result_of(caller.containers.CreateContainer(request)))
    assert (missing.code, missing.reason) == (grpc.StatusCode.NOT_FOUND, "IMAGE_NOT_FOUND")
    volume = container_pb2.Mount(volume="nope", target="/data")
    assert (await failure(caller.create("none", mounts=[volume]))).reason == "VOLUME_NOT_FOUND"
    path = container_pb2.Mount(host_path="/etc", target="/data")
    assert (await failure(caller.create("none", mounts=[path]))).reason == "HOST_PATH_FORBIDDEN"
    pinned = container_pb2.PortRequest(container_port=80, host_port=20500)
    await caller.create("pinned", ports=[pinned])
    taken = await failure(caller.create("none", ports=[pinned]))
    assert (taken.reason, taken.metadata["host_port"]) == ("PORT_IN_USE", "20500")
    assert (await failure(caller.create("pinned"))).reason == "CONTAINER_EXISTS"
    assert IMAGE in (await caller.get("pinned")).spec.image
