"""The engine killed and started again, and the machine rebooted: what was free stays free, what was held comes back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

import pytest
from gpudock.v1 import container_pb2

from tests.calls import Caller
from tests.conftest import FAST, own_state
from tests.engine.drift import drift, inspect
from tests.engine.own_daemons import until, until_state
from tests.rig import Daemon, Rig

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
EXITED = container_pb2.CONTAINER_STATE_EXITED
STOPPED = container_pb2.CONTAINER_STATE_STOPPED
ALWAYS = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ALWAYS)
ON_FAILURE = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ON_FAILURE)
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
        await caller.settled()
        holders = await caller.holders()
        for name in before:
            container = await caller.get(name)
            held = {uuid for uuid, holder in holders.items() if holder == name}
            if held != {*container.status.gpu_uuids}:
                return False
            runs = inspect(rig, container.status.engine_id)["State"]["Running"]
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
    daemon = await fragile_rig.start_daemon(*FAST, *own_state())
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


async def _reboot(rig: Rig, daemon: Daemon) -> None:
    """Everything dies at once, and none of it in order."""
    pids = [inspect(rig, one["Id"])["State"]["Pid"] for one in rig.engine.call("GET", "/containers/json")]
    daemon.kill9()
    await asyncio.to_thread(rig.engine.kill9)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(rig.etcd.kill9)
    await asyncio.to_thread(rig.etcd.start)
    await asyncio.to_thread(rig.engine.start)


@pytest.mark.timeout(240)
async def test_a_machine_that_is_rebooted(fragile_rig: Rig) -> None:
    flags = (*FAST, *own_state())
    daemon = await fragile_rig.start_daemon(*flags)
    async with Caller(daemon.target) as caller:
        before = await _people(caller)
    await _reboot(fragile_rig, daemon)
    daemon = await fragile_rig.start_daemon(*flags, state_dir=daemon.state_dir, socket=daemon.socket)
    try:
        async with Caller(daemon.target) as caller:
            await _as_they_should_be(caller, fragile_rig, before)
            assert not [one for one in await drift(caller) if one.container not in ("lucky", "unlucky")]
            await caller.delete_all()
    finally:
        await asyncio.to_thread(daemon.stop)
