"""The engine killed and started again, and the machine rebooted: what was free stays free, what was held comes back."""

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
# Ends with a failure when it is asked to end, so that the engine starts it again whenever it gets the chance.
SULKS = ("sh", "-c", "trap 'exit 3' TERM INT; while :; do sleep 3600 & wait $!; done")


async def _people(caller: Caller) -> dict[str, container_pb2.Container]:
    """One of each kind: what runs, what comes back by itself, what was stopped, what comes back though it was."""
    made = {
        "stays": await caller.create("stays", 1, restart_policy=ALWAYS),
        "ends": await caller.create("ends", 1),
        "stopped": await caller.create("stopped", 1, restart_policy=ALWAYS),
        "lucky": await caller.create("lucky", 1, command=SULKS, restart_policy=ON_FAILURE),
        "unlucky": await caller.create("unlucky", 4, command=SULKS, restart_policy=ON_FAILURE),
    }
    for name in ("stopped", "lucky", "unlucky"):
        await caller.stop(name)
    winner = await caller.create("winner", 3, restart_policy=ALWAYS)
    assert set(winner.status.gpu_uuids) & {*made["unlucky"].status.gpu_uuids}
    return made | {"winner": winner}


async def _as_they_should_be(caller: Caller, rig: Rig, before: dict[str, container_pb2.Container]) -> None:
    for name in ("stays", "winner"):
        await until_state(caller, name, RUNNING, 60)
        assert (await caller.get(name)).status.gpu_uuids == before[name].status.gpu_uuids
    await until_state(caller, "ends", EXITED, 60)
    await until_state(caller, "stopped", STOPPED, 60)

    async def consistent() -> bool:
        await caller.until_idle()
        holders = await caller.holders()
        for name in before:
            container = await caller.get(name)
            held = {uuid for uuid, holder in holders.items() if holder == name}
            if held != {*container.status.gpu_uuids}:
                return False
            runs = docker_inspect(rig, container.status.engine_id)["State"]["Running"]
            if runs and not (container.status.holds_resources and container.status.state == RUNNING):
                return False
        return True

    await until(consistent, 60)
    holders = list((await caller.holders()).values())
    assert holders.count("ends") == 1, "what ended by itself keeps its cards"
    assert holders.count("stopped") == 0
    assert (await caller.get("unlucky")).status.state == STOPPED
    assert "unlucky" not in holders


@pytest.mark.timeout(240)
async def test_an_engine_that_is_killed_and_comes_back(fragile_rig: Rig) -> None:
    daemon = await fragile_rig.start_daemon(*FAST_FLAGS, *own_state_flags())
    try:
        async with Caller(daemon.target) as caller:
            before = await _people(caller)
            await asyncio.to_thread(fragile_rig.engine.kill9)
            await asyncio.to_thread(fragile_rig.engine.start)
            await _as_they_should_be(caller, fragile_rig, before)
            assert "Traceback" not in daemon.log_text, daemon.log_text
            await caller.delete_all()
    finally:
        await asyncio.to_thread(daemon.stop)


def _set_policy_on_disk(rig: Rig, container: container_pb2.Container, policy: str) -> None:
    """Change what an engine that is down will read when it starts."""
    file = rig.engine.data_root / "containers" / container.status.engine_id / "hostconfig.json"
    config = json.loads(file.read_text())
    config["RestartPolicy"] = {"Name": policy, "MaximumRetryCount": 0}
    file.write_text(json.dumps(config))


@pytest.mark.timeout(240)
async def test_what_a_killed_engine_forgets_to_start_is_started(fragile_rig: Rig) -> None:
    """Docker 20.10.24 does so now and then, when it is busy; here it is made to, by the policy that it reads."""
    flags = ("--start-retry-pause", "1", *FAST_FLAGS, *own_state_flags())
    daemon = await fragile_rig.start_daemon(*flags)
    made = {
        "always": (ALWAYS, IDLE),
        "unless-stopped": (UNLESS_STOPPED, IDLE),
        "failed": (ON_FAILURE, SULKS),
        "succeeded": (ON_FAILURE, IDLE),
        "no-policy": (NEVER, IDLE),
        "by-hand": (UNLESS_STOPPED, IDLE),
    }
    try:
        async with Caller(daemon.target) as caller:
            before = {
                name: await caller.create(name, 1, restart_policy=policy, command=command)
                for name, (policy, command) in made.items()
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
    """The process that a process belongs to; 1 where the one that started it has ended."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("\nPPid:")[2].split()[0])


async def _reboot(rig: Rig, daemon: Daemon) -> None:
    """Everything dies at once, and none of it in order."""
    pids = [
        docker_inspect(rig, container["Id"])["State"]["Pid"] for container in rig.engine.call("GET", "/containers/json")
    ]
    # The engine's shim of each container: one that outlives its container's kill would report it to the next engine.
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
async def test_a_machine_that_is_rebooted(fragile_rig: Rig) -> None:
    flags = (*FAST_FLAGS, *own_state_flags())
    daemon = await fragile_rig.start_daemon(*flags)
    async with Caller(daemon.target) as caller:
        before = await _people(caller)
    await _reboot(fragile_rig, daemon)
    daemon = await fragile_rig.start_daemon(*flags, state_dir=daemon.state_dir, socket=daemon.socket)
    try:
        async with Caller(daemon.target) as caller:
            await _as_they_should_be(caller, fragile_rig, before)
            assert not [
                finding for finding in await list_drift(caller) if finding.container not in ("lucky", "unlucky")
            ]
            await caller.delete_all()
    finally:
        await asyncio.to_thread(daemon.stop)
