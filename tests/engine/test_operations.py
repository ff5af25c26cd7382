"""OperationService: operations are read, listed, watched and cancelled; repeated requests return the same result."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import duration_pb2
from gpudock.v1 import container_pb2, container_service_pb2, operation_pb2, operation_service_pb2

from tests.calls import Caller, failure, progress_of, result_of, scale_request
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, read_to_end, until
from tests.engine.operation_calls import cancel_operation, get_operation, list_operations
from tests.faults.invariants import SHOW_FILES, WRITE_FILES, require_absent, require_consistent
from tests.rig import Daemon, EngineProxy, Rig
from tests.selection import deep_except

__all__ = ["daemons"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
SUCCEEDED = operation_pb2.OPERATION_STATE_SUCCEEDED
FAILED = operation_pb2.OPERATION_STATE_FAILED
CANCELLED = operation_pb2.OPERATION_STATE_CANCELLED
PLANNED = operation_pb2.OPERATION_STATE_PLANNED
SCALE = operation_pb2.OPERATION_KIND_SCALE_CONTAINER
CREATE = operation_pb2.OPERATION_KIND_CREATE_CONTAINER

# Stages of a replacement -> the first engine call of the stage.
STAGES = {
    "create": ("POST", "/containers/create"),
    "stop": ("POST", "/containers/[^/]+/(stop|kill)"),
    "start": ("POST", "/containers/[^/]+/start"),
    "verify": ("POST", "/containers/[^/]+/wait"),
    "retire": ("DELETE", "/containers/[^/]+"),
}


@pytest_asyncio.fixture
async def proxied_caller(daemons: IsolatedDaemons, engine_proxy: EngineProxy) -> AsyncIterator[Caller]:
    """Calls a daemon whose engine calls pass through `engine_proxy`."""
    daemon = await daemons.start(docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        yield caller
        engine_proxy.faults.clear()


# -- reading ---------------------------------------------------------------------------------------------------------


async def test_an_operation_that_has_ended_can_be_read(caller: Caller) -> None:
    request = container_service_pb2.CreateContainerRequest(
        name="read", spec=caller.spec(1), request_id=str(uuid.uuid4())
    )
    progress = await progress_of(caller.containers.CreateContainer(request))
    operation = await get_operation(caller, progress.snapshots[-1].id)
    assert operation == progress.snapshots[-1]
    assert (operation.kind, operation.state) == (CREATE, SUCCEEDED)
    assert (operation.target.kind, operation.target.name) == (operation_pb2.RESOURCE_KIND_CONTAINER, "read")
    assert operation.target.uid == (await caller.get("read")).uid
    assert operation.node
    assert operation.request_id == request.request_id
    assert all(stage.state == operation_pb2.OPERATION_STAGE_STATE_SUCCEEDED for stage in operation.stages)
    assert all(stage.HasField("start_time") and stage.HasField("end_time") for stage in operation.stages)
    assert operation.stage == operation.stages[-1].name
    assert operation.HasField("create_time")
    assert operation.HasField("end_time")
    assert operation.plan.gpus_to_claim == 1
    assert list(operation.plan.candidate_gpu_uuids) == list((await caller.get("read")).status.gpu_uuids)


async def test_a_failed_operation_has_its_stage_and_error(caller: Caller) -> None:
    await caller.create("fails", 1)
    failed = await failure(caller.create("broken", command=("/no/such/program",)))
    assert (failed.code, failed.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "START_FAILED")
    (operation,) = [
        operation for operation in await list_operations(caller, states=[FAILED]) if operation.target.name == "broken"
    ]
    assert operation.stage == "start"
    assert operation.error.reason == "START_FAILED"
    assert operation.error.code == 9
    assert operation.error.message == failed.message
    assert dict(operation.error.metadata) == failed.metadata
    states = {stage.name: stage.state for stage in operation.stages}
    assert states["start"] == operation_pb2.OPERATION_STAGE_STATE_FAILED
    assert states["create"] == operation_pb2.OPERATION_STAGE_STATE_UNDONE
    assert states["commit"] == operation_pb2.OPERATION_STAGE_STATE_PENDING


async def test_unknown_operation_ids_are_not_found(caller: Caller) -> None:
    for operation_id in (str(uuid.uuid4()), "nonsense"):
        unknown = await failure(get_operation(caller, operation_id))
        assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND")
        assert (await failure(cancel_operation(caller, operation_id))).reason == "OPERATION_NOT_FOUND"
        watch = caller.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id))
        assert (await failure(progress_of(watch))).reason == "OPERATION_NOT_FOUND"


async def test_operations_are_listed_by_filters_and_pages_newest_first(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller:
        for name in ("one", "two"):
            await caller.create(name)
            await caller.scale(name, cpus=0.5)
        await caller.stop("one")
        all_operations = await list_operations(caller)
        assert len(all_operations) == 5
        times = [operation.create_time.ToNanoseconds() for operation in all_operations]
        assert times == sorted(times, reverse=True)
        assert [operation.target.name for operation in all_operations] == ["one", "two", "two", "one", "one"]
        for size in (1, 2, 3):
            assert await list_operations(caller, page_size=size) == all_operations
        assert len(await list_operations(caller, kinds=[SCALE])) == 2
        assert len(await list_operations(caller, kinds=[SCALE, CREATE], page_size=1)) == 4
        assert len(await list_operations(caller, states=[SUCCEEDED])) == 5
        assert await list_operations(caller, states=[FAILED]) == []
        assert len(await list_operations(caller, target=operation_pb2.ResourceRef(name="one"))) == 3
        assert (
            len(await list_operations(caller, target=operation_pb2.ResourceRef(uid=(await caller.get("two")).uid))) == 2
        )
        assert len(await list_operations(caller, node=daemons.node)) == 5
        assert await list_operations(caller, node="another") == []


# -- watching --------------------------------------------------------------------------------------------------------


async def test_a_watch_of_an_operation_gets_the_same_end_as_its_own_stream(
    proxied_caller: Caller, engine_proxy: EngineProxy
) -> None:
    await proxied_caller.create("watched", 1)
    hang = engine_proxy.faults.hang(*STAGES["stop"])
    first = aiter(proxied_caller.containers.ScaleContainer(scale_request("watched", 2)))
    operation_id = (await anext(first)).operation.id
    await hang.hit.wait()
    watch = proxied_caller.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id))
    attached = aiter(watch)
    shown = (await anext(attached)).operation
    assert (shown.id, shown.stage) == (operation_id, "stop")
    # This watch is read only after the operation has ended.
    unread = proxied_caller.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id))
    hang.release()
    ends = []
    for stream in (attached, first, aiter(unread)):
        messages = [answer async for answer in stream]
        assert messages[-2].operation.state == SUCCEEDED
        last = messages[-1].result
        ends.append(last.container if isinstance(last, operation_service_pb2.OperationResult) else last)
    assert ends[0] == ends[1] == ends[2]
    assert len(ends[0].status.gpu_uuids) == 2
    repeated = proxied_caller.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id))
    messages = [answer async for answer in repeated]
    assert len(messages) == 2, "a watch of an ended operation returns its last snapshot and its result"
    assert messages[0].operation == await get_operation(proxied_caller, operation_id)


# -- cancelling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", deep_except(["start"], ["create", "stop", "start", "verify"]))
async def test_a_cancelled_scale_is_undone(
    proxied_caller: Caller, engine_proxy: EngineProxy, rig: Rig, stage: str
) -> None:
    before = await proxied_caller.create("kept", 2, ports=[container_pb2.PortRequest(container_port=80)])
    await proxied_caller.shell("kept", WRITE_FILES)
    files = await proxied_caller.shell("kept", SHOW_FILES)
    hang = engine_proxy.faults.hang(*STAGES[stage])
    stream = aiter(proxied_caller.containers.ScaleContainer(scale_request("kept", 4)))
    operation_id = (await anext(stream)).operation.id
    await hang.hit.wait()
    cancelled = await cancel_operation(proxied_caller, operation_id)
    assert cancelled.cancel_requested
    repeated, end = await asyncio.gather(cancel_operation(proxied_caller, operation_id), failure(read_to_end(stream)))
    assert repeated.cancel_requested, "a second cancellation has no effect"
    assert (end.code, end.reason) == (grpc.StatusCode.CANCELLED, "OPERATION_CANCELLED")
    ended = await get_operation(proxied_caller, operation_id)
    assert (ended.state, ended.cancel_requested) == (CANCELLED, True)
    assert ended.error.reason == "OPERATION_CANCELLED"
    container = await require_consistent(proxied_caller, rig, "kept", files)
    assert container.status.gpu_uuids == before.status.gpu_uuids
    assert container.revision == 1
    assert container.status.engine_id == before.status.engine_id
    assert await proxied_caller.free_gpus() == 6
    assert (await cancel_operation(proxied_caller, operation_id)).state == CANCELLED, (
        "an ended operation can be cancelled without effect"
    )


@pytest.mark.deep
async def test_a_scale_that_is_cancelled_during_the_stop_starts_the_container_after_it_has_stopped(
    caller: Caller, rig: Rig
) -> None:
    # As PID 1, sleep ignores SIGTERM. The engine completes a stop that has begun, even if the client disconnects.
    spec = {"command": ["sleep", "infinity"], "stop_timeout": duration_pb2.Duration(seconds=2)}
    before = await caller.create("deaf", 1, **spec)
    stream = aiter(caller.containers.ScaleContainer(scale_request("deaf", 2)))
    operation = (await anext(stream)).operation
    while operation.stage != "stop":
        operation = (await anext(stream)).operation
    await cancel_operation(caller, operation.id)
    end = await failure(read_to_end(stream))
    assert end.reason == "OPERATION_CANCELLED"
    container = await caller.get("deaf")
    assert container.status.state == RUNNING
    assert container.status.engine_id == before.status.engine_id
    state = rig.engine.call("GET", f"/containers/{container.status.engine_id}/json")["State"]
    assert state["Running"]
    assert state["StartedAt"] > state["FinishedAt"] > before.status.start_time.ToJsonString(), "the stop is over"


async def test_a_committed_scale_cannot_be_cancelled(
    proxied_caller: Caller, engine_proxy: EngineProxy, rig: Rig
) -> None:
    await proxied_caller.create("late", 2)
    hang = engine_proxy.faults.hang(*STAGES["retire"])
    stream = aiter(proxied_caller.containers.ScaleContainer(scale_request("late", 4)))
    operation_id = (await anext(stream)).operation.id
    await hang.hit.wait()
    refused = await failure(cancel_operation(proxied_caller, operation_id))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "OPERATION_NOT_CANCELLABLE")
    hang.release()
    await read_to_end(stream)
    assert len((await require_consistent(proxied_caller, rig, "late")).status.gpu_uuids) == 4
    too_late = await failure(cancel_operation(proxied_caller, operation_id))
    assert (too_late.reason, too_late.metadata["state"]) == ("OPERATION_NOT_CANCELLABLE", "SUCCEEDED")


async def test_a_create_is_cancelled_during_its_pull(
    proxied_caller: Caller, engine_proxy: EngineProxy, rig: Rig
) -> None:
    hang = engine_proxy.faults.hang("POST", "/images/create")
    request = container_service_pb2.CreateContainerRequest(
        name="pulls", spec=proxied_caller.spec(3, image="registry.invalid/some/image:1")
    )
    stream = aiter(proxied_caller.containers.CreateContainer(request))
    operation = (await anext(stream)).operation
    await hang.hit.wait()
    assert (await proxied_caller.get("pulls")).status.state == container_pb2.CONTAINER_STATE_CREATING
    assert await proxied_caller.free_gpus() == 5
    await cancel_operation(proxied_caller, operation.id)
    assert (await failure(read_to_end(stream))).reason == "OPERATION_CANCELLED"
    await require_absent(proxied_caller, rig, "pulls")
    assert await proxied_caller.free_gpus() == 8


async def test_a_stop_cannot_be_cancelled(proxied_caller: Caller, engine_proxy: EngineProxy) -> None:
    await proxied_caller.create("ends", 1)
    hang = engine_proxy.faults.hang(*STAGES["stop"])
    stopping = asyncio.create_task(proxied_caller.stop("ends"))
    await hang.hit.wait()
    operation_id = (await proxied_caller.get("ends")).status.operation_id
    refused = await failure(cancel_operation(proxied_caller, operation_id))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "OPERATION_NOT_CANCELLABLE")
    hang.release()
    assert (await stopping).status.state == container_pb2.CONTAINER_STATE_STOPPED


async def test_an_operation_of_another_node_can_be_read_but_not_cancelled(
    daemons: IsolatedDaemons, engine_proxy: EngineProxy
) -> None:
    first, second = await asyncio.gather(
        daemons.start(node=f"{daemons.node}-1", docker_host=engine_proxy.url), daemons.start(node=f"{daemons.node}-2")
    )
    async with Caller(first.target) as owner_caller, Caller(second.target) as other_caller:
        await owner_caller.create("mine", 1)
        hang = engine_proxy.faults.hang(*STAGES["stop"])
        stream = aiter(owner_caller.containers.ScaleContainer(scale_request("mine", 2)))
        operation_id = (await anext(stream)).operation.id
        await hang.hit.wait()
        assert (await get_operation(other_caller, operation_id)).node == f"{daemons.node}-1"
        wrong = await failure(cancel_operation(other_caller, operation_id))
        assert (wrong.code, wrong.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_NODE")
        assert wrong.metadata["node"] == f"{daemons.node}-1"
        hang.release()
        await read_to_end(stream)
        assert (await get_operation(other_caller, operation_id)).state == SUCCEEDED


# -- repeated requests ---------------------------------------------------------------------------------------------


def _create_request(
    caller: Caller, name: str, gpus: int, **fields: Any
) -> container_service_pb2.CreateContainerRequest:
    return container_service_pb2.CreateContainerRequest(
        name=name, spec=caller.spec(gpus, **fields), request_id=str(uuid.uuid4())
    )


async def test_a_repeated_request_after_kill_9_has_the_same_result(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller:
        succeeding = _create_request(caller, "good", 2)
        failing = _create_request(caller, "bad", 1, command=("/no/such/program",))
        created = await result_of(caller.containers.CreateContainer(succeeding))
        failed = await failure(result_of(caller.containers.CreateContainer(failing)))
        assert failed.reason == "START_FAILED"
        stop = container_service_pb2.StopContainerRequest(name="good", request_id=str(uuid.uuid4()))
        stopped = await caller.containers.StopContainer(stop)
        interrupted = scale_request("slow", 2, request_id=str(uuid.uuid4()))
        stop_timeout = duration_pb2.Duration(seconds=2)
        await caller.create("slow", 1, command=("sh", "-c", "trap '' TERM; sleep 600"), stop_timeout=stop_timeout)
        stream = aiter(caller.containers.ScaleContainer(interrupted))
        operation_id = (await anext(stream)).operation.id
        await asyncio.to_thread(daemon.kill9)
    daemon = await daemons.start(after=daemon, serving=False)
    await asyncio.to_thread(daemon.await_serving, 60)
    async with Caller(daemon.target) as caller:
        repeated = await progress_of(caller.containers.ScaleContainer(interrupted))
        assert repeated.snapshots[0].id == operation_id
        assert repeated.result is not None
        assert len(repeated.result.status.gpu_uuids) == 2
        assert await result_of(caller.containers.CreateContainer(succeeding)) == created, (
            "the container as the first request returned it"
        )
        assert await failure(result_of(caller.containers.CreateContainer(failing))) == failed
        assert await caller.containers.StopContainer(stop) == stopped
        assert (await caller.get("good")).status.state == container_pb2.CONTAINER_STATE_STOPPED
        assert len(await list_operations(caller)) == 5
        for request in (succeeding, failing):
            request.spec.gpus.count += 1
            refused = await failure(result_of(caller.containers.CreateContainer(request)))
            assert (refused.code, refused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
        second = container_service_pb2.DeleteContainerRequest(name="good", request_id=stop.request_id)
        assert (await failure(caller.containers.DeleteContainer(second))).reason == "REQUEST_ID_REUSED"
        delete = container_service_pb2.DeleteContainerRequest(name="good", request_id=str(uuid.uuid4()))
        await caller.containers.DeleteContainer(delete)
        await caller.containers.DeleteContainer(delete)


async def test_a_refused_request_can_be_repeated_and_succeed(caller: Caller) -> None:
    await caller.create("hoards", 8)
    request = _create_request(caller, "waits", 1)
    assert (await failure(result_of(caller.containers.CreateContainer(request)))).reason == "GPU_EXHAUSTED"
    await caller.scale("hoards", 7)
    assert (await result_of(caller.containers.CreateContainer(request))).status.state == RUNNING


# -- plans -----------------------------------------------------------------------------------------------------------


async def test_a_plan_changes_nothing(caller: Caller, rig: Rig) -> None:
    await caller.create("runs", 2)
    await caller.create("stopped", 1)
    await caller.stop("stopped")
    before = await _node_state(caller, rig)
    port = container_pb2.PortRequest(container_port=80)
    stub, messages = caller.containers, container_service_pb2
    create = messages.CreateContainerRequest(name="new", spec=caller.spec(3, ports=[port]), validate_only=True)
    plans = [
        await progress_of(stub.CreateContainer(create)),
        await progress_of(stub.StartContainer(messages.StartContainerRequest(name="stopped", validate_only=True))),
        await progress_of(stub.RestartContainer(messages.RestartContainerRequest(name="runs", validate_only=True))),
        await progress_of(stub.ScaleContainer(scale_request("runs", 4, validate_only=True))),
    ]
    for progress, (claims, restarts) in zip(plans, [(3, False), (1, False), (0, True), (2, True)], strict=True):
        assert progress.result is None
        (planned,) = progress.snapshots
        assert (planned.state, planned.id) == (PLANNED, "")
        assert not planned.HasField("create_time")
        assert list(planned.plan.stages) == [stage.name for stage in planned.stages]
        assert planned.plan.gpus_to_claim == claims
        assert len(planned.plan.candidate_gpu_uuids) == claims
        assert planned.plan.restarts_process == restarts
    assert [port.container_port for port in plans[0].snapshots[0].plan.ports_to_claim] == [80]
    assert len(plans[3].snapshots[0].plan.kept_gpu_uuids) == 2
    down = await progress_of(stub.ScaleContainer(scale_request("runs", 1, validate_only=True)))
    assert len(down.snapshots[0].plan.released_gpu_uuids) == 1
    refused = scale_request("runs", 9, validate_only=True)
    assert (await failure(progress_of(stub.ScaleContainer(refused)))).reason == "GPU_EXHAUSTED"
    assert await _node_state(caller, rig) == before


async def _node_state(caller: Caller, rig: Rig) -> object:
    answer = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest())
    # Not the resume token: it also changes when other daemons write to the same etcd.
    containers = list(answer.containers)
    engine = [(container["Id"], container["State"]) for container in rig.engine.call("GET", "/containers/json?all=1")]
    return containers, await caller.holders(), engine, len(await list_operations(caller))


@pytest.mark.deep
async def test_a_stream_that_is_read_late_does_not_delay_the_operation(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon: Daemon = await daemons.start("--layer-carry", "copy")
    assert rig.engine.answers()
    async with Caller(daemon.target) as caller:
        await caller.create("large", 1)
        await caller.shell("large", "mkdir /many && cd /many && for i in $(seq 3000); do echo $i > $i; done")
        stream = aiter(caller.containers.ScaleContainer(scale_request("large", 2)))
        operation_id = (await anext(stream)).operation.id

        async def has_succeeded() -> bool:
            return (await get_operation(caller, operation_id)).state == SUCCEEDED

        await until(has_succeeded, 30)
        answers = [answer async for answer in stream]
        assert answers[-1].WhichOneof("event") == "result"
        assert answers[-2].operation.state == SUCCEEDED
        transfer = {stage.name: stage for stage in answers[-2].operation.stages}["carry"]
        assert transfer.state == operation_pb2.OPERATION_STAGE_STATE_SUCCEEDED
