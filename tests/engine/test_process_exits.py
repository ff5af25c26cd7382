"""Processes that exit immediately after their start, and crash loops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial

import pytest
import pytest_asyncio
from gpudock.v1 import container_pb2, container_service_pb2

from tests.calls import Caller, failure
from tests.engine.drift import docker_inspect
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until
from tests.rig import Rig
from tests.rig.patience import limit
from tests.selection import deep_except

__all__ = ["daemons"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
EXITED = container_pb2.CONTAINER_STATE_EXITED
STOPPED = container_pb2.CONTAINER_STATE_STOPPED
RESTARTING = container_pb2.CONTAINER_STATE_RESTARTING
UNLESS_STOPPED = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_UNLESS_STOPPED)


def sh(script: str) -> tuple[str, ...]:
    """A command that runs a shell script."""
    return ("sh", "-c", script)


@pytest_asyncio.fixture
async def watching_caller(daemons: IsolatedDaemons) -> AsyncIterator[Caller]:
    """Calls a daemon that watches each new process for 3 s, so that it notices every immediate exit."""
    daemon = await daemons.start("--settle-period", f"{limit(3):.1f}", "--start-watch-period", f"{limit(3):.1f}")
    async with Caller(daemon.target) as caller:
        yield caller
        await caller.delete_all()
    assert "Traceback" not in daemon.log_text, daemon.log_text


# -- immediate exits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", deep_except([""], ["", "sleep 0.03;", "sleep 0.1;"]))
@pytest.mark.parametrize("code", [0, 3])
async def test_a_container_that_exits_immediately_is_exited_after_every_kind_of_start(
    watching_caller: Caller, delay: str, code: int
) -> None:
    command = sh(f"{delay} exit {code}")
    created = await watching_caller.create("brief", 1, command=command)
    started = await watching_caller.start("brief")
    restarted = await watching_caller.restart("brief")
    with_more_gpus = await watching_caller.start("brief", 2)
    clone = await watching_caller.clone("brief", "copy")
    for container in (created, started, restarted, with_more_gpus, clone):
        assert container.status.state == EXITED
        assert container.status.exit_code == code
        assert container.status.HasField("exit_code")
        assert container.status.holds_resources
    assert len(with_more_gpus.status.gpu_uuids) == 2


@pytest.mark.deep
async def test_without_a_watch_period_a_start_returns_running_and_the_exit_follows(caller: Caller) -> None:
    async def has_exited() -> bool:
        status = (await caller.get("brief")).status
        return status.state == EXITED and status.exit_code == 3

    started_containers = [await caller.create("brief", 1, command=sh("exit 3"))]
    for _ in range(6):
        await until(has_exited)
        started_containers.append(await caller.start("brief"))
        started_containers.append(await caller.restart("brief"))
        await until(has_exited)
        await caller.stop("brief")
        started_containers.append(await caller.start("brief"))
    started_containers += [await caller.clone("brief", f"copy-{number}") for number in range(6)]
    await until(has_exited)
    for container in started_containers:
        assert container.status.state == RUNNING
        assert not container.status.HasField("exit_code")
        assert not container.status.message
        assert container.status.holds_resources


async def test_the_message_of_a_stopped_crash_loop_is_empty(caller: Caller) -> None:
    async def restarting() -> bool:
        status = (await caller.get("ended")).status
        return status.state == RESTARTING and "restarting by restart policy" in status.message

    await caller.create("ended", 1, command=sh("exit 3"), restart_policy=UNLESS_STOPPED)
    await until(restarting)
    for status in ((await caller.stop("ended")).status, (await caller.get("ended")).status):
        assert (status.state, status.exit_code, status.message) == (STOPPED, 3, "")


async def test_without_a_watch_period_a_crash_loop_is_running_and_then_restarting(caller: Caller) -> None:
    async def restarting() -> bool:
        return (await caller.get("loop")).status.state == RESTARTING

    created = await caller.create("loop", 1, command=sh("exit 3"), restart_policy=UNLESS_STOPPED)
    await until(restarting)
    started = await caller.restart("loop")
    await until(restarting)
    for container in (created, started):
        assert container.status.state == RUNNING
        assert container.status.restart_count == 0
        assert not container.status.HasField("exit_code")


@pytest.mark.deep
@pytest.mark.parametrize("delay", ["", "sleep 0.1;"])
async def test_a_successor_that_exits_immediately_does_not_replace_the_old_container(
    watching_caller: Caller, delay: str
) -> None:
    # The process exits immediately if it has two GPUs or the variable BAD.
    run_idle = "trap 'exit 0' TERM; while :; do sleep 0.1; done"
    command = sh(f'case "$NVIDIA_VISIBLE_DEVICES$BAD" in *,*|*bad) {delay} exit 3;; esac; {run_idle}')
    await watching_caller.create("steady", 1, command=command, env={"BAD": "bad"})
    await watching_caller.update("steady", "env")
    before = await watching_caller.start("steady")
    assert before.status.state == RUNNING
    changes = (
        partial(watching_caller.update, "steady", env={"BAD": "bad"}),
        partial(watching_caller.scale, "steady", 2),
        partial(watching_caller.rollback, "steady", 1, spec_only=True),
        partial(watching_caller.rollback, "steady", 1),
    )
    for change in changes:
        refused = await failure(change())
        assert refused.reason == "START_FAILED"
        assert "exited with code 3" in refused.message
        after = await watching_caller.get("steady")
        assert after.status.state == RUNNING
        assert after.status.engine_id == before.status.engine_id
        assert after.spec == before.spec


# -- crash loops -----------------------------------------------------------------------------------------------------


async def test_a_crash_loop_is_restarting_with_its_last_exit_code(watching_caller: Caller) -> None:
    created = await watching_caller.create("loop", 1, command=sh("exit 3"), restart_policy=UNLESS_STOPPED)
    assert created.status.state == RESTARTING
    for _ in range(40):
        status = (await watching_caller.get("loop")).status
        assert status.state == RESTARTING
        assert status.exit_code == 3
        assert "exited with code 3" in status.message
        assert status.HasField("finish_time")
        assert len(status.gpu_uuids) == 1
        await asyncio.sleep(0.05)
    assert (await watching_caller.get("loop")).status.restart_count > 1
    listed = await watching_caller.containers.ListContainers(
        container_service_pb2.ListContainersRequest(
            filter=container_service_pb2.ContainerFilter(states=[RESTARTING, STOPPED])
        )
    )
    assert [container.name for container in listed.containers] == ["loop"]
    assert (await watching_caller.restart("loop")).status.state == RESTARTING
    stopped = await watching_caller.stop("loop")
    assert stopped.status.state == STOPPED
    assert stopped.status.exit_code == 3
    assert (await watching_caller.start("loop")).status.state == RESTARTING


async def test_a_process_that_its_policy_restarted_is_running_with_its_previous_exit_code(
    caller: Caller, rig: Rig
) -> None:
    once = sh("test -e /ran || { touch /ran; sleep 0.3; exit 4; }; trap 'exit 0' TERM; while :; do sleep 0.1; done")
    created = await caller.create("second", 1, command=once, restart_policy=UNLESS_STOPPED)

    async def runs_again() -> bool:
        status = (await caller.get("second")).status
        return status.state == RUNNING and status.restart_count == 1

    await until(runs_again)
    status = (await caller.get("second")).status
    assert not status.HasField("exit_code")
    assert "previous exit code 4" in status.message
    assert status.engine_id == created.status.engine_id
    assert docker_inspect(rig, status.engine_id)["RestartCount"] == 1
