"""`kill -9` while an operation is undone: the next daemon completes the undo, and reports the original error."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from gpudock.v1 import container_pb2, container_service_pb2, operation_pb2, operation_service_pb2

from tests.calls import Caller, failure
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until
from tests.faults.invariants import SHOW_FILES, WRITE_FILES, require_absent, require_consistent
from tests.rig import Daemon, EngineProxy
from tests.rig.patience import limit

__all__ = ["daemons"]

pytestmark = pytest.mark.deep


def _timeout_flags() -> tuple[str, str]:
    """A short timeout, because the undo waits for hanging calls."""
    return "--engine-timeout", f"{limit(2):g}"


async def _kill_while_undoing(caller: Caller, daemon: Daemon, call: asyncio.Task[object]) -> str:
    """Kill the daemon once an operation is UNDOING; returns the operation's id."""
    undoing = operation_service_pb2.OperationFilter(states=[operation_pb2.OPERATION_STATE_UNDOING])
    request = operation_service_pb2.ListOperationsRequest(filter=undoing)
    found: list[str] = []

    async def begun() -> bool:
        found[:] = [operation.id for operation in (await caller.operations.ListOperations(request)).operations]
        return bool(found)

    await until(begun)
    await asyncio.to_thread(daemon.kill9)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return found[0]


async def _ended_operation(caller: Caller, operation_id: str) -> operation_pb2.Operation:
    await caller.until_idle()
    answer = await caller.operations.GetOperation(operation_service_pb2.GetOperationRequest(id=operation_id))
    return answer.operation


async def test_the_undo_of_a_create_is_completed(daemons: IsolatedDaemons, engine_proxy: EngineProxy) -> None:
    daemon = await daemons.start(*_timeout_flags(), docker_host=engine_proxy.url)
    engine_proxy.faults.fail("POST", "/containers/[^/]+/start")
    engine_proxy.faults.hang("DELETE", "/containers/.*", times=None)
    async with Caller(daemon.target) as caller:
        create = asyncio.create_task(caller.create("undone", 2, ports=[container_pb2.PortRequest(container_port=80)]))
        operation_id = await _kill_while_undoing(caller, daemon, create)
    engine_proxy.faults.clear()
    successor = await daemons.start(after=daemon)
    async with Caller(successor.target) as caller:
        ended = await _ended_operation(caller, operation_id)
        assert ended.state == operation_pb2.OPERATION_STATE_FAILED
        assert ended.error.reason == "START_FAILED"
        await require_absent(caller, daemons.rig, "undone")
        assert await caller.free_gpus() == 8
        # The name and all GPUs are free.
        await caller.create("undone", 8)
        await caller.delete("undone")


@pytest.mark.parametrize("carry", ["exchange", "copy"])
async def test_the_undo_of_a_scale_is_completed(
    daemons: IsolatedDaemons, engine_proxy: EngineProxy, carry: str
) -> None:
    flags = (*_timeout_flags(), "--layer-carry", carry)
    daemon = await daemons.start(*flags, docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        await caller.create("kept", 2)
        await caller.shell("kept", WRITE_FILES)
        files = await caller.shell("kept", SHOW_FILES)
        # The successor does not start, and cannot be removed either, so that the undo waits.
        engine_proxy.faults.fail("POST", "/containers/[^/]+/start")
        engine_proxy.faults.hang("DELETE", "/containers/.*", times=None)
        scale = asyncio.create_task(caller.scale("kept", 3))
        operation_id = await _kill_while_undoing(caller, daemon, scale)
    engine_proxy.faults.clear()
    successor = await daemons.start(*flags, after=daemon)
    async with Caller(successor.target) as caller:
        ended = await _ended_operation(caller, operation_id)
        assert ended.state == operation_pb2.OPERATION_STATE_FAILED
        container = await require_consistent(caller, daemons.rig, "kept", files)
        assert (container.revision, container.spec.gpus.count) == (1, 2)
        assert await caller.free_gpus() == 6
        missing = await failure(caller.containers.GetContainerRevision(_revision("kept", 2)))
        assert missing.reason == "REVISION_NOT_FOUND"
        assert (await caller.scale("kept", 3)).revision == 2
        await require_consistent(caller, daemons.rig, "kept", files)
        await caller.delete("kept")


def _revision(name: str, number: int) -> container_service_pb2.GetContainerRevisionRequest:
    return container_service_pb2.GetContainerRevisionRequest(name=name, revision=number)
