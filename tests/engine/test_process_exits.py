"""Processes that end at once, and crash loops."""

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
    """A command that is a shell's."""
    return ("sh", "-c", script)


@pytest_asyncio.fixture
async def attentive(daemons: IsolatedDaemons) -> AsyncIterator[Caller]:
    """Calls a daemon that watches each process for so long that none that ends at once is missed."""
    daemon = await daemons.start("--settle-period", f"{limit(3):.1f}", "--start-watch-period", f"{limit(3):.1f}")
    async with Caller(daemon.target) as caller:
        yield caller
        await caller.delete_all()
    assert "Traceback" not in daemon.log_text, daemon.log_text


# -- processes that end at once --------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", deep_except([""], ["", "sleep 0.03;", "sleep 0.1;"]))
@pytest.mark.parametrize("code", [0, 3])
async def test_one_that_ends_at_once_is_exited_whatever_started_it(attentive: Caller, delay: str, code: int) -> None:
    command = sh(f"{delay} exit {code}")
    made = await attentive.create("brief", 1, command=command)
    again = await attentive.start("brief")
    restarted = await attentive.restart("brief")
    moved = await attentive.start("brief", 2)
    cloned = await attentive.clone("brief", "copy")
    for container in (made, again, restarted, moved, cloned):
        assert container.status.state == EXITED
        assert container.status.exit_code == code
        assert container.status.HasField("exit_code")
        assert container.status.holds_resources
    assert len(moved.status.gpu_uuids) == 2


@pytest.mark.deep
async def test_without_a_watch_each_start_is_reported_as_running_and_its_end_after_it(caller: Caller) -> None:
    async def ended() -> bool:
        status = (await caller.get("brief")).status
        return status.state == EXITED and status.exit_code == 3

    shown = [await caller.create("brief", 1, command=sh("exit 3"))]
    for _ in range(6):
        await until(ended)
        shown.append(await caller.start("brief"))
        shown.append(await caller.restart("brief"))
        await until(ended)
        await caller.stop("brief")
        shown.append(await caller.start("brief"))
    shown += [await caller.clone("brief", f"copy-{number}") for number in range(6)]
    await until(ended)
    for container in shown:
        assert container.status.state == RUNNING
        assert not container.status.HasField("exit_code")
        assert not container.status.message
        assert container.status.holds_resources


async def test_a_crash_loop_that_was_stopped_is_not_said_to_be_started_again(caller: Caller) -> None:
    async def restarting() -> bool:
        status = (await caller.get("ended")).status
        return status.state == RESTARTING and "restarting by restart policy" in status.message

    await caller.create("ended", 1, command=sh("exit 3"), restart_policy=UNLESS_STOPPED)
    await until(restarting)
    for status in ((await caller.stop("ended")).status, (await caller.get("ended")).status):
        assert (status.state, status.exit_code, status.message) == (STOPPED, 3, "")


async def test_without_a_watch_a_crash_loop_is_reported_as_running_and_restarting_after_it(caller: Caller) -> None:
    async def restarting() -> bool:
        return (await caller.get("loop")).status.state == RESTARTING

    made = await caller.create("loop", 1, command=sh("exit 3"), restart_policy=UNLESS_STOPPED)
    await until(restarting)
    again = await caller.restart("loop")
    await until(restarting)
    for container in (made, again):
        assert container.status.state == RUNNING
        assert container.status.restart_count == 0
        assert not container.status.HasField("exit_code")


@pytest.mark.deep
@pytest.mark.parametrize("delay", ["", "sleep 0.1;"])
async def test_one_that_ends_at_once_does_not_take_the_place_of_one_that_runs(attentive: Caller, delay: str) -> None:
    # It ends at once with two cards or with `BAD`, and else runs.
    idle = "trap 'exit 0' TERM; while :; do sleep 0.1; done"
    command = sh(f'case "$NVIDIA_VISIBLE_DEVICES$BAD" in *,*|*bad) {delay} exit 3;; esac; {idle}')
    await attentive.create("steady", 1, command=command, env={"BAD": "bad"})
    await attentive.update("steady", "env")
    before = await attentive.start("steady")
    assert before.status.state == RUNNING
    changes = (
        partial(attentive.update, "steady", env={"BAD": "bad"}),
        partial(attentive.scale, "steady", 2),
        partial(attentive.rollback, "steady", 1, spec_only=True),
        partial(attentive.rollback, "steady", 1),
    )
    for change in changes:
        refused = await failure(change())
        assert refused.reason == "START_FAILED"
        assert "exited with code 3" in refused.message
        after = await attentive.get("steady")
        assert after.status.state == RUNNING
        assert after.status.engine_id == before.status.engine_id
        assert after.spec == before.spec


# -- crash loops -----------------------------------------------------------------------------------------------------


async def test_a_crash_loop_is_restarting_and_says_how_it_ended(attentive: Caller) -> None:
    made = await attentive.create("loop", 1, command=sh("exit 3"), restart_policy=UNLESS_STOPPED)
    assert made.status.state == RESTARTING
    for _ in range(40):
        status = (await attentive.get("loop")).status
        assert status.state == RESTARTING
        assert status.exit_code == 3
        assert "exited with code 3" in status.message
        assert status.HasField("finish_time")
        assert len(status.gpu_uuids) == 1
        await asyncio.sleep(0.05)
    assert (await attentive.get("loop")).status.restart_count > 1
    listed = await attentive.containers.ListContainers(
        container_service_pb2.ListContainersRequest(
            filter=container_service_pb2.ContainerFilter(states=[RESTARTING, STOPPED])
        )
    )
    assert [container.name for container in listed.containers] == ["loop"]
    assert (await attentive.restart("loop")).status.state == RESTARTING
    stopped = await attentive.stop("loop")
    assert stopped.status.state == STOPPED
    assert stopped.status.exit_code == 3
    assert (await attentive.start("loop")).status.state == RESTARTING


async def test_one_that_its_policy_started_again_runs_in_the_end(caller: Caller, rig: Rig) -> None:
    once = sh("test -e /ran || { touch /ran; sleep 0.3; exit 4; }; trap 'exit 0' TERM; while :; do sleep 0.1; done")
    made = await caller.create("second", 1, command=once, restart_policy=UNLESS_STOPPED)

    async def settled() -> bool:
        status = (await caller.get("second")).status
        return status.state == RUNNING and status.restart_count == 1

    await until(settled)
    status = (await caller.get("second")).status
    assert not status.HasField("exit_code")
    assert "previous exit code 4" in status.message
    assert status.engine_id == made.status.engine_id
    assert docker_inspect(rig, status.engine_id)["RestartCount"] == 1
