"""Operations from outside: reading, listing, watching, cancelling and repeating them."""

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
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until
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

# The engine call that a stage of a replacement begins with; `nth` tells which of several.
STAGES = {
    "create": ("POST", "/containers/create"),
    "stop": ("POST", "/containers/[^/]+/(stop|kill)"),
    "start": ("POST", "/containers/[^/]+/start"),
    "verify": ("POST", "/containers/[^/]+/wait"),
    "retire": ("DELETE", "/containers/[^/]+"),
}


async def get(caller: Caller, operation_id: str) -> operation_pb2.Operation:
    """An operation as it is."""
    answer = await caller.operations.GetOperation(operation_service_pb2.GetOperationRequest(id=operation_id))
    return answer.operation


async def listed(caller: Caller, page_size: int = 0, **fields: Any) -> list[operation_pb2.Operation]:
    """All pages of a list."""
    found: list[operation_pb2.Operation] = []
    token = ""
    while True:
        request = operation_service_pb2.ListOperationsRequest(
            page_size=page_size, page_token=token, filter=operation_service_pb2.OperationFilter(**fields)
        )
        page = await caller.operations.ListOperations(request)
        assert not page_size or len(page.operations) <= page_size
        found += page.operations
        token = page.next_page_token
        if not token:
            return found


async def cancel(caller: Caller, operation_id: str) -> operation_pb2.Operation:
    """Cancel one."""
    request = operation_service_pb2.CancelOperationRequest(id=operation_id)
    return (await caller.operations.CancelOperation(request)).operation


@pytest_asyncio.fixture
async def behind(daemons: IsolatedDaemons, engine_proxy: EngineProxy) -> AsyncIterator[Caller]:
    """Calls a daemon whose engine can be made to hang."""
    daemon = await daemons.start(docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        yield caller
        engine_proxy.faults.clear()


# -- reading ---------------------------------------------------------------------------------------------------------


async def test_an_ended_operation_can_be_read(caller: Caller) -> None:
    request = container_service_pb2.CreateContainerRequest(
        name="read", spec=caller.spec(1), request_id=str(uuid.uuid4())
    )
    progress = await progress_of(caller.containers.CreateContainer(request))
    operation = await get(caller, progress.snapshots[-1].id)
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


async def test_a_failed_operation_says_where_and_why(caller: Caller) -> None:
    await caller.create("fails", 1)
    failed = await failure(caller.create("broken", command=("/no/such/program",)))
    assert (failed.code, failed.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "START_FAILED")
    (operation,) = [
        operation for operation in await listed(caller, states=[FAILED]) if operation.target.name == "broken"
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


async def test_ids_that_nothing_has(caller: Caller) -> None:
    for operation_id in (str(uuid.uuid4()), "nonsense"):
        unknown = await failure(get(caller, operation_id))
        assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "OPERATION_NOT_FOUND")
        assert (await failure(cancel(caller, operation_id))).reason == "OPERATION_NOT_FOUND"
        watch = caller.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id))
        assert (await failure(progress_of(watch))).reason == "OPERATION_NOT_FOUND"


async def test_lists_by_filters_and_pages_the_newest_first(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller:
        for name in ("one", "two"):
            await caller.create(name)
            await caller.scale(name, cpus=0.5)
        await caller.stop("one")
        everything = await listed(caller)
        assert len(everything) == 5
        times = [operation.create_time.ToNanoseconds() for operation in everything]
        assert times == sorted(times, reverse=True)
        assert [operation.target.name for operation in everything] == ["one", "two", "two", "one", "one"]
        for size in (1, 2, 3):
            assert await listed(caller, page_size=size) == everything
        assert len(await listed(caller, kinds=[SCALE])) == 2
        assert len(await listed(caller, kinds=[SCALE, CREATE], page_size=1)) == 4
        assert len(await listed(caller, states=[SUCCEEDED])) == 5
        assert await listed(caller, states=[FAILED]) == []
        assert len(await listed(caller, target=operation_pb2.ResourceRef(name="one"))) == 3
        assert len(await listed(caller, target=operation_pb2.ResourceRef(uid=(await caller.get("two")).uid))) == 2
        assert len(await listed(caller, node=daemons.node)) == 5
        assert await listed(caller, node="another") == []


# -- watching --------------------------------------------------------------------------------------------------------


async def test_who_attaches_sees_what_the_first_one_sees(behind: Caller, engine_proxy: EngineProxy) -> None:
    await behind.create("watched", 1)
    hang = engine_proxy.faults.hang(*STAGES["stop"])
    first = aiter(behind.containers.ScaleContainer(scale_request("watched", 2)))
    operation_id = (await anext(first)).operation.id
    await hang.hit.wait()
    watch = behind.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id))
    attached = aiter(watch)
    shown = (await anext(attached)).operation
    assert (shown.id, shown.stage) == (operation_id, "stop")
    # This one reads nothing until it is over.
    late = behind.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id))
    hang.release()
    ends = []
    for stream in (attached, first, aiter(late)):
        messages = [answer async for answer in stream]
        assert messages[-2].operation.state == SUCCEEDED
        last = messages[-1].result
        ends.append(last.container if isinstance(last, operation_service_pb2.OperationResult) else last)
    assert ends[0] == ends[1] == ends[2]
    assert len(ends[0].status.gpu_uuids) == 2
    again = behind.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id))
    messages = [answer async for answer in again]
    assert len(messages) == 2, "one that has ended gives its last snapshot and its end"
    assert messages[0].operation == await get(behind, operation_id)


# -- cancelling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", deep_except(["start"], ["create", "stop", "start", "verify"]))
async def test_a_scale_is_cancelled(behind: Caller, engine_proxy: EngineProxy, rig: Rig, stage: str) -> None:
    before = await behind.create("kept", 2, ports=[container_pb2.PortRequest(container_port=80)])
    await behind.shell("kept", WRITE_FILES)
    files = await behind.shell("kept", SHOW_FILES)
    hang = engine_proxy.faults.hang(*STAGES[stage])
    stream = aiter(behind.containers.ScaleContainer(scale_request("kept", 4)))
    operation_id = (await anext(stream)).operation.id
    await hang.hit.wait()
    told = await cancel(behind, operation_id)
    assert told.cancel_requested
    again, end = await asyncio.gather(cancel(behind, operation_id), failure(_drained(stream)))
    assert again.cancel_requested, "twice is once"
    assert (end.code, end.reason) == (grpc.StatusCode.CANCELLED, "OPERATION_CANCELLED")
    ended = await get(behind, operation_id)
    assert (ended.state, ended.cancel_requested) == (CANCELLED, True)
    assert ended.error.reason == "OPERATION_CANCELLED"
    container = await require_consistent(behind, rig, "kept", files)
    assert container.status.gpu_uuids == before.status.gpu_uuids
    assert container.revision == 1
    assert container.status.engine_id == before.status.engine_id
    assert await behind.free_gpus() == 6
    assert (await cancel(behind, operation_id)).state == CANCELLED, "also when it is over"


@pytest.mark.deep
async def test_what_the_engine_stops_already_is_started_again_only_when_it_has_ended(caller: Caller, rig: Rig) -> None:
    # As PID 1 it does not hear SIGTERM. A stop that has begun goes on in the engine, whoever hangs up.
    spec = {"command": ["sleep", "infinity"], "stop_timeout": duration_pb2.Duration(seconds=2)}
    before = await caller.create("deaf", 1, **spec)
    stream = aiter(caller.containers.ScaleContainer(scale_request("deaf", 2)))
    operation = (await anext(stream)).operation
    while operation.stage != "stop":
        operation = (await anext(stream)).operation
    await cancel(caller, operation.id)
    end = await failure(_drained(stream))
    assert end.reason == "OPERATION_CANCELLED"
    container = await caller.get("deaf")
    assert container.status.state == RUNNING
    assert container.status.engine_id == before.status.engine_id
    state = rig.engine.call("GET", f"/containers/{container.status.engine_id}/json")["State"]
    assert state["Running"]
    assert state["StartedAt"] > state["FinishedAt"] > before.status.start_time.ToJsonString(), "nothing is to come"


async def _drained(stream: AsyncIterator[Any]) -> None:
    async for _ in stream:
        pass


async def test_a_scale_past_its_point_of_no_return_is_not_cancelled(
    behind: Caller, engine_proxy: EngineProxy, rig: Rig
) -> None:
    await behind.create("late", 2)
    hang = engine_proxy.faults.hang(*STAGES["retire"])
    stream = aiter(behind.containers.ScaleContainer(scale_request("late", 4)))
    operation_id = (await anext(stream)).operation.id
    await hang.hit.wait()
    refused = await failure(cancel(behind, operation_id))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "OPERATION_NOT_CANCELLABLE")
    hang.release()
    await _drained(stream)
    assert len((await require_consistent(behind, rig, "late")).status.gpu_uuids) == 4
    over = await failure(cancel(behind, operation_id))
    assert (over.reason, over.metadata["state"]) == ("OPERATION_NOT_CANCELLABLE", "SUCCEEDED")


async def test_a_pull_is_cancelled(behind: Caller, engine_proxy: EngineProxy, rig: Rig) -> None:
    hang = engine_proxy.faults.hang("POST", "/images/create")
    request = container_service_pb2.CreateContainerRequest(
        name="pulls", spec=behind.spec(3, image="registry.invalid/some/image:1")
    )
    stream = aiter(behind.containers.CreateContainer(request))
    operation = (await anext(stream)).operation
    await hang.hit.wait()
    assert (await behind.get("pulls")).status.state == container_pb2.CONTAINER_STATE_CREATING
    assert await behind.free_gpus() == 5
    await cancel(behind, operation.id)
    assert (await failure(_drained(stream))).reason == "OPERATION_CANCELLED"
    await require_absent(behind, rig, "pulls")
    assert await behind.free_gpus() == 8


async def test_what_cannot_be_undone_cannot_be_cancelled(behind: Caller, engine_proxy: EngineProxy) -> None:
    await behind.create("ends", 1)
    hang = engine_proxy.faults.hang(*STAGES["stop"])
    stopping = asyncio.create_task(behind.stop("ends"))
    await hang.hit.wait()
    operation_id = (await behind.get("ends")).status.operation_id
    refused = await failure(cancel(behind, operation_id))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "OPERATION_NOT_CANCELLABLE")
    hang.release()
    assert (await stopping).status.state == container_pb2.CONTAINER_STATE_STOPPED


async def test_another_nodes_operation_is_watched_but_not_cancelled_here(
    daemons: IsolatedDaemons, engine_proxy: EngineProxy
) -> None:
    one, other = await asyncio.gather(
        daemons.start(node=f"{daemons.node}-1", docker_host=engine_proxy.url), daemons.start(node=f"{daemons.node}-2")
    )
    async with Caller(one.target) as here, Caller(other.target) as there:
        await here.create("mine", 1)
        hang = engine_proxy.faults.hang(*STAGES["stop"])
        stream = aiter(here.containers.ScaleContainer(scale_request("mine", 2)))
        operation_id = (await anext(stream)).operation.id
        await hang.hit.wait()
        assert (await get(there, operation_id)).node == f"{daemons.node}-1"
        wrong = await failure(cancel(there, operation_id))
        assert (wrong.code, wrong.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "WRONG_NODE")
        assert wrong.metadata["node"] == f"{daemons.node}-1"
        hang.release()
        await _drained(stream)
        assert (await get(there, operation_id)).state == SUCCEEDED


# -- the same call again ---------------------------------------------------------------------------------------------


def _create_request(
    caller: Caller, name: str, gpus: int, **fields: Any
) -> container_service_pb2.CreateContainerRequest:
    return container_service_pb2.CreateContainerRequest(
        name=name, spec=caller.spec(gpus, **fields), request_id=str(uuid.uuid4())
    )


async def test_the_same_request_after_kill_9_has_the_same_outcome(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller:
        good = _create_request(caller, "good", 2)
        bad = _create_request(caller, "bad", 1, command=("/no/such/program",))
        created = await result_of(caller.containers.CreateContainer(good))
        failed = await failure(result_of(caller.containers.CreateContainer(bad)))
        assert failed.reason == "START_FAILED"
        stop = container_service_pb2.StopContainerRequest(name="good", request_id=str(uuid.uuid4()))
        stopped = await caller.containers.StopContainer(stop)
        slow = scale_request("slow", 2, request_id=str(uuid.uuid4()))
        patient = duration_pb2.Duration(seconds=2)
        await caller.create("slow", 1, command=("sh", "-c", "trap '' TERM; sleep 600"), stop_timeout=patient)
        stream = aiter(caller.containers.ScaleContainer(slow))
        operation_id = (await anext(stream)).operation.id
        await asyncio.to_thread(daemon.kill9)
    daemon = await daemons.start(after=daemon, serving=False)
    await asyncio.to_thread(daemon.await_serving, 60)
    async with Caller(daemon.target) as caller:
        again = await progress_of(caller.containers.ScaleContainer(slow))
        assert again.snapshots[0].id == operation_id
        assert again.result is not None
        assert len(again.result.status.gpu_uuids) == 2
        assert await result_of(caller.containers.CreateContainer(good)) == created, "as it was then"
        assert await failure(result_of(caller.containers.CreateContainer(bad))) == failed
        assert await caller.containers.StopContainer(stop) == stopped
        assert (await caller.get("good")).status.state == container_pb2.CONTAINER_STATE_STOPPED
        assert len(await listed(caller)) == 5
        for request in (good, bad):
            request.spec.gpus.count += 1
            reused = await failure(result_of(caller.containers.CreateContainer(request)))
            assert (reused.code, reused.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED")
        other = container_service_pb2.DeleteContainerRequest(name="good", request_id=stop.request_id)
        assert (await failure(caller.containers.DeleteContainer(other))).reason == "REQUEST_ID_REUSED"
        delete = container_service_pb2.DeleteContainerRequest(name="good", request_id=str(uuid.uuid4()))
        await caller.containers.DeleteContainer(delete)
        await caller.containers.DeleteContainer(delete)


async def test_a_refused_call_has_no_outcome_and_is_tried_afresh(caller: Caller) -> None:
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
    before = await _everything(caller, rig)
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
    assert await _everything(caller, rig) == before


async def _everything(caller: Caller, rig: Rig) -> object:
    answer = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest())
    # Not its resume token: others, such as the lease of a daemon that was killed, write to the same etcd.
    containers = list(answer.containers)
    engine = [(container["Id"], container["State"]) for container in rig.engine.call("GET", "/containers/json?all=1")]
    return containers, await caller.holders(), engine, len(await listed(caller))


@pytest.mark.deep
async def test_a_slow_watcher_costs_nothing_and_sees_the_end(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon: Daemon = await daemons.start("--layer-carry", "copy")
    assert rig.engine.answers()
    async with Caller(daemon.target) as caller:
        await caller.create("large", 1)
        await caller.shell("large", "mkdir /many && cd /many && for i in $(seq 3000); do echo $i > $i; done")
        stream = aiter(caller.containers.ScaleContainer(scale_request("large", 2)))
        operation_id = (await anext(stream)).operation.id

        async def over() -> bool:
            return (await get(caller, operation_id)).state == SUCCEEDED

        await until(over, 30)
        rest = [answer async for answer in stream]
        assert rest[-1].WhichOneof("event") == "result"
        assert rest[-2].operation.state == SUCCEEDED
        carried = {stage.name: stage for stage in rest[-2].operation.stages}["carry"]
        assert carried.state == operation_pb2.OPERATION_STAGE_STATE_SUCCEEDED
