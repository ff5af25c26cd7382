"""`oom_killed`: whether the kernel killed the main process of the last run for lack of memory."""

from __future__ import annotations

import asyncio

import pytest
from gpudock.v1 import container_pb2

from tests.calls import Caller
from tests.engine.drift import docker_inspect, engine_action
from tests.engine.isolated_daemons import until, until_state
from tests.rig import Rig
from tests.rig.patience import in_time

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
EXITED = container_pb2.CONTAINER_STATE_EXITED
RESTARTING = container_pb2.CONTAINER_STATE_RESTARTING
MEMORY_LIMIT = 64 << 20
ALLOCATE = ("tail", "-c", "200000000", "/dev/zero")
# Every stop of this command ends with SIGKILL.
IGNORES_SIGTERM = ("sh", "-c", "trap '' TERM; while :; do sleep 1 & wait $!; done")


@pytest.mark.deep
async def test_a_memory_kill_of_another_process_is_not_one_of_the_container(caller: Caller, rig: Rig) -> None:
    created = await caller.create("host", command=IGNORES_SIGTERM, memory_bytes=MEMORY_LIMIT)
    result = await caller.run("host", *ALLOCATE)
    assert result.signal == "SIGKILL"
    assert not (await caller.get("host")).status.oom_killed
    await asyncio.to_thread(engine_action, rig, created.status.engine_id, "kill")
    await until_state(caller, "host", EXITED)
    assert docker_inspect(rig, created.status.engine_id)["State"]["OOMKilled"], "the engine reports it for any process"
    ended = (await caller.get("host")).status
    assert ended.exit_code == 137
    assert not ended.oom_killed, "the main process was killed by an API call"
    assert not (await caller.start("host")).status.oom_killed
    assert (await caller.run("host", *ALLOCATE)).signal == "SIGKILL"
    stopped = (await caller.stop("host")).status
    assert stopped.exit_code == 137
    assert not stopped.oom_killed


async def test_a_memory_kill_of_the_main_process_is_reported_until_the_next_run_ends(caller: Caller, rig: Rig) -> None:
    # The command waits for a file, and then allocates more memory than its limit.
    command = ("sh", "-c", f"until test -e /go; do sleep 0.05; done; rm /go; exec {' '.join(ALLOCATE)}")
    created = await caller.create("hungry", command=command, memory_bytes=MEMORY_LIMIT)
    async with in_time("the engine reported no memory kill"):
        while True:
            await caller.shell("hungry", "touch /go")
            await until_state(caller, "hungry", EXITED)
            status = (await caller.get("hungry")).status
            assert status.exit_code == 137
            if docker_inspect(rig, created.status.engine_id)["State"]["OOMKilled"]:
                break
            # With control groups v1 the engine can get the event of the kill after that of the exit, and ignores it.
            await caller.start("hungry")
    assert status.oom_killed
    started = (await caller.start("hungry")).status
    assert started.state == RUNNING
    assert not started.oom_killed, "the current run has not ended"
    await asyncio.to_thread(engine_action, rig, created.status.engine_id, "kill")
    await until_state(caller, "hungry", EXITED)
    assert not (await caller.get("hungry")).status.oom_killed


async def test_a_crash_loop_of_memory_kills_is_reported(caller: Caller) -> None:
    policy = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ALWAYS)
    await caller.create("greedy", command=ALLOCATE, memory_bytes=MEMORY_LIMIT, restart_policy=policy)

    async def oom_kill_is_reported() -> bool:
        status = (await caller.get("greedy")).status
        return status.state == RESTARTING and status.oom_killed and status.exit_code == 137

    await until(oom_kill_is_reported)
