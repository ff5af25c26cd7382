"""`oom_killed`: whether the main process was killed for lack of memory in the last run."""

from __future__ import annotations

import asyncio

import pytest
from gpudock.v1 import container_pb2

from tests.calls import Caller
from tests.engine.drift import docker_inspect, engine_action
from tests.engine.isolated_daemons import until, until_state
from tests.rig import Rig

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
EXITED = container_pb2.CONTAINER_STATE_EXITED
RESTARTING = container_pb2.CONTAINER_STATE_RESTARTING
LIMIT = 64 << 20
HOG = ("tail", "-c", "200000000", "/dev/zero")
# Ignores SIGTERM, so that every stop ends with SIGKILL.
STUBBORN = ("sh", "-c", "trap '' TERM; while :; do sleep 1 & wait $!; done")


@pytest.mark.deep
async def test_a_child_that_is_killed_for_memory_is_not_the_container(caller: Caller, rig: Rig) -> None:
    made = await caller.create("host", command=STUBBORN, memory_bytes=LIMIT)
    hog = await caller.run("host", *HOG)
    assert hog.signal == "SIGKILL"
    assert not (await caller.get("host")).status.oom_killed
    await asyncio.to_thread(engine_action, rig, made.status.engine_id, "kill")
    await until_state(caller, "host", EXITED)
    assert docker_inspect(rig, made.status.engine_id)["State"]["OOMKilled"], "the engine says it of any process"
    ended = (await caller.get("host")).status
    assert ended.exit_code == 137
    assert not ended.oom_killed, "its own process was killed by a call"
    assert not (await caller.start("host")).status.oom_killed
    assert (await caller.run("host", *HOG)).signal == "SIGKILL"
    stopped = (await caller.stop("host")).status
    assert stopped.exit_code == 137
    assert not stopped.oom_killed


async def test_the_main_process_that_is_killed_for_memory(caller: Caller, rig: Rig) -> None:
    # It waits for input, and then allocates more memory than its limit.
    command = ("sh", "-c", f"until test -e /go; do sleep 0.05; done; rm /go; exec {' '.join(HOG)}")
    made = await caller.create("hungry", command=command, memory_bytes=LIMIT)
    for number in range(8):
        await caller.shell("hungry", "touch /go")
        await until_state(caller, "hungry", EXITED)
        status = (await caller.get("hungry")).status
        assert status.exit_code == 137
        if docker_inspect(rig, made.status.engine_id)["State"]["OOMKilled"]:
            assert status.oom_killed
            break
        # With control groups v1 the engine hears of it beside the end of the process, on a busy host after it.
        assert number < 7, "the engine never noticed"
        await caller.start("hungry")
    started = (await caller.start("hungry")).status
    assert started.state == RUNNING
    assert not started.oom_killed, "it is about the run that ended last"
    await asyncio.to_thread(engine_action, rig, made.status.engine_id, "kill")
    await until_state(caller, "hungry", EXITED)
    assert not (await caller.get("hungry")).status.oom_killed


async def test_a_loop_of_processes_that_are_killed_for_memory(caller: Caller) -> None:
    policy = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ALWAYS)
    await caller.create("greedy", command=HOG, memory_bytes=LIMIT, restart_policy=policy)

    async def told() -> bool:
        status = (await caller.get("greedy")).status
        return status.state == RESTARTING and status.oom_killed and status.exit_code == 137

    await until(told)
