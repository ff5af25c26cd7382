"""The daemon starts containers again that the engine failed to start by their restart policy."""

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
    expect_drift,
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
    """A rig of this module, whose GPUs the tests may lose: the daemons of other tests would remember that."""
    yield fragile_rig
    fragile_rig.gpus.reset()


@asynccontextmanager
async def caller_with_gpus(rig: Rig, healthy_gpus: FakeGpus, *flags: str) -> AsyncIterator[Caller]:
    """Calls a daemon that has `healthy_gpus`, while the engine's hook has the GPUs of the rig."""
    environment = {"GPUDOCK_NVML_STATE": str(healthy_gpus.path)}
    daemon = await rig.start_daemon(*FAST_FLAGS, *own_state_flags(), *RETRIES, *flags, environment=environment)
    try:
        async with Caller(daemon.target) as caller:
            yield caller
            await caller.delete_all()
        assert "Traceback" not in daemon.log_text, daemon.log_text
    finally:
        await asyncio.to_thread(daemon.stop)


@pytest.fixture
def healthy_gpus(tmp_path: Path) -> FakeGpus:
    """GPUs of which none is lost."""
    return FakeGpus(tmp_path / "gpus")


@pytest_asyncio.fixture
async def retrying_caller(rig: Rig, healthy_gpus: FakeGpus) -> AsyncIterator[Caller]:
    """Calls a daemon that retries a failed start soon, with full comparisons at the default interval."""
    async with caller_with_gpus(rig, healthy_gpus) as caller:
        yield caller


@pytest_asyncio.fixture
async def comparing_caller(rig: Rig, healthy_gpus: FakeGpus) -> AsyncIterator[Caller]:
    """Calls a daemon that retries a failed start soon, with full comparisons every second."""
    async with caller_with_gpus(rig, healthy_gpus, "--reconcile-interval", "1") as caller:
        yield caller


async def test_a_start_that_failed_in_the_engine_is_retried_until_it_succeeds(
    retrying_caller: Caller, rig: Rig
) -> None:
    created = await retrying_caller.create("late", 1, restart_policy=UNLESS_STOPPED)
    gpu = created.status.gpu_uuids[0]
    rig.gpus.lose(gpu)
    # The process dies, and the engine's own restart fails in the hook. The engine does not retry, and sends no event.
    os.kill(docker_inspect(rig, created.status.engine_id)["State"]["Pid"], signal.SIGKILL)
    await until_state(retrying_caller, "late", EXITED)
    finding = await wait_for_drift(retrying_caller, "START_FAILED", PENDING, "late")
    assert "gpu is lost" in finding.message
    assert finding.HasField("due_time")
    status = (await retrying_caller.get("late")).status
    assert "gpu is lost" in status.message
    assert list(status.gpu_uuids) == [gpu]

    async def tried_twice() -> bool:
        return "tried 2 times" in (await wait_for_drift(retrying_caller, "START_FAILED", PENDING, "late")).plan

    await until(tried_twice)
    repaired = expect_drift(retrying_caller, "START_FAILED", REPAIRED, "late")
    rig.gpus.restore(gpu)
    await until_state(retrying_caller, "late", RUNNING)
    after = await retrying_caller.get("late")
    assert after.status.engine_id == created.status.engine_id
    assert list(after.status.gpu_uuids) == [gpu]
    await repaired


async def test_containers_that_were_stopped_or_have_no_policy_are_not_started_again(
    comparing_caller: Caller, rig: Rig
) -> None:
    """StopContainer ends the retries; without a restart policy, and after a stop by hand, there are none."""
    stopped_by_call, without_policy, by_hand = [
        await comparing_caller.create(name, 1, restart_policy=policy)
        for name, policy in (("halted", UNLESS_STOPPED), ("single", None), ("by-hand", UNLESS_STOPPED))
    ]
    for gpu in (*stopped_by_call.status.gpu_uuids, *without_policy.status.gpu_uuids):
        rig.gpus.lose(gpu)
    await asyncio.to_thread(engine_action, rig, by_hand.status.engine_id, "stop?t=1")
    for container in (stopped_by_call, without_policy):
        # A restart by hand ends the process, and then the start fails.
        with pytest.raises(HttpStatusError, match="gpu is lost"):
            await asyncio.to_thread(engine_action, rig, container.status.engine_id, "restart?t=1")
    for name in ("halted", "single", "by-hand"):
        await until_state(comparing_caller, name, EXITED)
    await wait_for_drift(comparing_caller, "START_FAILED", PENDING, "halted")

    async def stopped() -> bool:
        try:
            state = (await comparing_caller.stop("halted")).status.state
        except grpc.aio.AioRpcError as error:
            if failure_of(error).reason != "CONTAINER_BUSY":
                raise
            # A retry is running.
            return False
        assert state == STOPPED
        return True

    await until(stopped)
    for gpu in (*stopped_by_call.status.gpu_uuids, *without_policy.status.gpu_uuids):
        rig.gpus.restore(gpu)
    # A further retry would run before the third comparison, because comparisons are further apart than retries.
    await wait_for_passes(comparing_caller, 3)
    assert (await comparing_caller.get("halted")).status.state == STOPPED
    assert (await comparing_caller.get("single")).status.state == EXITED
    assert (await comparing_caller.get("by-hand")).status.state == EXITED
    assert not [finding for finding in await list_drift(comparing_caller) if finding.remedy == PENDING]
    for name in ("halted", "single", "by-hand"):
        assert (await comparing_caller.start(name)).status.state == RUNNING


async def test_max_retry_count_limits_the_retries(retrying_caller: Caller, rig: Rig) -> None:
    created = await retrying_caller.create("twice", 1, restart_policy=TWICE)
    rig.gpus.lose(created.status.gpu_uuids[0])
    os.kill(docker_inspect(rig, created.status.engine_id)["State"]["Pid"], signal.SIGKILL)
    finding = await wait_for_drift(retrying_caller, "START_FAILED", REPORTED, "twice")
    assert "tried 2 times" in finding.plan
    assert not finding.HasField("due_time")


@pytest.mark.timeout(120)
async def test_containers_start_when_the_driver_is_loaded_after_the_engine(rig: Rig) -> None:
    """The engine starts before the driver is loaded; its failed starts are retried."""
    flags = (*FAST_FLAGS, *own_state_flags(), *RETRIES)
    daemon = await rig.start_daemon(*flags)
    async with Caller(daemon.target) as caller:
        created = await caller.create("boot", 1, restart_policy=UNLESS_STOPPED)
        stopped = await caller.create("stopped", 1, restart_policy=UNLESS_STOPPED)
        await caller.stop("stopped", keep_resources=True)
    await asyncio.to_thread(daemon.stop)
    with rig.engine.down():
        saved_state = rig.gpus.path.read_text()
        rig.gpus.unload_driver()
    daemon = await rig.start_daemon(*flags, state_dir=daemon.state_dir, socket=daemon.socket)
    try:
        async with Caller(daemon.target) as caller:
            finding = await wait_for_drift(caller, "START_FAILED", PENDING, "boot")
            assert "driver not loaded" in finding.message
            assert (await caller.get("boot")).status.state == EXITED
            rig.gpus.path.write_text(saved_state)
            await until_state(caller, "boot", RUNNING)
            assert (await caller.get("boot")).status.gpu_uuids == created.status.gpu_uuids
            assert (await caller.get("stopped")).status.state == STOPPED
            assert not docker_inspect(rig, stopped.status.engine_id)["State"]["Running"]
            await caller.delete_all()
    finally:
        await asyncio.to_thread(daemon.stop)
