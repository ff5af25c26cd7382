"""Signals to the daemon: SIGTERM once and twice, SIGUSR1, SIGKILL."""

from __future__ import annotations

import asyncio
import base64
import re
import signal
from collections.abc import AsyncIterator
from functools import partial

import grpc
import pytest
from google.protobuf import duration_pb2
from gpudock.v1 import container_pb2, operation_pb2, operation_service_pb2
from gpudock.v1.container_service_pb2 import PauseContainerRequest
from gpudock_server.adapters.etcd.keys import Keys

from tests.calls import Caller, failure, scale_request
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, stream_failure, until
from tests.rig import Daemon, EngineProxy, http_unix
from tests.rig.patience import limit

__all__ = ["daemons"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
# Ignores SIGTERM.
STUBBORN = ("sh", "-c", "trap '' TERM; while :; do sleep 0.2; done")


async def at_stage(stream: AsyncIterator[object], stage: str) -> operation_pb2.Operation:
    """Read an operation's stream until the operation is in a stage."""
    async for response in stream:
        operation: operation_pb2.Operation = response.operation  # type: ignore[attr-defined]  # each response has it
        if operation.stage == stage:
            return operation
    raise AssertionError(f"the operation ended before stage {stage}")


async def begin_slow_scale(caller: Caller, stop_seconds: float) -> tuple[AsyncIterator[object], str]:
    """Scale from 1 to 2 GPUs until the operation waits for the old process to end; its stream and its id."""
    stop_timeout = duration_pb2.Duration()
    stop_timeout.FromMilliseconds(int(stop_seconds * 1000))
    await caller.create("slow", 1, command=STUBBORN, stop_timeout=stop_timeout)
    await caller.shell("slow", "echo kept > /file")
    stream = aiter(caller.containers.ScaleContainer(scale_request("slow", 2)))
    return stream, (await at_stage(stream, "stop")).id


async def require_completed_scale(daemon: Daemon, operation_id: str) -> None:
    """Assert that a daemon completes the scale, and that WatchOperation reports it."""
    async with Caller(daemon.target) as caller:
        watch = operation_service_pb2.WatchOperationRequest(id=operation_id)
        last = [response async for response in caller.operations.WatchOperation(watch)][-1]
        assert len(last.result.container.status.gpu_uuids) == 2
        assert (await caller.get("slow")).status.state == RUNNING
        assert await caller.shell("slow", "cat /file") == "kept\n"
        assert sorted((await caller.holders()).values()) == ["", "", "", "", "", "", "slow", "slow"]


async def test_sigterm_lets_operations_reach_a_recorded_step(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--shutdown-grace", "20")
    async with Caller(daemon.target) as caller:
        await caller.create("other")
        command = asyncio.create_task(caller.run("other", "sleep", "60"))
        # The scale comes last, because it must still be waiting for the old process when the daemon gets SIGTERM.
        stream, operation_id = await begin_slow_scale(caller, 3)
        watcher = aiter(caller.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id)))
        await anext(watcher)
        daemon.terminate()
        await until(partial(_drains, daemon))
        refused = await failure(caller.create("late"))
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        for watched in (stream_failure(stream), stream_failure(watcher), failure(command)):
            end = await watched
            assert end is not None
            assert (end.code, end.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert await asyncio.to_thread(daemon.wait, 10) == 0, daemon.log_text
    assert "Traceback" not in daemon.log_text
    await require_completed_scale(await daemons.start(after=daemon), operation_id)


async def _drains(daemon: Daemon) -> bool:
    return "draining" in daemon.log_text


@pytest.mark.deep
async def test_an_operation_that_outlasts_the_shutdown_grace_is_resumed_by_the_next_daemon(
    daemons: IsolatedDaemons,
) -> None:
    # A quarter of the grace is left to notify the callers, which takes a while on a busy machine.
    daemon = await daemons.start("--shutdown-grace", "3", "--exec-hangup-grace", "600")
    async with Caller(daemon.target) as caller:
        await caller.create("other")
        command = asyncio.create_task(caller.run("other", "sh", "-c", "trap '' HUP; sleep 600"))
        stream, operation_id = await begin_slow_scale(caller, 4)
        daemon.terminate()
        end = await stream_failure(stream)
        assert end is not None
        assert (end.code, end.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert (await failure(command)).code is grpc.StatusCode.UNAVAILABLE
    # The daemon waits neither for the command nor for the operation, which the next daemon resumes.
    assert await asyncio.to_thread(daemon.wait, 10) == 0, daemon.log_text
    assert "Traceback" not in daemon.log_text, daemon.log_text
    await require_completed_scale(await daemons.start(after=daemon), operation_id)


@pytest.mark.deep
async def test_a_second_sigterm_ends_the_daemon_immediately(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--shutdown-grace", "60")
    async with Caller(daemon.target) as caller:
        _, operation_id = await begin_slow_scale(caller, 8)
        daemon.terminate()
        await until(partial(_drains, daemon))
        daemon.terminate()
        # A daemon that had waited for the operation would exit with 0.
        assert await asyncio.to_thread(daemon.wait, 10) == 1
        assert "exiting immediately" in daemon.log_text
    await require_completed_scale(await daemons.start(after=daemon), operation_id)


async def test_sigusr1_logs_where_each_task_and_thread_waits(
    daemons: IsolatedDaemons, engine_proxy: EngineProxy
) -> None:
    daemon = await daemons.start(docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        await caller.create("paused")
        hang = engine_proxy.faults.hang("POST", "/containers/[^/]+/pause")
        pausing = asyncio.ensure_future(caller.containers.PauseContainer(PauseContainerRequest(name="paused")))
        await asyncio.wait_for(hang.hit.wait(), limit(10))
        daemon.signal(signal.SIGUSR1)

        async def dumped() -> bool:
            return "task dump complete" in daemon.log_text

        await until(dumped)
        # The stack of the task that waits for the engine is complete, from core to the adapter.
        stacks = [line for line in daemon.log_text.splitlines() if "task stack" in line]
        assert any(
            re.search(r"core/.* in .*adapters/docker/containers.py:\d+ in ContainerCalls.pause", line)
            for line in stacks
        )
        # The stacks of the threads are written without the event loop.
        assert "most recent call first" in daemon.log_text
        engine_proxy.faults.clear()
        await pausing
        assert (await caller.get("paused")).status.state == container_pb2.CONTAINER_STATE_PAUSED


async def test_sigterm_during_startup_ends_the_daemon(daemons: IsolatedDaemons, engine_proxy: EngineProxy) -> None:
    hang = engine_proxy.faults.hang("GET", "/info")
    daemon = await daemons.start(docker_host=engine_proxy.url, serving=False)
    async with asyncio.timeout(limit(20)):
        await hang.hit.wait()
    daemon.terminate()
    assert await asyncio.to_thread(daemon.wait, 5) == 0, daemon.log_text
    assert "Traceback" not in daemon.log_text


async def _node_created_at(daemons: IsolatedDaemons) -> int:
    """The revision of etcd at which the node's key was created."""
    key = base64.b64encode(Keys(daemons.prefix).node(daemons.node)).decode()
    etcd = daemons.rig.etcd
    answer = await asyncio.to_thread(http_unix.call, etcd.socket, "POST", "/v3/kv/range", send={"key": key})
    return int(answer["kvs"][0]["create_revision"])


async def test_after_kill_9_the_next_daemon_does_not_wait_for_the_lease(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller:
        before = await caller.create("kept", 3)
    node = await _node_created_at(daemons)
    await asyncio.to_thread(daemon.kill9)
    daemon = await daemons.start(after=daemon)
    # The key was replaced: a daemon that waits until the lease of the first expires would create the key again.
    assert await _node_created_at(daemons) == node
    async with Caller(daemon.target) as caller:
        assert await caller.get("kept") == before
        assert await caller.free_gpus() == 5
