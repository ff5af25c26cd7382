"""Containers that the engine could not start by itself, and that are started again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from gpudock.v1 import container_pb2

from tests.calls import Caller, failure_of
from tests.conftest import FAST_FLAGS, own_state_flags
from tests.engine.drift import (
    PENDING,
    REPAIRED,
    REPORTED,
    docker_inspect,
    engine_action,
    list_drift,
    wait_for_drift,
    wait_for_passes,
)
from tests.engine.isolated_daemons import until, until_state
from tests.rig import FakeGpus, Rig
from tests.rig.http_unix import HttpStatusError

pytestmark = pytest.mark.deep

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
EXITED = container_pb2.CONTAINER_STATE_EXITED
STOPPED = container_pb2.CONTAINER_STATE_STOPPED
UNLESS_STOPPED = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_UNLESS_STOPPED)
TWICE = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ON_FAILURE, max_retry_count=2)
RETRIES = ("--start-retry-pause", "0.4", "--start-retry-pause-max", "1")


@pytest.fixture
def rig(fragile_rig: Rig) -> Iterator[Rig]:
    """A rig whose cards may be lost: daemons of the session's rig would remember that."""
    yield fragile_rig
    fragile_rig.gpus.reset()


@asynccontextmanager
async def calling(rig: Rig, healthy: FakeGpus, *flags: str) -> AsyncIterator[Caller]:
    """Calls a daemon that sees all cards, while the engine's hook sees those of the rig."""
    environment = {"GPUDOCK_NVML_STATE": str(healthy.path)}
    daemon = await rig.start_daemon(*FAST_FLAGS, *own_state_flags(), *RETRIES, *flags, environment=environment)
    try:
        async with Caller(daemon.target) as caller:
            yield caller
            await caller.delete_all()
        assert "Traceback" not in daemon.log_text, daemon.log_text
    finally:
        await asyncio.to_thread(daemon.stop)


@pytest.fixture
def healthy(tmp_path: Path) -> FakeGpus:
    """Cards that are all there."""
    return FakeGpus(tmp_path / "gpus")


@pytest_asyncio.fixture
async def patient(rig: Rig, healthy: FakeGpus) -> AsyncIterator[Caller]:
    """Calls a daemon that tries a failed start again soon, and makes its full comparisons late."""
    async with calling(rig, healthy) as caller:
        yield caller


@pytest_asyncio.fixture
async def comparing(rig: Rig, healthy: FakeGpus) -> AsyncIterator[Caller]:
    """The same, with full comparisons every second."""
    async with calling(rig, healthy, "--reconcile-interval", "1") as caller:
        yield caller


async def test_a_start_that_the_engine_gave_up_is_tried_until_it_succeeds(patient: Caller, rig: Rig) -> None:
    made = await patient.create("late", 1, restart_policy=UNLESS_STOPPED)
    card = made.status.gpu_uuids[0]
    rig.gpus.lose(card)
    # Its process dies, and the engine's own start of it fails in the hook: it never tries again, and has no event.
    os.kill(docker_inspect(rig, made.status.engine_id)["State"]["Pid"], signal.SIGKILL)
    await until_state(patient, "late", EXITED)
    finding = await wait_for_drift(patient, "START_FAILED", PENDING, "late")
    assert "gpu is lost" in finding.message
    assert finding.HasField("due_time")
    status = (await patient.get("late")).status
    assert "gpu is lost" in status.message
    assert list(status.gpu_uuids) == [card]

    async def tried_twice() -> bool:
        return "tried 2 times" in (await wait_for_drift(patient, "START_FAILED", PENDING, "late")).plan

    await until(tried_twice)
    rig.gpus.restore(card)
    await until_state(patient, "late", RUNNING)
    after = await patient.get("late")
    assert after.status.engine_id == made.status.engine_id
    assert list(after.status.gpu_uuids) == [card]
    assert (await wait_for_drift(patient, "START_FAILED", container="late")).remedy == REPAIRED


async def test_what_a_user_stopped_or_never_wanted_is_not_started_again(comparing: Caller, rig: Rig) -> None:
    """Retries end with StopContainer; without a policy, and after a stop by hand, there are none."""
    halted, single, by_hand = [
        await comparing.create(name, 1, restart_policy=policy)
        for name, policy in (("halted", UNLESS_STOPPED), ("single", None), ("by-hand", UNLESS_STOPPED))
    ]
    for card in (*halted.status.gpu_uuids, *single.status.gpu_uuids):
        rig.gpus.lose(card)
    await asyncio.to_thread(engine_action, rig, by_hand.status.engine_id, "stop?t=1")
    for container in (halted, single):
        # As a restart by hand goes: the process ends, and the start fails.
        with pytest.raises(HttpStatusError, match="gpu is lost"):
            await asyncio.to_thread(engine_action, rig, container.status.engine_id, "restart?t=1")
    for name in ("halted", "single", "by-hand"):
        await until_state(comparing, name, EXITED)
    await wait_for_drift(comparing, "START_FAILED", PENDING, "halted")

    async def stopped() -> bool:
        try:
            state = (await comparing.stop("halted")).status.state
        except grpc.aio.AioRpcError as error:
            if failure_of(error).reason != "CONTAINER_BUSY":
                raise
            # The daemon is trying to start it at this moment.
            return False
        assert state == STOPPED
        return True

    await until(stopped)
    for card in (*halted.status.gpu_uuids, *single.status.gpu_uuids):
        rig.gpus.restore(card)
    # A try that was still to come would come before the third of these, which are further apart than tries.
    await wait_for_passes(comparing, 3)
    assert (await comparing.get("halted")).status.state == STOPPED
    assert (await comparing.get("single")).status.state == EXITED
    assert (await comparing.get("by-hand")).status.state == EXITED
    assert not [finding for finding in await list_drift(comparing) if finding.remedy == PENDING]
    for name in ("halted", "single", "by-hand"):
        assert (await comparing.start(name)).status.state == RUNNING


async def test_a_policy_that_limits_the_tries_limits_these_too(patient: Caller, rig: Rig) -> None:
    made = await patient.create("twice", 1, restart_policy=TWICE)
    rig.gpus.lose(made.status.gpu_uuids[0])
    os.kill(docker_inspect(rig, made.status.engine_id)["State"]["Pid"], signal.SIGKILL)
    finding = await wait_for_drift(patient, "START_FAILED", REPORTED, "twice")
    assert "tried 2 times" in finding.plan
    assert not finding.HasField("due_time")


@pytest.mark.timeout(120)
async def test_a_driver_that_is_late_at_boot(rig: Rig) -> None:
    """The engine starts before the driver is loaded: what it could not start runs again once there is one."""
    flags = (*FAST_FLAGS, *own_state_flags(), *RETRIES)
    daemon = await rig.start_daemon(*flags)
    async with Caller(daemon.target) as caller:
        made = await caller.create("boot", 1, restart_policy=UNLESS_STOPPED)
        stopped = await caller.create("stopped", 1, restart_policy=UNLESS_STOPPED)
        await caller.stop("stopped", keep_resources=True)
    await asyncio.to_thread(daemon.stop)
    with rig.engine.down():
        state = rig.gpus.path.read_text()
        rig.gpus.unload_driver()
    daemon = await rig.start_daemon(*flags, state_dir=daemon.state_dir, socket=daemon.socket)
    try:
        async with Caller(daemon.target) as caller:
            finding = await wait_for_drift(caller, "START_FAILED", PENDING, "boot")
            assert "driver not loaded" in finding.message
            assert (await caller.get("boot")).status.state == EXITED
            rig.gpus.path.write_text(state)
            await until_state(caller, "boot", RUNNING)
            assert (await caller.get("boot")).status.gpu_uuids == made.status.gpu_uuids
            assert (await caller.get("stopped")).status.state == STOPPED
            assert not docker_inspect(rig, stopped.status.engine_id)["State"]["Running"]
            await caller.delete_all()
    finally:
        await asyncio.to_thread(daemon.stop)
