"""The engine is killed and restarted, or the machine rebooted: containers start again and keep their claims."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from pathlib import Path

import pytest
from gpudock.v1 import container_pb2

from tests.calls import IDLE, Caller
from tests.conftest import FAST_FLAGS, own_state_flags
from tests.engine.drift import docker_inspect, engine_action, list_drift, wait_for_drift_log
from tests.engine.isolated_daemons import until, until_state
from tests.rig import Daemon, Rig

pytestmark = pytest.mark.deep

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
EXITED = container_pb2.CONTAINER_STATE_EXITED
STOPPED = container_pb2.CONTAINER_STATE_STOPPED
ALWAYS = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ALWAYS)
ON_FAILURE = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ON_FAILURE)
UNLESS_STOPPED = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_UNLESS_STOPPED)
NEVER = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_NO)
# Exits with a failure on SIGTERM, so that the engine restarts it after its own restart.
EXITS_WITH_FAILURE = ("sh", "-c", "trap 'exit 3' TERM INT; while :; do sleep 3600 & wait $!; done")


async def _create_containers(caller: Caller) -> dict[str, container_pb2.Container]:
    """Create containers that the engine starts again, that it does not, and stopped ones that it starts wrongly.

    The GPUs of `unlucky`, which is stopped, are claimed by `winner`; those of `lucky` stay free.
    """
    containers = {
        "stays": await caller.create("stays", 1, restart_policy=ALWAYS),
        "ends": await caller.create("ends", 1),
        "stopped": await caller.create("stopped", 1, restart_policy=ALWAYS),
        "lucky": await caller.create("lucky", 1, command=EXITS_WITH_FAILURE, restart_policy=ON_FAILURE),
        "unlucky": await caller.create("unlucky", 4, command=EXITS_WITH_FAILURE, restart_policy=ON_FAILURE),
    }
    for name in ("stopped", "lucky", "unlucky"):
        await caller.stop(name)
    winner = await caller.create("winner", 3, restart_policy=ALWAYS)
    assert set(winner.status.gpu_uuids) & {*containers["unlucky"].status.gpu_uuids}
    return containers | {"winner": winner}


async def _check_after_restart(caller: Caller, rig: Rig, before: dict[str, container_pb2.Container]) -> None:
    for name in ("stays", "winner"):
        await until_state(caller, name, RUNNING, 60)
        assert (await caller.get(name)).status.gpu_uuids == before[name].status.gpu_uuids
    await until_state(caller, "ends", EXITED, 60)
    await until_state(caller, "stopped", STOPPED, 60)

    async def claims_match_engine() -> bool:
        await caller.until_idle()
        holders = await caller.holders()
        for name in before:
            container = await caller.get(name)
            claimed = {uuid for uuid, holder in holders.items() if holder == name}
            if claimed != {*container.status.gpu_uuids}:
                return False
            running = docker_inspect(rig, container.status.engine_id)["State"]["Running"]
            if running and not (container.status.holds_resources and container.status.state == RUNNING):
                return False
        return True

    await until(claims_match_engine, 60)
    holders = list((await caller.holders()).values())
    assert holders.count("ends") == 1, "an exited container keeps its GPUs"
    assert holders.count("stopped") == 0
    assert (await caller.get("unlucky")).status.state == STOPPED
    assert "unlucky" not in holders


@pytest.mark.timeout(240)
async def test_containers_and_claims_are_right_after_a_restart_of_the_engine(fragile_rig: Rig) -> None:
    daemon = await fragile_rig.start_daemon(*FAST_FLAGS, *own_state_flags())
    try:
        async with Caller(daemon.target) as caller:
            before = await _create_containers(caller)
            await asyncio.to_thread(fragile_rig.engine.kill9)
            await asyncio.to_thread(fragile_rig.engine.start)
            await _check_after_restart(caller, fragile_rig, before)
            assert "Traceback" not in daemon.log_text, daemon.log_text
            await caller.delete_all()
    finally:
        await asyncio.to_thread(daemon.stop)


def _set_policy_on_disk(rig: Rig, container: container_pb2.Container, policy: str) -> None:
    """Change the restart policy in the file that a stopped engine reads when it starts."""
    file = rig.engine.data_root / "containers" / container.status.engine_id / "hostconfig.json"
    config = json.loads(file.read_text())
    config["RestartPolicy"] = {"Name": policy, "MaximumRetryCount": 0}
    file.write_text(json.dumps(config))


@pytest.mark.timeout(240)
async def test_containers_that_a_killed_engine_did_not_start_again_are_started(fragile_rig: Rig) -> None:
    """A busy Docker 20.10.24 sometimes does not start containers; here a changed policy file makes it do so."""
    flags = ("--start-retry-pause", "1", *FAST_FLAGS, *own_state_flags())
    daemon = await fragile_rig.start_daemon(*flags)
    containers = {
        "always": (ALWAYS, IDLE),
        "unless-stopped": (UNLESS_STOPPED, IDLE),
        "failed": (ON_FAILURE, EXITS_WITH_FAILURE),
        "succeeded": (ON_FAILURE, IDLE),
        "no-policy": (NEVER, IDLE),
        "by-hand": (UNLESS_STOPPED, IDLE),
    }
    try:
        async with Caller(daemon.target) as caller:
            before = {
                name: await caller.create(name, 1, restart_policy=policy, command=command)
                for name, (policy, command) in containers.items()
            }
            await asyncio.to_thread(engine_action, fragile_rig, before["by-hand"].status.engine_id, "stop?t=1")
            await until_state(caller, "by-hand", EXITED)
            with fragile_rig.engine.down(killed=True):
                for container in before.values():
                    _set_policy_on_disk(fragile_rig, container, "no")
            for name in ("always", "unless-stopped", "failed"):
                assert "did not start it again" in await wait_for_drift_log(daemon, "START_FAILED", name)
                await until_state(caller, name, RUNNING, 60)
                after = (await caller.get(name)).status
                assert after.gpu_uuids == before[name].status.gpu_uuids
                assert after.engine_id == before[name].status.engine_id
            for name in ("succeeded", "no-policy", "by-hand"):
                assert (await caller.get(name)).status.state == EXITED
                assert f"{name} does not run" not in daemon.log_text
            await caller.delete_all()
        assert "Traceback" not in daemon.log_text, daemon.log_text
    finally:
        await asyncio.to_thread(daemon.stop)


def _parent(pid: int) -> int:
    """The parent of a process; 1 if the process that started it has ended."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("\nPPid:")[2].split()[0])


async def _reboot(rig: Rig, daemon: Daemon) -> None:
    """Kill the daemon, the engine, every container and etcd, and start etcd and the engine."""
    pids = [
        docker_inspect(rig, container["Id"])["State"]["Pid"] for container in rig.engine.call("GET", "/containers/json")
    ]
    # The shims too: a shim that outlives its container reports the exit to the next engine, unlike after a reboot.
    shims = [_parent(pid) for pid in pids]
    assert 1 not in shims
    daemon.kill9()
    await asyncio.to_thread(rig.engine.kill9)
    for pid in (*shims, *pids):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(rig.etcd.kill9)
    await asyncio.to_thread(rig.etcd.start)
    await asyncio.to_thread(rig.engine.start)


@pytest.mark.timeout(240)
async def test_containers_and_claims_are_right_after_a_reboot(fragile_rig: Rig) -> None:
    flags = (*FAST_FLAGS, *own_state_flags())
    daemon = await fragile_rig.start_daemon(*flags)
    async with Caller(daemon.target) as caller:
        before = await _create_containers(caller)
    await _reboot(fragile_rig, daemon)
    daemon = await fragile_rig.start_daemon(*flags, state_dir=daemon.state_dir, socket=daemon.socket)
    try:
        async with Caller(daemon.target) as caller:
            await _check_after_restart(caller, fragile_rig, before)
            assert not [
                finding for finding in await list_drift(caller) if finding.container not in ("lucky", "unlucky")
            ]
            await caller.delete_all()
    finally:
        await asyncio.to_thread(daemon.stop)
