"""etcd stopped or frozen, the engine killed, in the middle of a scale; then both come back.

The operation ends, done or undone; what its caller was told is what happened; and nothing is lost or held twice. How
long etcd is away is GPUDOCK_TEST_OUTAGE_SECONDS: 8 by default, which is longer than any call to it has.
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
# What a scale asks of the engine, in its order: create, stop, start, and the removal of the old one.
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
            "20",
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
    await caller.create("victim", 2, ports=[_PORT], restart_policy=_ALWAYS)
    await caller.shell("victim", WRITE_FILES)
    return await caller.shell("victim", SHOW_FILES)


async def _scale_outcome(caller: Caller) -> tuple[str, Progress | None]:
    """What who asked for three cards is told: a reason, or what the stream said."""
    try:
        return "", await progress_of(caller.containers.ScaleContainer(scale_request("victim", 3)))
    except grpc.aio.AioRpcError as error:
        told = failure_of(error)
        assert told.reason in _OUTAGE_REASONS, told
        return told.reason, None


async def _require_as_reported(caller: Caller, rig: Rig, files: str, told: tuple[str, Progress | None]) -> None:
    """The container is as its caller was told, and so is the operation."""
    reason, progress = told
    count = 2 if reason else 3
    await _wait_until_consistent(caller, rig, files)
    container = await caller.get("victim")
    assert (container.spec.gpus.count, len(container.status.gpu_uuids)) == (count, count), told
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
    """Start it where an engine that was killed ended it and did not start it again; its record says so."""
    deadline = time.monotonic() + limit(_BACK_SECONDS)
    while True:
        await caller.until_idle()
        status = (await caller.get("victim")).status
        runs = rig.engine.call("GET", f"/containers/{status.engine_id}/json")["State"]["Running"]
        if status.state == (container_pb2.CONTAINER_STATE_RUNNING if runs else container_pb2.CONTAINER_STATE_EXITED):
            break
        assert time.monotonic() < deadline, "the record is not what the engine shows"
        await asyncio.sleep(0.2)
    assert status.holds_resources
    if not runs:
        await caller.start("victim")


async def _wait_until_consistent(caller: Caller, rig: Rig, files: str) -> None:
    deadline = time.monotonic() + limit(_BACK_SECONDS)
    while True:
        try:
            await caller.until_idle()
            await require_consistent(caller, rig, "victim", files)
        except (AssertionError, grpc.aio.AioRpcError) as error:
            if time.monotonic() > deadline:
                error.add_note(f"etcd said last:\n{rig.etcd.log_text[-4000:]}")
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
        telling = asyncio.create_task(_scale_outcome(caller))
        await asyncio.wait_for(held.hit.wait(), limit(_BACK_SECONDS))
        await _outage(down, up, held.release)
        told = await asyncio.wait_for(telling, limit(_BACK_SECONDS))
        # It waited: whatever was asked of the engine was done, and could be recorded once etcd was back.
        assert told[0] == "", told
        await _require_as_reported(caller, fragile_rig, files, told)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("how", ["stopped", "frozen"])
async def test_what_begins_while_etcd_is_away_is_refused(fragile_rig: Rig, how: str) -> None:
    etcd = fragile_rig.etcd
    down, up = (etcd.kill9, etcd.start) if how == "stopped" else (etcd.pause, etcd.resume)
    async with _daemon(fragile_rig, "--store-timeout", "1") as (_, _proxy, caller):
        files = await _create_with_files(caller)
        await asyncio.to_thread(down)
        told = await _scale_outcome(caller)
        await asyncio.to_thread(up)
        assert told[0] == "STORE_UNAVAILABLE"
        await _wait_until_consistent(caller, fragile_rig, files)
        # A write that was sent into the silence may have been done after all; then the operation says so.
        container = await caller.get("victim")
        assert len(container.status.gpu_uuids) == container.spec.gpus.count
        assert await caller.free_gpus() == 8 - container.spec.gpus.count


@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", _STAGES)
@pytest.mark.parametrize("done", [False, True], ids=["before it is done", "once it is done"])
async def test_the_engine_is_killed_in_the_middle_of_a_scale(fragile_rig: Rig, stage: str, *, done: bool) -> None:
    engine = fragile_rig.engine
    async with _daemon(fragile_rig) as (_, proxy, caller):
        files = await _create_with_files(caller)
        held = proxy.faults.hang("POST|DELETE", _MUTATIONS, nth=_STAGES[stage], after=done)
        telling = asyncio.create_task(_scale_outcome(caller))
        await asyncio.wait_for(held.hit.wait(), limit(_BACK_SECONDS))
        await asyncio.to_thread(engine.kill9)
        proxy.faults.clear()
        await asyncio.to_thread(engine.start)
        told = await asyncio.wait_for(telling, limit(_BACK_SECONDS))
        await _restart_if_exited(caller, fragile_rig)
        await _require_as_reported(caller, fragile_rig, files, told)


@pytest.mark.timeout(300)
async def test_engine_and_etcd_are_killed_together_and_the_daemon_as_well(fragile_rig: Rig) -> None:
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
            count = len((await caller.get("victim")).status.gpu_uuids)
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
    while not (await caller.get("victim")).status.operation_id:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
