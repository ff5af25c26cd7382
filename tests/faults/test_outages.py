"""etcd is stopped or frozen, or the engine killed, during a scale; then it is started again.

The operation is completed or undone, as its caller's result says; no file is lost and no GPU claimed twice. etcd is
away for GPUDOCK_TEST_OUTAGE_SECONDS: by default 8, which is longer than the timeout of any call to it.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from gpudock.v1 import container_pb2, operation_pb2, operation_service_pb2

from tests.calls import Caller, Progress, failure_of, progress_of, scale_request
from tests.conftest import FAST_FLAGS, own_state_flags
from tests.faults.invariants import SHOW_FILES, WRITE_FILES, require_consistent
from tests.rig import Daemon, EngineProxy, Rig
from tests.rig.patience import limit

pytestmark = pytest.mark.deep

_OUTAGE_SECONDS = float(os.environ.get("GPUDOCK_TEST_OUTAGE_SECONDS", "8"))
_BACK_SECONDS = 60.0
_PORT = container_pb2.PortRequest(container_port=80)
# The changing calls of a scale, in this order: create, stop, start, and the removal of the old engine container.
_MUTATIONS = r"/containers(/(?!.*/wait$).*)?"
_STAGES = {"create": 1, "stop": 2, "start": 3, "retire": 4}
_ALWAYS = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ALWAYS)
_OUTAGE_REASONS = {"ENGINE_UNAVAILABLE", "STORE_UNAVAILABLE", "START_FAILED", "LAYER_CARRY_FAILED", "ENGINE_REJECTED"}


@asynccontextmanager
async def _daemon(rig: Rig, *flags: str) -> AsyncIterator[tuple[Daemon, EngineProxy, Caller]]:
    async with rig.engine_proxy() as proxy:
        daemon = await rig.start_daemon(
            *FAST_FLAGS,
            *own_state_flags(),
            "--engine-timeout",
            f"{limit(20):g}",
            "--orphan-grace",
            "0",
            *flags,
            docker_host=proxy.url,
        )
        try:
            async with Caller(daemon.target) as caller:
                yield daemon, proxy, caller
                assert daemon.running
                assert "Traceback" not in daemon.log_text, daemon.log_text
                await caller.delete_all()
        finally:
            proxy.faults.clear()
            await asyncio.to_thread(daemon.stop)
            await asyncio.to_thread(rig.engine.remove_all)


async def _create_with_files(caller: Caller) -> str:
    await caller.create("subject", 2, ports=[_PORT], restart_policy=_ALWAYS)
    await caller.shell("subject", WRITE_FILES)
    return await caller.shell("subject", SHOW_FILES)


async def _scale_outcome(caller: Caller) -> tuple[str, Progress | None]:
    """The result of a scale to three GPUs: the reason of its error, or what its stream has sent."""
    try:
        return "", await progress_of(caller.containers.ScaleContainer(scale_request("subject", 3)))
    except grpc.aio.AioRpcError as error:
        failure = failure_of(error)
        assert failure.reason in _OUTAGE_REASONS, failure
        return failure.reason, None


async def _require_as_reported(caller: Caller, rig: Rig, files: str, outcome: tuple[str, Progress | None]) -> None:
    """Assert that container and operation are as the caller's result says."""
    reason, progress = outcome
    count = 2 if reason else 3
    await _wait_until_consistent(caller, rig, files)
    container = await caller.get("subject")
    assert (container.spec.gpus.count, len(container.status.gpu_uuids)) == (count, count), outcome
    if progress is not None and progress.result is not None:
        assert progress.result.status.gpu_uuids == container.status.gpu_uuids
    assert await caller.free_gpus() == 8 - count
    listed = await caller.operations.ListOperations(
        operation_service_pb2.ListOperationsRequest(
            filter=operation_service_pb2.OperationFilter(kinds=[operation_pb2.OPERATION_KIND_SCALE_CONTAINER])
        )
    )
    states = [operation.state for operation in listed.operations]
    assert states == [operation_pb2.OPERATION_STATE_FAILED if reason else operation_pb2.OPERATION_STATE_SUCCEEDED]


async def _restart_if_exited(caller: Caller, rig: Rig) -> None:
    """Wait until the record has the state of the engine; start `subject` if the killed engine did not."""
    deadline = time.monotonic() + limit(_BACK_SECONDS)
    while True:
        await caller.until_idle()
        status = (await caller.get("subject")).status
        runs = rig.engine.call("GET", f"/containers/{status.engine_id}/json")["State"]["Running"]
        if status.state == (container_pb2.CONTAINER_STATE_RUNNING if runs else container_pb2.CONTAINER_STATE_EXITED):
            break
        assert time.monotonic() < deadline, "the record differs from the engine's state"
        await asyncio.sleep(0.2)
    assert status.holds_resources
    if not runs:
        await caller.start("subject")


async def _wait_until_consistent(caller: Caller, rig: Rig, files: str) -> None:
    deadline = time.monotonic() + limit(_BACK_SECONDS)
    while True:
        try:
            await caller.until_idle()
            await require_consistent(caller, rig, "subject", files)
        except (AssertionError, grpc.aio.AioRpcError) as error:
            if time.monotonic() > deadline:
                error.add_note(f"The end of etcd's log:\n{rig.etcd.log_text[-4000:]}")
                raise
            await asyncio.sleep(0.2)
        else:
            return


async def _outage(down: Callable[[], object], up: Callable[[], object], release: Callable[[], object]) -> None:
    await asyncio.to_thread(down)
    try:
        release()
        await asyncio.sleep(_OUTAGE_SECONDS)
    finally:
        await asyncio.to_thread(up)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", _STAGES)
@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_etcd_is_away_in_the_middle_of_a_scale(fragile_rig: Rig, stage: str, how: str) -> None:
    etcd = fragile_rig.etcd
    down, up = (etcd.stop, etcd.start) if how == "stopped" else (etcd.pause, etcd.resume)
    async with _daemon(fragile_rig) as (_, proxy, caller):
        files = await _create_with_files(caller)
        held = proxy.faults.hang("POST|DELETE", _MUTATIONS, nth=_STAGES[stage])
        scale = asyncio.create_task(_scale_outcome(caller))
        await asyncio.wait_for(held.hit.wait(), limit(_BACK_SECONDS))
        await _outage(down, up, held.release)
        outcome = await asyncio.wait_for(scale, limit(_BACK_SECONDS))
        # The operation waited for etcd, so that it could be completed.
        assert outcome[0] == "", outcome
        await _require_as_reported(caller, fragile_rig, files, outcome)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_a_scale_is_refused_while_etcd_is_away(fragile_rig: Rig, how: str) -> None:
    etcd = fragile_rig.etcd
    down, up = (etcd.kill9, etcd.start) if how == "stopped" else (etcd.pause, etcd.resume)
    async with _daemon(fragile_rig, "--store-timeout", f"{limit(1):g}") as (_, _proxy, caller):
        files = await _create_with_files(caller)
        await asyncio.to_thread(down)
        outcome = await _scale_outcome(caller)
        await asyncio.to_thread(up)
        assert outcome[0] == "STORE_UNAVAILABLE"
        await _wait_until_consistent(caller, fragile_rig, files)
        # etcd may have executed a write that it did not answer; then the scale is completed.
        container = await caller.get("subject")
        assert len(container.status.gpu_uuids) == container.spec.gpus.count
        assert await caller.free_gpus() == 8 - container.spec.gpus.count


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", _STAGES)
@pytest.mark.parametrize("done", [False, True], ids=["before the call", "after the call"])
async def test_the_engine_is_killed_in_the_middle_of_a_scale(fragile_rig: Rig, stage: str, *, done: bool) -> None:
    engine = fragile_rig.engine
    async with _daemon(fragile_rig) as (_, proxy, caller):
        files = await _create_with_files(caller)
        held = proxy.faults.hang("POST|DELETE", _MUTATIONS, nth=_STAGES[stage], after=done)
        scale = asyncio.create_task(_scale_outcome(caller))
        await asyncio.wait_for(held.hit.wait(), limit(_BACK_SECONDS))
        await asyncio.to_thread(engine.kill9)
        proxy.faults.clear()
        await asyncio.to_thread(engine.start)
        outcome = await asyncio.wait_for(scale, limit(_BACK_SECONDS))
        await _restart_if_exited(caller, fragile_rig)
        await _require_as_reported(caller, fragile_rig, files, outcome)


@pytest.mark.timeout(300)
async def test_engine_etcd_and_daemon_are_killed_during_a_scale(fragile_rig: Rig) -> None:
    flags = own_state_flags()
    daemon = await fragile_rig.start_daemon(*FAST_FLAGS, *flags)
    async with Caller(daemon.target) as caller:
        files = await _create_with_files(caller)
        scaling = asyncio.create_task(_ignore_failure(_scale_outcome(caller)))
        await _wait_for_operation(caller)
        for kill in (daemon.kill9, fragile_rig.engine.kill9, fragile_rig.etcd.kill9):
            await asyncio.to_thread(kill)
        await scaling
    await asyncio.to_thread(fragile_rig.etcd.start)
    await asyncio.to_thread(fragile_rig.engine.start)
    daemon = await fragile_rig.start_daemon(*FAST_FLAGS, *flags, state_dir=daemon.state_dir, socket=daemon.socket)
    try:
        async with Caller(daemon.target) as caller:
            await _wait_until_consistent(caller, fragile_rig, files)
            count = len((await caller.get("subject")).status.gpu_uuids)
            assert count in (2, 3)
            assert await caller.free_gpus() == 8 - count
            await caller.delete_all()
    finally:
        await asyncio.to_thread(daemon.stop)


async def _ignore_failure(call: Awaitable[object]) -> None:
    try:
        await call
    except (grpc.aio.AioRpcError, AssertionError):
        return


async def _wait_for_operation(caller: Caller) -> None:
    deadline = time.monotonic() + limit(_BACK_SECONDS)
    while not (await caller.get("subject")).status.operation_id:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
