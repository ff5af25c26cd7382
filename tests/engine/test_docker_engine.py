"""DockerEngine on a real engine: create, start, stop, pause, limits, remove."""

from __future__ import annotations

import asyncio
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.errors import (
    EngineRejected,
    EngineUnavailable,
    PortInUse,
    StartFailed,
)
from gpudock_server.model.container import PortBinding
from gpudock_server.model.engine import (
    EngineState,
)
from gpudock_server.model.spec import (
    HealthCheck,
    Mount,
    Protocol,
    RestartPolicy,
    RestartPolicyKind,
    TmpfsMount,
)

from tests.engine.conditions import until_true
from tests.engine.docker_fixtures import (
    connect_engine,
    connections_in_use,
    direct_engine,
    engine,
    labels_without_spec,
    run_shell,
)
from tests.engine.engine_examples import engine_spec, inspect_container, start_container
from tests.rig import CUDA_LIKE, EngineProxy, Rig
from tests.rig.patience import limit

__all__ = ["direct_engine", "engine"]

MIB = 1 << 20


async def test_info_describes_the_engine_and_its_host(engine: DockerEngine, rig: Rig) -> None:
    info = await engine.info()
    assert info.version
    assert info.storage_driver == "overlay2"
    assert info.root_dir == str(rig.engine.data_root)
    assert info.cpus > 0
    assert info.memory_bytes > 100 * MIB
    assert tuple(int(part) for part in info.api_version.split(".")) >= (1, 40)


@pytest.mark.parametrize("name", ["../containers/json", "..", ""])
async def test_an_invalid_volume_name_is_refused(engine: DockerEngine, name: str) -> None:
    with pytest.raises(EngineRejected, match="is not a valid name or id"):
        await engine.inspect_volume(name)


async def test_a_container_has_all_fields_of_its_spec(engine: DockerEngine, rig: Rig, tmp_path: Path) -> None:
    gpus = tuple(rig.gpus.uuids[2:4])
    rig.engine.call("POST", "/volumes/create", send={"Name": "v1"})
    box = await start_container(
        engine,
        gpus=gpus,
        image=CUDA_LIKE,
        ports=(
            PortBinding(container_port=80, host_port=18080),
            PortBinding(container_port=53, protocol=Protocol.UDP, host_port=15353),
        ),
        env={"A": "b=c", "NVIDIA_VISIBLE_DEVICES": "all"},
        working_dir="/tmp",
        user="0:7",
        cpus=0.5,
        memory_bytes=64 * MIB,
        shm_size_bytes=32 * MIB,
        mounts=(
            Mount(volume="v1", target="/v"),
            Mount(host_path="/srv/h", target="/h", read_only=True),
            Mount(tmpfs=TmpfsMount(size_bytes=MIB), target="/t"),
        ),
        bound={"/srv/h": str(tmp_path)},
        labels={"team": "x"},
        restart_policy=RestartPolicy(kind=RestartPolicyKind.ALWAYS),
        stop_timeout=timedelta(seconds=3),
        health_check=HealthCheck(command=("true",), interval=timedelta(seconds=1)),
    )
    container = await inspect_container(engine, "box")
    assert container == await inspect_container(engine, box)
    assert container.state is EngineState.RUNNING
    assert container.running
    assert container.gpu_uuids == gpus
    assert labels_without_spec(container.labels) == {
        "team": "x",
        "gpudock.uid": "uid-box",
        "gpudock.name": "box",
        "gpudock.operation": "op1",
    }
    assert container.volumes["/v"] == "v1"
    assert set(container.volumes) == {"/v", "/data"}
    assert container.binds == {"/h": str(tmp_path)}
    assert (container.cpus, container.memory_bytes) == (0.5, 64 * MIB)
    assert await asyncio.to_thread(Path(container.upper_dir).is_dir)
    assert container.storage_driver == "overlay2"
    assert container.start_time is not None
    assert container.finish_time is None
    assert container.health in ("starting", "healthy")

    shown = rig.engine.call("GET", "/containers/box/json")
    assert shown["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    assert shown["HostConfig"]["Privileged"] is False
    assert shown["Config"]["StopTimeout"] == 3

    output = await run_shell(
        rig, "box", "echo $A $NVIDIA_VISIBLE_DEVICES; pwd; id -g; hostname; ls /dev | grep 'nvidia[0-9]'"
    )
    assert output.split() == ["b=c", ",".join(gpus), "/tmp", "7", "box", "nvidia2", "nvidia3"]
    output = await run_shell(
        rig, "box", "df -m /dev/shm /t | tail -n +2 | tr -s ' ' | cut -d' ' -f2; cat /data/from-image"
    )
    assert output == "32\n1\nfrom the image\n"
    output = await run_shell(rig, "box", "mknod /tmp/x c 195 0; touch /h/x; nproc >/dev/null")
    assert "Operation not permitted" in output
    assert "Read-only" in output


async def test_a_variable_of_the_image_cannot_add_gpus(engine: DockerEngine, rig: Rig) -> None:
    await start_container(engine, image=CUDA_LIKE)
    output = await run_shell(rig, "box", "echo $NVIDIA_VISIBLE_DEVICES; ls /dev | grep -c nvidia")
    assert output.split() == ["void", "0"]


async def test_a_reused_anonymous_volume_is_not_filled_from_the_image(engine: DockerEngine, rig: Rig) -> None:
    first = await start_container(engine, "first", image=CUDA_LIKE)
    volumes = (await inspect_container(engine, first)).volumes
    await run_shell(rig, "first", "rm /data/from-image")
    await engine.remove(first)
    second = await start_container(engine, "second", image=CUDA_LIKE, volumes=volumes)
    assert (await inspect_container(engine, second)).volumes == volumes
    assert await run_shell(rig, "second", "ls /data") == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": ("/nope",)}, "no such file"),
        ({"command": ("true",), "user": "absent"}, "absent"),
        ({"gpus": ("GPU-unknown",)}, "GPU-unknown"),
    ],
)
async def test_a_container_that_cannot_start_reports_why(
    engine: DockerEngine, options: dict[str, Any], message: str
) -> None:
    box = await engine.create(await engine_spec(engine, **options))
    # The first start leaves nothing, so that the second one fails in the same way.
    for _ in range(2):
        with pytest.raises(StartFailed, match=message) as failed:
            await engine.start(box)
        assert failed.value.container == "box"
        assert not (await inspect_container(engine, box)).running
    await engine.remove(box)


async def test_a_port_of_another_container_is_reported_at_start(engine: DockerEngine) -> None:
    port = PortBinding(container_port=80, protocol=Protocol.UDP, host_port=18081)
    await start_container(engine, "first", ports=(port,))
    second = await engine.create(await engine_spec(engine, "second", ports=(port,)))
    with pytest.raises(PortInUse) as taken:
        await engine.start(second)
    assert (taken.value.host_port, taken.value.protocol) == (18081, "udp")


async def test_a_port_of_another_program_is_reported_at_start(engine: DockerEngine, rig: Rig) -> None:
    script = "import socket,sys; s=socket.create_server(('127.0.0.1',18082)); print(1,flush=True); sys.stdin.read()"
    listener = await asyncio.create_subprocess_exec(
        *rig.namespaces.enter(),
        sys.executable,
        "-c",
        script,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert listener.stdin is not None
    assert listener.stdout is not None
    await listener.stdout.readline()
    box = await engine.create(
        await engine_spec(engine, ports=(PortBinding(container_port=80, host_port=18082),), stop_timeout=timedelta(0))
    )
    with pytest.raises(PortInUse) as taken:
        await engine.start(box)
    assert (taken.value.host_port, taken.value.protocol) == (18082, "tcp")
    listener.stdin.close()
    await listener.wait()
    await engine.start(box)


@pytest.mark.deep
async def test_many_concurrent_starts_succeed(engine: DockerEngine) -> None:
    boxes = [await engine.create(await engine_spec(engine, f"box{number}")) for number in range(12)]
    await asyncio.gather(*(engine.start(box) for box in boxes))
    found = await engine.find({"gpudock.operation": "op1"})
    assert {container.id for container in found if container.running} == set(boxes)


async def test_four_starts_run_at_once_and_others_wait(engine_proxy: EngineProxy) -> None:
    async with connect_engine(engine_proxy.url, timeout=limit(20)) as engine:
        boxes = [await engine.create(await engine_spec(engine, f"box{number}")) for number in range(6)]
        engine_proxy.faults.hang("POST", ".*/start", times=None)
        starting = [asyncio.create_task(engine.start(box)) for box in boxes]

        def start_requests() -> int:
            return sum(request.path.endswith("/start") for request in engine_proxy.requests)

        await until_true(lambda: start_requests() == 4, "four starts have begun")
        await engine.info()
        assert start_requests() == 4
        starting[0].cancel()
        await until_true(lambda: start_requests() == 5, "the fifth start has begun")
        engine_proxy.faults.clear()
        await asyncio.gather(*starting[1:])


@pytest.mark.parametrize("kind", ["container", "shadow"])
async def test_a_cancelled_create_waits_so_that_its_container_is_found(
    direct_engine: DockerEngine, engine_proxy: EngineProxy, kind: str
) -> None:
    async with connect_engine(engine_proxy.url, timeout=limit(20)) as engine:
        spec = await engine_spec(direct_engine)
        if kind == "shadow":
            of, name = await direct_engine.create(spec), f"{spec.name}-shadow"
        else:
            of, name = "", spec.name
        hang = engine_proxy.faults.hang("POST", ".*/create")
        create = engine.create_file_holder(of, name, spec.labels) if kind == "shadow" else engine.create(spec)
        creating = asyncio.create_task(create)
        await hang.hit.wait()
        creating.cancel()
        await asyncio.wait((creating,), timeout=0.2)
        assert not creating.done(), "the create was abandoned while the engine works on it"
        hang.release()
        with pytest.raises(asyncio.CancelledError):
            await creating
        assert await direct_engine.inspect(name) is not None
        assert connections_in_use(engine) == 0


async def test_stop_lets_a_process_handle_the_signal(engine: DockerEngine) -> None:
    box = await start_container(engine)
    await engine.stop(box, 10)
    container = await inspect_container(engine, box)
    assert (container.state, container.exit_code) == (EngineState.EXITED, 0)
    assert container.finish_time is not None


async def test_stop_without_a_timeout_kills_and_may_be_repeated(engine: DockerEngine) -> None:
    box = await start_container(engine)
    await engine.stop(box, 0)
    assert (await inspect_container(engine, box)).exit_code == 137
    await engine.stop(box, 0)
    await engine.stop("nonesuch", 0)


async def test_stop_kills_after_its_timeout_and_ends_a_paused_container(engine: DockerEngine) -> None:
    # With the container's own stop timeout instead of that of the call, a stop would take ten minutes.
    stop_timeout = timedelta(minutes=10)
    stubborn = await start_container(engine, "stubborn", command=("sleep", "1000"), stop_timeout=stop_timeout)
    begun = time.monotonic()
    async with asyncio.timeout(limit(30)):
        await engine.stop(stubborn, 0.5)
    assert time.monotonic() - begun > 0.9
    assert (await inspect_container(engine, stubborn)).exit_code == 137
    await engine.start(stubborn)
    async with asyncio.timeout(limit(30)):
        await engine.stop(stubborn, 0)
    assert (await inspect_container(engine, stubborn)).exit_code == 137
    frozen = await start_container(engine, "frozen")
    await engine.pause(frozen)
    await engine.stop(frozen, 1)
    assert not (await inspect_container(engine, frozen)).running


@pytest.mark.parametrize("times", [3, None])
async def test_a_pause_that_the_runtime_refuses_is_retried(
    direct_engine: DockerEngine, engine_proxy: EngineProxy, times: int | None
) -> None:
    message = "Cannot pause container: OCI runtime pause failed: unable to freeze: unknown"
    box = await start_container(direct_engine)
    async with connect_engine(engine_proxy.url, timeout=limit(20)) as engine:
        engine_proxy.faults.fail("POST", ".*/pause", message=message, times=times)
        if times is None:
            with pytest.raises(EngineRejected, match="unable to freeze"):
                await engine.pause(box)
        else:
            await engine.pause(box)
    paused = sum(request.path.endswith("/pause") for request in engine_proxy.requests)
    assert (paused, (await inspect_container(direct_engine, box)).state) == (
        4,
        EngineState.RUNNING if times is None else EngineState.PAUSED,
    )


async def test_exited_within_returns_when_the_process_exits(engine: DockerEngine) -> None:
    box = await start_container(engine, command=("sh", "-c", "until [ -e /tmp/go ]; do sleep 0.01; done; exit 7"))
    assert await engine.exited_within(box, 0.1) is None
    waiting = asyncio.create_task(engine.exited_within(box, 20))
    pid = (await inspect_container(engine, box)).pid
    await asyncio.to_thread(Path(f"/proc/{pid}/root/tmp/go").touch)
    assert await waiting == 7


async def test_concurrent_removals_of_one_container_all_succeed(engine: DockerEngine, rig: Rig) -> None:
    box = await start_container(engine, image=CUDA_LIKE)
    volume = (await inspect_container(engine, box)).volumes["/data"]
    await asyncio.gather(*(engine.remove(box) for _ in range(8)))
    assert await engine.inspect(box) is None
    await engine.remove(box)
    assert await engine.inspect_volume(volume), "the removal deleted the volume"
    assert rig.engine.call("GET", "/containers/json", query={"all": "1"}) == []


async def test_remove_waits_for_a_removal_that_is_in_progress(
    direct_engine: DockerEngine, engine_proxy: EngineProxy, rig: Rig
) -> None:
    async with connect_engine(engine_proxy.url, timeout=limit(3)) as engine:
        box = await start_container(direct_engine)
        already = "removal of container box is already in progress"
        engine_proxy.faults.fail("DELETE", "/containers/.*", status=409, message=already)
        removing = asyncio.create_task(engine.remove(box))
        await until_true(lambda: engine_proxy.requests[-1].path.endswith("/wait"), "the removal is waited for")
        assert not removing.done()
        await asyncio.to_thread(rig.engine.call, "DELETE", f"/containers/{box}", query={"force": "1"})
        await removing

        box = await start_container(direct_engine)
        engine_proxy.faults.fail("DELETE", "/containers/.*", status=409, message=already)
        # The other removal never happens, so that the wait times out.
        with pytest.raises(EngineUnavailable):
            await engine.remove(box)


async def test_update_changes_the_limits_of_the_kernel(engine: DockerEngine, rig: Rig) -> None:
    box = await start_container(engine, memory_bytes=64 * MIB, cpus=0.5)
    info = await engine.info()
    pid = (await inspect_container(engine, box)).pid

    def limits() -> tuple[float, int]:
        return _cgroup_limits(pid)

    assert limits() == (0.5, 64 * MIB)
    await engine.update(box, cpus=1.5, memory_bytes=256 * MIB)
    assert limits() == (1.5, 256 * MIB)
    await engine.update(box, cpus=0.25, memory_bytes=32 * MIB)
    assert limits() == (0.25, 32 * MIB)
    with pytest.raises(EngineRejected):
        await engine.update(box, cpus=1, memory_bytes=1)
    assert limits() == (0.25, 32 * MIB)
    await engine.update(box, cpus=0, memory_bytes=0)
    cpus, memory = limits()
    assert cpus == info.cpus
    # The kernel rounds to pages.
    assert info.memory_bytes - memory < 1 << 16
    container = await inspect_container(engine, box)
    assert (container.cpus, container.memory_bytes) == (info.cpus, info.memory_bytes)
    assert container.pid == pid
    with pytest.raises(EngineRejected):
        await engine.update("nonesuch", cpus=1, memory_bytes=0)
    assert rig.engine.call("GET", "/containers/box/json")["RestartCount"] == 0


def _cgroup_limits(pid: int) -> tuple[float, int]:
    """The CPUs, and the memory in bytes, that the cgroup (v1 or v2) of a process may use."""
    groups = dict(line.split(":", 2)[1:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines())
    root = Path("/sys/fs/cgroup")
    if memory := groups.get("memory"):
        cpu = root / "cpu" / groups["cpu,cpuacct" if "cpu,cpuacct" in groups else "cpu"].lstrip("/")
        quota, period = ((cpu / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        limit = (root / "memory" / memory.lstrip("/") / "memory.limit_in_bytes").read_text()
    else:
        group = root / groups[""].lstrip("/")
        quota, period = (group / "cpu.max").read_text().split()
        limit = (group / "memory.max").read_text()
    return int(quota) / int(period), int(limit)


async def test_a_memory_limit_below_the_use_is_refused_and_changes_nothing(engine: DockerEngine, rig: Rig) -> None:
    box = await start_container(
        engine, memory_bytes=256 * MIB, cpus=1, mounts=(Mount(tmpfs=TmpfsMount(), target="/t"),)
    )
    await run_shell(rig, "box", "head -c 100000000 /dev/zero > /t/held")
    with pytest.raises(EngineRejected):
        await engine.update(box, cpus=2, memory_bytes=16 * MIB)
    container = await inspect_container(engine, box)
    assert (container.cpus, container.memory_bytes) == (1, 256 * MIB)
    assert _cgroup_limits(container.pid) == (1, 256 * MIB)
