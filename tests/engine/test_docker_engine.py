"""ports.Engine on a real Docker Engine, and on one that fails, hangs and disconnects."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.adapters.host.port_probe import HostPortProbe
from gpudock_server.errors import (
    EngineRejected,
    EngineUnavailable,
    ImagePullFailed,
    PortInUse,
    StartFailed,
)
from gpudock_server.model.container import PortBinding
from gpudock_server.model.engine import (
    EngineEvent,
    EngineEventKind,
    EngineState,
    RegistryAuth,
)
from gpudock_server.model.spec import (
    HealthCheck,
    Mount,
    Protocol,
    RestartPolicy,
    RestartPolicyKind,
    TmpfsMount,
)

from tests.engine.docker_registry import LAYER_BYTES, SECRET, USER, registry
from tests.engine.engine_examples import CUDA_LIKE, IDLE, IMAGE, engine_spec, inspect_container, start_container
from tests.rig import EngineProxy, Rig
from tests.rig.patience import limit

MIB = 1 << 20


@pytest_asyncio.fixture
async def engine(clean_engine: Rig) -> AsyncIterator[DockerEngine]:
    async with connected_to(clean_engine.engine.url, timeout=20) as connected:
        yield connected


@pytest_asyncio.fixture
async def patient(engine: DockerEngine) -> DockerEngine:
    """The engine without a proxy and with a long timeout, for calls that must succeed."""
    return engine


@asynccontextmanager
async def connected_to(url: str, timeout: float) -> AsyncIterator[DockerEngine]:
    """A connected engine; checks at the end that no connection is in use."""
    engine = await DockerEngine.connect(url, timeout=timeout)
    try:
        yield engine
        assert in_use(engine) == 0, "a connection has leaked"
    finally:
        await engine.close()


def own_labels(labels: dict[str, str]) -> dict[str, str]:
    """All but the spec, which each container of ours carries."""
    assert "gpudock.spec" in labels
    return {key: value for key, value in labels.items() if key != "gpudock.spec"}


def in_use(engine: DockerEngine) -> int:
    """The number of connections in use."""
    return sum(len(connector._acquired) for connector in engine._connection._connectors)


async def shell(rig: Rig, name: str, script: str) -> str:
    """The combined output of a command inside a container, without DockerExecSession."""
    return await asyncio.to_thread(_shell, rig, name, script)


def _shell(rig: Rig, name: str, script: str) -> str:
    command = ["sh", "-c", f"({script}) > /dev/shm/said 2>&1; echo > /dev/shm/done"]
    made = rig.engine.call("POST", f"/containers/{name}/exec", send={"Cmd": command})
    rig.engine.call("POST", f"/exec/{made['Id']}/start", send={"Detach": True})
    memory = Path(f"/proc/{rig.engine.call('GET', f'/containers/{name}/json')['State']['Pid']}/root/dev/shm")
    deadline = time.monotonic() + limit(30)
    while not (memory / "done").exists():
        assert time.monotonic() < deadline, f"{script!r} does not end in {name}"
        time.sleep(0.005)
    (memory / "done").unlink()
    return (memory / "said").read_text()


async def until(true: Callable[[], bool]) -> None:
    """Wait until `true` returns something true; limited by the test's timeout."""
    while not true():
        await asyncio.sleep(0.005)


async def next_of(stream: AsyncIterator[EngineEvent]) -> EngineEvent:
    return await anext(stream)


async def close(stream: AsyncIterator[EngineEvent]) -> None:
    await stream.aclose()  # type: ignore[attr-defined]  # an async generator, which the protocol does not promise


# ---- the engine itself, images, volumes ----


async def test_info(engine: DockerEngine, rig: Rig) -> None:
    info = await engine.info()
    assert info.version
    assert info.storage_driver == "overlay2"
    assert info.root_dir == str(rig.engine.data_root)
    assert info.cpus > 0
    assert info.memory_bytes > 100 * MIB
    assert tuple(int(part) for part in info.api_version.split(".")) >= (1, 40)


async def test_images(engine: DockerEngine) -> None:
    image = await engine.image(CUDA_LIKE)
    assert image is not None
    assert "NVIDIA_VISIBLE_DEVICES=all" in image.env
    assert image.volumes == ("/data",)
    assert image.size_bytes > 0


@pytest.mark.parametrize(
    "reference", ["nonesuch", "nonesuch:x", "UPPER", "../containers", "a/../../info", "", "a?b", "a b", "a//b", "ü"]
)
async def test_no_image(engine: DockerEngine, reference: str) -> None:
    assert await engine.image(reference) is None


@pytest.mark.parametrize("name", ["../containers/json", "..", ""])
async def test_what_cannot_name_a_volume(engine: DockerEngine, name: str) -> None:
    with pytest.raises(EngineRejected, match="is not a valid name or id"):
        await engine.has_volume(name)


# ---- create ----


async def test_a_container_is_what_was_asked(engine: DockerEngine, rig: Rig, tmp_path: Path) -> None:
    cards = tuple(rig.gpus.uuids[2:4])
    rig.engine.call("POST", "/volumes/create", send={"Name": "v1"})
    box = await start_container(
        engine,
        gpus=cards,
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
    assert container.gpu_uuids == cards
    assert own_labels(container.labels) == {
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

    said = await shell(
        rig, "box", "echo $A $NVIDIA_VISIBLE_DEVICES; pwd; id -g; hostname; ls /dev | grep 'nvidia[0-9]'"
    )
    assert said.split() == ["b=c", ",".join(cards), "/tmp", "7", "box", "nvidia2", "nvidia3"]
    said = await shell(rig, "box", "df -m /dev/shm /t | tail -n +2 | tr -s ' ' | cut -d' ' -f2; cat /data/from-image")
    assert said == "32\n1\nfrom the image\n"
    said = await shell(rig, "box", "mknod /tmp/x c 195 0; touch /h/x; nproc >/dev/null")
    assert "Operation not permitted" in said
    assert "Read-only" in said


async def test_an_image_that_wants_all_cards_gets_none(engine: DockerEngine, rig: Rig) -> None:
    await start_container(engine, image=CUDA_LIKE)
    said = await shell(rig, "box", "echo $NVIDIA_VISIBLE_DEVICES; ls /dev | grep -c nvidia")
    assert said.split() == ["void", "0"]


async def test_a_volume_taken_over_is_not_filled_again(engine: DockerEngine, rig: Rig) -> None:
    first = await start_container(engine, "first", image=CUDA_LIKE)
    volumes = (await inspect_container(engine, first)).volumes
    await shell(rig, "first", "rm /data/from-image")
    await engine.remove(first)
    second = await start_container(engine, "second", image=CUDA_LIKE, volumes=volumes)
    assert (await inspect_container(engine, second)).volumes == volumes
    assert await shell(rig, "second", "ls /data") == ""


# ---- start ----


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"command": ("/nope",)}, "no such file"),
        ({"command": ("true",), "user": "ghost"}, "ghost"),
        ({"gpus": ("GPU-unknown",)}, "GPU-unknown"),
    ],
)
async def test_what_cannot_start(engine: DockerEngine, options: dict[str, Any], says: str) -> None:
    box = await engine.create(await engine_spec(engine, **options))
    # The second try fails in the same way: the first leaves nothing behind.
    for _ in range(2):
        with pytest.raises(StartFailed, match=says) as failed:
            await engine.start(box)
        assert failed.value.container == "box"
        assert not (await inspect_container(engine, box)).running
    await engine.remove(box)


async def test_a_port_that_another_container_has(engine: DockerEngine) -> None:
    port = PortBinding(container_port=80, protocol=Protocol.UDP, host_port=18081)
    await start_container(engine, "first", ports=(port,))
    second = await engine.create(await engine_spec(engine, "second", ports=(port,)))
    with pytest.raises(PortInUse) as taken:
        await engine.start(second)
    assert (taken.value.host_port, taken.value.protocol) == (18081, "udp")


async def test_a_port_that_somebody_else_has(engine: DockerEngine, rig: Rig) -> None:
    """The probe sees it too, from inside the engine's network."""
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
async def test_many_starts_at_once(engine: DockerEngine) -> None:
    boxes = [await engine.create(await engine_spec(engine, f"box{number}")) for number in range(12)]
    await asyncio.gather(*(engine.start(box) for box in boxes))
    found = await engine.find({"gpudock.operation": "op1"})
    assert {container.id for container in found if container.running} == set(boxes)


async def test_starts_take_turns(engine_proxy: EngineProxy) -> None:
    async with connected_to(engine_proxy.url, timeout=20) as engine:
        boxes = [await engine.create(await engine_spec(engine, f"box{number}")) for number in range(6)]
        engine_proxy.faults.hang("POST", ".*/start", times=None)
        starting = [asyncio.create_task(engine.start(box)) for box in boxes]

        def asked() -> int:
            return sum(request.path.endswith("/start") for request in engine_proxy.requests)

        await until(lambda: asked() == 4)
        await engine.info()
        assert asked() == 4
        starting[0].cancel()
        await until(lambda: asked() == 5)
        engine_proxy.faults.clear()
        await asyncio.gather(*starting[1:])


@pytest.mark.parametrize("kind", ["container", "shadow"])
async def test_what_is_created_for_who_was_cancelled_is_found(
    patient: DockerEngine, engine_proxy: EngineProxy, kind: str
) -> None:
    async with connected_to(engine_proxy.url, timeout=20) as engine:
        made = await engine_spec(patient)
        of, name = (await patient.create(made), f"{made.name}-shadow") if kind == "shadow" else ("", made.name)
        hang = engine_proxy.faults.hang("POST", ".*/create")
        work = engine.create_file_holder(of, name, made.labels) if kind == "shadow" else engine.create(made)
        creating = asyncio.create_task(work)
        await hang.hit.wait()
        creating.cancel()
        await asyncio.wait((creating,), timeout=0.2)
        assert not creating.done(), "the engine is at it"
        hang.release()
        with pytest.raises(asyncio.CancelledError):
            await creating
        assert await patient.inspect(name) is not None
        assert in_use(engine) == 0


# ---- stop, pause, wait, remove ----


async def test_stop_lets_a_process_end_by_itself(engine: DockerEngine) -> None:
    box = await start_container(engine)
    await engine.stop(box, 10)
    container = await inspect_container(engine, box)
    assert (container.state, container.exit_code) == (EngineState.EXITED, 0)
    assert container.finish_time is not None


async def test_stop_in_no_time_kills(engine: DockerEngine) -> None:
    """The stop signal was sent all the same, and what hears it ended by it instead."""
    box = await start_container(engine)
    await engine.stop(box, 0)
    assert (await inspect_container(engine, box)).exit_code == 137
    await engine.stop(box, 0)
    await engine.stop("nonesuch", 0)


async def test_stop_of_what_will_not_stop_and_of_what_is_paused(engine: DockerEngine) -> None:
    # Were its own stop timeout used and not that of the call, a stop would take ten minutes.
    patient = timedelta(minutes=10)
    stubborn = await start_container(engine, "stubborn", command=("sleep", "1000"), stop_timeout=patient)
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
async def test_what_cannot_be_frozen_at_once_is_tried_again(
    patient: DockerEngine, engine_proxy: EngineProxy, times: int | None
) -> None:
    message = "Cannot pause container: OCI runtime pause failed: unable to freeze: unknown"
    box = await start_container(patient)
    async with connected_to(engine_proxy.url, timeout=20) as engine:
        engine_proxy.faults.fail("POST", ".*/pause", message=message, times=times)
        if times is None:
            with pytest.raises(EngineRejected, match="unable to freeze"):
                await engine.pause(box)
        else:
            await engine.pause(box)
    paused = sum(request.path.endswith("/pause") for request in engine_proxy.requests)
    assert (paused, (await inspect_container(patient, box)).state) == (
        4,
        EngineState.RUNNING if times is None else EngineState.PAUSED,
    )


async def test_an_exit_is_heard_of_while_it_is_waited_for(engine: DockerEngine) -> None:
    box = await start_container(engine, command=("sh", "-c", "until [ -e /tmp/go ]; do sleep 0.01; done; exit 7"))
    assert await engine.exited_within(box, 0.1) is None
    waiting = asyncio.create_task(engine.exited_within(box, 20))
    pid = (await inspect_container(engine, box)).pid
    await asyncio.to_thread(Path(f"/proc/{pid}/root/tmp/go").touch)
    assert await waiting == 7


async def test_remove_by_many_at_once(engine: DockerEngine, rig: Rig) -> None:
    box = await start_container(engine, image=CUDA_LIKE)
    volume = (await inspect_container(engine, box)).volumes["/data"]
    await asyncio.gather(*(engine.remove(box) for _ in range(8)))
    assert await engine.inspect(box) is None
    await engine.remove(box)
    assert await engine.has_volume(volume), "volumes stay"
    assert rig.engine.call("GET", "/containers/json", query={"all": "1"}) == []


async def test_a_removal_that_another_has_begun(patient: DockerEngine, engine_proxy: EngineProxy, rig: Rig) -> None:
    async with connected_to(engine_proxy.url, timeout=3) as engine:
        box = await start_container(patient)
        already = "removal of container box is already in progress"
        engine_proxy.faults.fail("DELETE", "/containers/.*", status=409, message=already)
        removing = asyncio.create_task(engine.remove(box))
        await until(lambda: engine_proxy.requests[-1].path.endswith("/wait"))
        assert not removing.done()
        await asyncio.to_thread(rig.engine.call, "DELETE", f"/containers/{box}", query={"force": "1"})
        await removing

        box = await start_container(patient)
        engine_proxy.faults.fail("DELETE", "/containers/.*", status=409, message=already)
        with pytest.raises(EngineUnavailable):
            # The other removal does not happen: the wait for it ends.
            await engine.remove(box)


# ---- limits in place ----


async def test_limits_change_in_place_and_for_real(engine: DockerEngine, rig: Rig) -> None:
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
    assert info.memory_bytes - memory < 1 << 16, "the kernel counts in pages"
    container = await inspect_container(engine, box)
    assert (container.cpus, container.memory_bytes) == (info.cpus, info.memory_bytes)
    assert container.pid == pid
    with pytest.raises(EngineRejected):
        await engine.update("nonesuch", cpus=1, memory_bytes=0)
    assert rig.engine.call("GET", "/containers/box/json")["RestartCount"] == 0


def _cgroup_limits(pid: int) -> tuple[float, int]:
    """CPUs and bytes that the kernel grants a process's group, on cgroup v1 or v2."""
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


async def test_less_memory_than_is_in_use_changes_nothing(engine: DockerEngine, rig: Rig) -> None:
    box = await start_container(
        engine, memory_bytes=256 * MIB, cpus=1, mounts=(Mount(tmpfs=TmpfsMount(), target="/t"),)
    )
    await shell(rig, "box", "head -c 100000000 /dev/zero > /t/held")
    with pytest.raises(EngineRejected):
        await engine.update(box, cpus=2, memory_bytes=16 * MIB)
    container = await inspect_container(engine, box)
    assert (container.cpus, container.memory_bytes) == (1, 256 * MIB)
    assert _cgroup_limits(container.pid) == (1, 256 * MIB)


# ---- commit ----


async def test_commit_keeps_files_and_config(engine: DockerEngine, rig: Rig) -> None:
    cards = (rig.gpus.uuids[0],)
    options: dict[str, Any] = {"env": {"A": "b"}, "working_dir": "/tmp", "labels": {"team": "x"}}
    box = await start_container(engine, "box", gpus=cards, **options)
    await shell(rig, "box", "echo kept > /kept; rm /etc/group")
    image_id = await engine.commit(box, "gpudock/layer:op1", {"gpudock.operation": "op9"})
    image = await engine.image("gpudock/layer:op1")
    assert image is not None
    assert image.id == image_id
    assert "A=b" in image.env
    assert "NVIDIA_VISIBLE_DEVICES=void" in image.env
    shown = rig.engine.call("GET", f"/images/{image_id}/json")["Config"]
    assert own_labels(shown["Labels"]) == {
        "team": "x",
        "gpudock.uid": "uid-box",
        "gpudock.name": "box",
        "gpudock.operation": "op9",
    }
    assert shown["Cmd"] == list(IDLE)
    assert shown["WorkingDir"] == "/tmp"

    again = dataclasses.replace(await engine_spec(engine, "again", **options), image_id=image_id)
    await engine.start(await engine.create(again))
    assert await shell(rig, "again", "cat /kept; ls /etc/group 2>&1 | wc -l; cat /etc/group 2>/dev/null") == "kept\n1\n"
    await engine.remove_image("gpudock/layer:op1")
    assert await engine.image(image_id) is not None, "a container is made from it"
    await engine.remove("again")
    await engine.remove_image("gpudock/layer:op1")
    await engine.remove_image(image_id)
    await engine.remove_image("../containers")
    assert await engine.image(image_id) is None
    assert await engine.image(IMAGE) is not None


# ---- find, events ----


async def until_destroyed(events: AsyncIterator[EngineEvent]) -> list[EngineEvent]:
    """The events up to a container's last one, each once: the engine may repeat those at the start of a stream."""
    told: list[EngineEvent] = []
    while not told or told[-1].kind is not EngineEventKind.DESTROY:
        event = await anext(events)
        if event not in told:
            told.append(event)
    return told


async def test_events_and_their_resumption(engine: DockerEngine) -> None:
    begun = time.time_ns()
    box = await start_container(engine)
    stream = engine.events(begun)
    started = await anext(stream)
    assert (started.kind, started.engine_id) == (EngineEventKind.START, box)
    assert own_labels(started.labels) == {"gpudock.uid": "uid-box", "gpudock.name": "box", "gpudock.operation": "op1"}
    await engine.pause(box)
    await engine.unpause(box)
    await engine.update(box, cpus=1, memory_bytes=0)
    await engine.remove(box)
    wanted = [
        EngineEventKind.START,
        EngineEventKind.PAUSE,
        EngineEventKind.UNPAUSE,
        EngineEventKind.UPDATE,
        EngineEventKind.DIE,
        EngineEventKind.DESTROY,
    ]
    told = [started, *await until_destroyed(stream)]
    assert [event.kind for event in told] == wanted
    again = engine.events(started.time_nanos)
    assert await until_destroyed(again) == told
    later = engine.events(told[2].time_nanos)
    assert await anext(later) == told[2]
    for each in (stream, again, later):
        await close(each)


async def test_events_end_when_the_engine_does(engine_proxy: EngineProxy) -> None:
    async with connected_to(engine_proxy.url, timeout=5) as engine:
        listening = asyncio.create_task(next_of(engine.events(0)))
        await until(lambda: [one.engine_status for one in engine_proxy.requests if one.path == "/events"] == [200])
        for connection in list(engine_proxy._connections):
            connection.cancel()
        with pytest.raises(EngineUnavailable):
            await listening
        engine_proxy.faults.drop("GET", "/events", times=None)
        with pytest.raises(EngineUnavailable):
            await next_of(engine.events(0))


async def test_a_silent_engine_is_asked_for_a_sign_of_life(
    engine_proxy: EngineProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpudock_server.adapters.docker.connection._SILENCE_SECONDS", 0.1)
    async with connected_to(engine_proxy.url, timeout=1) as engine:
        listening = asyncio.create_task(next_of(engine.events(0)))
        await until(lambda: sum(request.path == "/version" for request in engine_proxy.requests) >= 4)
        assert not listening.done(), "it answers, and the stream goes on"
        engine_proxy.faults.hang("GET", "/version", times=None)
        with pytest.raises(EngineUnavailable):
            await listening


# ---- pull ----


async def test_pull(engine: DockerEngine, rig: Rig, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    async with registry(rig, tmp_path, locked=False) as host:
        await engine.pull(f"{host}/whole", None, lambda current, total: told.append((current, total)))
        image = await engine.image(f"{host}/whole:latest")
        assert image is not None
        assert image.size_bytes >= LAYER_BYTES
        current, total = told[-1]
        assert current == total > LAYER_BYTES
        assert told == sorted(told)
        await engine.remove_image(f"{host}/whole")
        assert await engine.image(f"{host}/whole") is None


async def test_pull_with_a_password(engine: DockerEngine, rig: Rig, tmp_path: Path) -> None:
    async with registry(rig, tmp_path, locked=True) as host:
        image = f"{host}/whole:latest"
        me = RegistryAuth(username=USER, password=SECRET)
        for wrong in (None, dataclasses.replace(me, password="wrong")):  # noqa: S106 - it is
            with pytest.raises(ImagePullFailed):
                await engine.pull(image, wrong, _ignore)
        await engine.pull(image, me, _ignore)
        await engine.remove_image(image)


async def test_a_pull_that_fails(engine: DockerEngine, rig: Rig, tmp_path: Path) -> None:
    async with registry(rig, tmp_path, locked=False) as host:
        for reference in (f"{host}/broken", f"{host}/nonesuch", "127.0.0.1:1/x", "UPPER", "", "a b"):
            with pytest.raises(ImagePullFailed) as failed:
                await engine.pull(reference, None, _ignore)
            assert failed.value.image == reference
            assert failed.value.detail


def _ignore(_current: int, _total: int) -> None:
    pass


# ---- an engine that fails, hangs and disconnects ----

Act = Callable[[DockerEngine, str], Awaitable[object]]


ACTS: dict[str, Act] = {
    "info": lambda engine, _: engine.info(),
    "image": lambda engine, _: engine.image(IMAGE),
    "has_volume": lambda engine, _: engine.has_volume("v"),
    "remove_volume": lambda engine, _: engine.remove_volume("v"),
    "inspect": lambda engine, box: engine.inspect(box),
    "find": lambda engine, _: engine.find({"gpudock.uid": ""}),
    "start": lambda engine, box: engine.start(box),
    "stop": lambda engine, box: engine.stop(box, 0),
    "pause": lambda engine, box: engine.pause(box),
    "update": lambda engine, box: engine.update(box, cpus=1, memory_bytes=0),
    "exited_within": lambda engine, box: engine.exited_within(box, 0.2),
    "remove": lambda engine, box: engine.remove(box),
    "pull": lambda engine, _: engine.pull("127.0.0.1:1/x", None, _ignore),
}


@pytest.mark.parametrize("name", ACTS)
async def test_every_call_ends_and_leaks_nothing(patient: DockerEngine, engine_proxy: EngineProxy, name: str) -> None:
    act, faults = ACTS[name], engine_proxy.faults
    async with connected_to(engine_proxy.url, timeout=0.5) as engine:
        box = await patient.create(await engine_spec(patient))

        faults.drop(".*", ".*", times=None)
        with pytest.raises(EngineUnavailable):
            await act(engine, box)
        faults.clear()

        faults.fail(".*", ".*", status=500, message="broken", times=None)
        with pytest.raises((EngineRejected, StartFailed, ImagePullFailed), match="broken"):
            await act(engine, box)
        faults.clear()

        faults.hang(".*", ".*", times=None)
        with pytest.raises(EngineUnavailable, match="timed out"):
            await act(engine, box)
        faults.clear()

        hanging = faults.hang(".*", ".*", times=None)
        task = asyncio.create_task(_as_coroutine(act(engine, box)))
        await hanging.hit.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert in_use(engine) == 0
        faults.clear()
    await asyncio.wait_for(engine_proxy.idle(), limit(5))


async def _as_coroutine(awaitable: Awaitable[object]) -> None:
    await awaitable


async def test_an_answer_that_makes_no_sense(tmp_path: Path) -> None:
    answers = [
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\n\r\n{}",
    ]

    async def serve(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answers[0])
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    while answers:
        with pytest.raises(EngineUnavailable):
            await DockerEngine.connect(f"unix://{tmp_path}/s", timeout=2)
        answers.pop(0)
    server.close()
    with pytest.raises(EngineUnavailable):
        await DockerEngine.connect(f"unix://{tmp_path}/none", timeout=2)


@pytest.mark.parametrize(
    ("newest", "oldest", "agreed"),
    [("1.40", "1.12", "1.40"), ("1.52", "1.44", "1.47"), ("1.39", "1.12", None), ("1.60", "1.48", None)],
)
async def test_the_api_version(tmp_path: Path, newest: str, oldest: str, agreed: str | None) -> None:
    asked: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readline():
            asked.append(head.split()[1].decode())
            while (await reader.readline()).strip():
                pass
            body = json.dumps({"ApiVersion": newest, "MinAPIVersion": oldest, "ID": "x"}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    server = await asyncio.start_unix_server(serve, tmp_path / "s")
    url = f"unix://{tmp_path}/s"
    if agreed is None:
        with pytest.raises(EngineRejected, match="update the older one"):
            await DockerEngine.connect(url, timeout=2)
    else:
        engine = await DockerEngine.connect(url, timeout=2)
        assert (await engine.info()).api_version == agreed
        assert asked[-1] == f"/v{agreed}/info"
        await engine.close()
    server.close()


# ---- ports of the host ----


async def test_the_probe_of_ports() -> None:
    probe = HostPortProbe()
    for protocol, kind in (("tcp", socket.SOCK_STREAM), ("udp", socket.SOCK_DGRAM)):
        for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")):  # noqa: S104 - as others do
            with closing(socket.socket(family, kind)) as holder:
                holder.bind((address, 0))
                port = holder.getsockname()[1]
                if kind is socket.SOCK_STREAM:
                    holder.listen()
                assert not await probe(protocol, port)
            assert await probe(protocol, port)
            assert await probe(protocol, port), "the probe itself leaves nothing"


async def test_connections_that_linger_do_not_count() -> None:
    server = socket.create_server(("127.0.0.1", 0))
    port = server.getsockname()[1]
    client = socket.create_connection(("127.0.0.1", port))
    accepted, _ = server.accept()
    server.close()
    # Whoever closes first is left with TIME_WAIT.
    accepted.close()
    assert client.recv(1) == b""
    client.close()
    assert await HostPortProbe()("tcp", port)
