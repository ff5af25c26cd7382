"""The daemon and what it depends on: an embedded etcd, its health, a second daemon, and an engine that is restarted."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
from pathlib import Path

import grpc
import pytest
from gpudock.v1 import container_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.calls import Caller, failure, failure_of
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until, until_state
from tests.rig import Daemon, EngineProxy, Rig, freeze

__all__ = ["daemons"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
EXITED = container_pb2.CONTAINER_STATE_EXITED
SERVICES = ("", "gpudock.v1.ContainerService", "gpudock.v1.NodeService", "gpudock.v1.OperationService")
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
OTHER_USER = 65534


def etcd_pid(daemon: Daemon) -> int:
    """The pid of the embedded etcd of a daemon; 0 if it does not run."""
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "exe").readlink().name == "etcd":
                cwd = (process / "cwd").readlink()
                if cwd == daemon.state_dir / "etcd":
                    return int(process.name)
        except OSError:
            continue
    return 0


async def test_an_embedded_etcd_is_private_restarted_and_keeps_its_records(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--shutdown-grace", "5", etcd_endpoints="")
    folder = daemon.state_dir / "etcd"
    async with Caller(daemon.target) as caller:
        created = await caller.create("kept", 2)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    _require_unreachable_for_other_users(folder / "c.sock:0")

    first = etcd_pid(daemon)
    os.kill(first, signal.SIGKILL)
    async with Caller(daemon.target) as caller:
        assert await caller.get("kept") == created, "the record was lost with the etcd process"
        assert (await caller.scale("kept", 1)).spec.gpus.count == 1
    assert etcd_pid(daemon) not in (0, first)
    assert daemon.running

    await asyncio.to_thread(daemon.kill9)

    async def etcd_ended() -> bool:
        return etcd_pid(daemon) == 0

    await until(etcd_ended, 5)
    daemon = await daemons.start("--shutdown-grace", "5", after=daemon, etcd_endpoints="")
    async with Caller(daemon.target) as caller:
        assert len((await caller.get("kept")).status.gpu_uuids) == 1
    assert await asyncio.to_thread(daemon.stop) == 0, daemon.log_text
    assert etcd_pid(daemon) == 0
    assert "Traceback" not in daemon.log_text
    daemon = await daemons.start(after=daemon, etcd_endpoints="")
    async with Caller(daemon.target) as caller:
        assert (await caller.get("kept")).spec.gpus.count == 1
        await caller.delete("kept")


def _require_unreachable_for_other_users(path: Path) -> None:
    connect = f"import socket; socket.socket(socket.AF_UNIX).connect({str(path)!r})"
    setpriv = ["setpriv", f"--reuid={OTHER_USER}", f"--regid={OTHER_USER}", "--clear-groups"]
    attempt = subprocess.run([*setpriv, "/usr/bin/python3", "-c", connect], check=False, capture_output=True, text=True)
    assert "PermissionError" in attempt.stderr, attempt
    assert subprocess.run(["/usr/bin/python3", "-c", connect], check=False).returncode == 0, "root cannot connect"


class Health:
    """The health service of a daemon."""

    def __init__(self, caller: Caller) -> None:
        self._stub = health_pb2_grpc.HealthStub(caller.channel)

    async def serving(self) -> bool:
        """Whether all services are SERVING."""
        return await self._all_are(SERVING)

    async def not_serving(self) -> bool:
        """Whether all services are NOT_SERVING."""
        return await self._all_are(NOT_SERVING)

    async def _all_are(self, status: int) -> bool:
        responses = [await self._stub.Check(health_pb2.HealthCheckRequest(service=name)) for name in SERVICES]
        return all(response.status == status for response in responses)


async def test_health_follows_etcd(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--store-timeout", "1", etcd_endpoints="")
    etcd = etcd_pid(daemon)
    async with Caller(daemon.target) as caller:
        health = Health(caller)
        await until(health.serving)
        freeze(etcd)
        await until(health.not_serving)
        assert (await failure(caller.create("none"))).reason == "STORE_UNAVAILABLE"
        os.kill(etcd, signal.SIGCONT)
        await until(health.serving)
        assert (await caller.create("some")).status.state == RUNNING
    assert daemon.log_text.count("not serving") < 10, "the daemon logs more than the changes"


@pytest.mark.deep
async def test_health_follows_the_engine(daemons: IsolatedDaemons, engine_proxy: EngineProxy) -> None:
    daemon = await daemons.start(docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        health = Health(caller)
        await until(health.serving)
        engine_proxy.faults.hang(".*", ".*", times=None)
        await until(health.not_serving)
        engine_proxy.faults.clear()
        await until(health.serving)
        engine_proxy.faults.drop(".*", ".*", times=None)
        await until(health.not_serving)
        engine_proxy.faults.clear()
        await until(health.serving)
        assert (await caller.create("some")).status.state == RUNNING
    assert daemon.log_text.count("not serving") < 10, "the daemon logs more than the changes"


@pytest.mark.deep
async def test_two_daemons_on_one_host_and_one_etcd_allocate_nothing_twice(daemons: IsolatedDaemons, rig: Rig) -> None:
    nodes = [f"{daemons.node}-{number}" for number in (1, 2)]
    started = await asyncio.gather(*(daemons.start(node=node) for node in nodes))
    callers = [Caller(daemon.target) for daemon in started]
    port = container_pb2.PortRequest(container_port=80)

    async def create(number: int) -> str:
        try:
            await callers[number % 2].create(f"box-{number}", 1, ports=[port])
        except grpc.aio.AioRpcError as error:
            refused = failure_of(error)
            assert (refused.code, refused.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "GPU_EXHAUSTED")
            assert refused.metadata["free"] == "0"
            return ""
        return f"box-{number}"

    created = [name for name in await asyncio.gather(*(create(number) for number in range(100))) if name]
    assert len(created) == 8
    containers = [await callers[0].get(name) for name in created]
    assert len({uuid for container in containers for uuid in container.status.gpu_uuids}) == 8
    assert len({container.status.ports[0].host_port for container in containers}) == 8
    assert {container.node for container in containers} <= set(nodes)
    for caller, node in zip(callers, nodes, strict=True):
        assert sorted((await caller.holders()).values()) == sorted(created)
        for container in containers:
            if container.node != node:
                refused = await failure(caller.delete(container.name))
                assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_NODE")
                assert refused.metadata["node"] == container.node
                assert (await failure(caller.run(container.name, "true"))).reason == "WRONG_NODE"
    for container in containers:
        await callers[nodes.index(container.node)].delete(container.name)
    for caller in callers:
        assert await caller.free_gpus() == 8
        await caller.channel.close(None)
    assert rig.engine.call("GET", "/containers/json?all=1") == []


async def test_a_daemon_survives_a_restart_of_its_engine(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--engine-timeout", "5")
    async with Caller(daemon.target) as caller:
        await caller.create("plain", 2)
        with rig.engine.down(killed=True):
            assert (await failure(caller.create("none"))).reason == "ENGINE_UNAVAILABLE"
        await until_state(caller, "plain", EXITED, 30)
        holders = await caller.holders()
        assert sum(holder == "plain" for holder in holders.values()) == 2, "the container lost its GPUs"
        assert len((await caller.start("plain")).status.gpu_uuids) == 2
        # The daemon has reopened the stream of events: it notices this long before the next full reconcile.
        engine_id = (await caller.get("plain")).status.engine_id
        rig.engine.call("POST", f"/containers/{engine_id}/kill")
        await until_state(caller, "plain", EXITED)
    assert daemon.running
    assert "Traceback" not in daemon.log_text
