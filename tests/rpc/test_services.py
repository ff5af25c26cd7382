"""ContainerService, OperationService and NodeService over a channel: streams, disconnects, filters and pages."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from gpudock.v1 import (
    container_pb2,
    container_service_pb2,
    node_service_pb2,
    operation_pb2,
    operation_service_pb2,
)
from gpudock_server import tokens
from gpudock_server.errors import EngineRejected
from gpudock_server.model.resource import ResourceKind
from gpudock_server.rpc import list_requests

from tests.rpc.in_memory_server import (
    UUID,
    InMemoryServer,
    create_container,
    create_request,
    read_to_end,
    reason_of,
    serve,
    wait_until,
)


async def test_a_stream_ends_with_the_result_of_the_operation(server: InMemoryServer) -> None:
    events = [event async for event in server.containers.CreateContainer(create_request())]
    assert events[-2].operation.state == operation_pb2.OPERATION_STATE_SUCCEEDED
    assert events[-1].result.status.state == container_pb2.CONTAINER_STATE_RUNNING
    assert events[-1].result.status.operation_id == ""
    response = await server.containers.GetContainer(container_service_pb2.GetContainerRequest(name="a"))
    assert response.container == events[-1].result


async def test_a_plan_is_one_message_and_changes_nothing(server: InMemoryServer) -> None:
    request = create_request(validate_only=True, request_id=UUID)
    events = [event async for event in server.containers.CreateContainer(request)]
    assert [event.operation.state for event in events] == [operation_pb2.OPERATION_STATE_PLANNED]
    assert events[0].operation.plan.stages
    assert not server.store.container_records
    assert not server.store.request_records


async def test_the_plan_of_a_commit_without_readable_layers_has_no_expected_freeze(server: InMemoryServer) -> None:
    await create_container(server)
    request = container_service_pb2.CommitContainerRequest(name="a", repository="team/model", validate_only=True)
    (event,) = [event async for event in server.containers.CommitContainer(request)]
    plan = event.operation.plan
    assert plan.stages[0] == "freeze"
    assert not plan.HasField("expected_freeze")
    assert [line for line in plan.warnings if "frozen while the engine writes the image (duration unknown)" in line]


async def test_the_stream_of_a_failed_operation_ends_with_its_record_and_its_error(server: InMemoryServer) -> None:
    server.engine.failures["start"] = EngineRejected(call="start a container", status=400, detail="no such file")
    events, error = await read_to_end(server.containers.CreateContainer(create_request(request_id=UUID)))
    assert events[-1].operation.state == operation_pb2.OPERATION_STATE_FAILED
    assert error is not None
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert reason_of(error) == "ENGINE_REJECTED"
    # A repeated call and a watch of the operation end with the same error.
    operation_id = server.store.request_records[UUID].operation_id
    for call in (
        server.containers.CreateContainer(create_request(request_id=UUID)),
        server.operation_service.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id)),
    ):
        _, repeated = await read_to_end(call)
        assert reason_of(repeated) == "ENGINE_REJECTED"


async def test_another_request_with_the_same_id_is_refused(server: InMemoryServer) -> None:
    await create_container(server, request_id=UUID)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await create_container(server, "b", request_id=UUID)
    assert reason_of(caught.value) == "REQUEST_ID_REUSED"


async def test_a_disconnect_does_not_cancel_the_operation(server: InMemoryServer) -> None:
    gate = server.engine.gates["create"] = asyncio.Event()
    call = server.containers.CreateContainer(create_request())
    first = await anext(aiter(call))
    call.cancel()
    gate.set()
    watch = server.operation_service.WatchOperation(operation_service_pb2.WatchOperationRequest(id=first.operation.id))
    events = [event async for event in watch]
    assert events[-1].result.container.name == "a"


async def test_a_watch_reports_matching_containers_and_can_be_resumed(server: InMemoryServer) -> None:
    running = container_service_pb2.ContainerFilter(states=[container_pb2.CONTAINER_STATE_RUNNING])
    await create_container(server)
    call = server.containers.WatchContainers(container_service_pb2.WatchContainersRequest(filter=running))
    events = aiter(call)
    assert (await anext(events)).added.name == "a"
    listed = await anext(events)
    assert listed.checkpoint.list_complete
    await server.containers.StopContainer(container_service_pb2.StopContainerRequest(name="a"))
    while (gone := await anext(events)).WhichOneof("event") == "modified":
        pass
    assert gone.deleted.status.state == container_pb2.CONTAINER_STATE_RUNNING
    call.cancel()
    request = container_service_pb2.WatchContainersRequest(filter=running, resume_token=listed.resume_token)
    resumed = aiter(server.containers.WatchContainers(request))
    assert not (await anext(resumed)).checkpoint.list_complete
    while (event := await anext(resumed)).WhichOneof("event") == "modified":
        pass
    assert event == gone
    request.filter.owner = "alice"
    _, refused = await read_to_end(server.containers.WatchContainers(request))
    assert reason_of(refused) == "INVALID_ARGUMENT"
    request.filter.owner = ""
    await server.store.forget()
    _, expired = await read_to_end(server.containers.WatchContainers(request))
    assert expired is not None
    assert expired.code() is grpc.StatusCode.OUT_OF_RANGE
    assert reason_of(expired) == "RESUME_TOKEN_EXPIRED"
    # A watch continues until the server stops.
    server.watches.drain()
    _, stopped = await read_to_end(resumed)
    assert reason_of(stopped) == "SHUTTING_DOWN"
    _, stopped = await read_to_end(server.containers.WatchContainers(container_service_pb2.WatchContainersRequest()))
    assert reason_of(stopped) == "SHUTTING_DOWN"


async def test_a_watch_of_changes_only_begins_with_a_checkpoint(server: InMemoryServer) -> None:
    await create_container(server)
    request = container_service_pb2.WatchContainersRequest(changes_only=True)
    call = server.containers.WatchContainers(request)
    events = aiter(call)
    first = await anext(events)
    assert first.WhichOneof("event") == "checkpoint"
    assert not first.checkpoint.list_complete
    await create_container(server, "b")
    assert (await anext(events)).added.name == "b"
    call.cancel()


async def test_a_unary_mutation_continues_after_a_disconnect(server: InMemoryServer) -> None:
    await create_container(server)
    gate = server.engine.gates["stop"] = asyncio.Event()
    call = server.containers.StopContainer(container_service_pb2.StopContainerRequest(name="a"))
    await wait_until(lambda: (ResourceKind.CONTAINER, "a") in server.store.locks)
    busy = await server.containers.GetContainer(container_service_pb2.GetContainerRequest(name="a"))
    assert busy.container.status.operation_id == server.store.locks[ResourceKind.CONTAINER, "a"]
    call.cancel()
    gate.set()
    await server.operations.wait_until_ended(list(server.operations.active))
    response = await server.containers.GetContainer(container_service_pb2.GetContainerRequest(name="a"))
    assert response.container.status.state == container_pb2.CONTAINER_STATE_STOPPED


async def test_a_slow_reader_gets_the_latest_progress(server: InMemoryServer) -> None:
    server.engine.has_image = False
    server.engine.pull_progress = [(n, 20_000) for n in range(20_000)]
    call = server.containers.CreateContainer(create_request())
    stream = aiter(call)
    first = await anext(stream)
    await server.operations.wait_until_ended([first.operation.id])
    # The messages that were already sent, and the last one: a few of 20000.
    rest = [event async for event in stream]
    assert rest[-1].HasField("result")
    assert len(rest) < 10_000


async def test_a_cancel_ends_the_stream_with_cancelled(server: InMemoryServer) -> None:
    server.engine.gates["create"] = asyncio.Event()
    call = server.containers.CreateContainer(create_request())
    stream = aiter(call)
    first = await anext(stream)
    request = operation_service_pb2.CancelOperationRequest(id=first.operation.id)
    answer = await server.operation_service.CancelOperation(request)
    assert answer.operation.cancel_requested
    _, error = await read_to_end(stream)
    assert error is not None
    assert error.code() is grpc.StatusCode.CANCELLED
    assert reason_of(error) == "OPERATION_CANCELLED"
    assert not server.store.container_records


async def test_the_result_of_a_deletion_is_empty(server: InMemoryServer) -> None:
    await create_container(server)
    request = container_service_pb2.DeleteContainerRequest(name="a", force=True, request_id=UUID)
    await server.containers.DeleteContainer(request)
    await server.containers.DeleteContainer(request)
    operation_id = server.store.request_records[UUID].operation_id
    watch = server.operation_service.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id))
    events = [event async for event in watch]
    assert events[-1].HasField("result")
    assert not events[-1].result.HasField("container")


async def test_pause_unpause_restart_and_scale(server: InMemoryServer) -> None:
    await create_container(server)
    paused = await server.containers.PauseContainer(container_service_pb2.PauseContainerRequest(name="a"))
    assert paused.container.status.state == container_pb2.CONTAINER_STATE_PAUSED
    unpaused = await server.containers.UnpauseContainer(container_service_pb2.UnpauseContainerRequest(name="a"))
    assert unpaused.container.status.state == container_pb2.CONTAINER_STATE_RUNNING
    restart = server.containers.RestartContainer(container_service_pb2.RestartContainerRequest(name="a"))
    assert [event async for event in restart][-1].HasField("result")
    gpus = container_pb2.GpuRequest(count=2)
    scale = server.containers.ScaleContainer(container_service_pb2.ScaleContainerRequest(name="a", gpus=gpus))
    assert len([event async for event in scale][-1].result.status.gpu_uuids) == 2
    await server.containers.StopContainer(container_service_pb2.StopContainerRequest(name="a"))
    start = server.containers.StartContainer(container_service_pb2.StartContainerRequest(name="a"))
    assert [event async for event in start][-1].result.status.state == container_pb2.CONTAINER_STATE_RUNNING


async def list_all(server: InMemoryServer, **fields: Any) -> list[list[str]]:
    """Return the names on each page."""
    pages: list[list[str]] = []
    request = container_service_pb2.ListContainersRequest(**fields)
    while True:
        answer = await server.containers.ListContainers(request)
        pages.append([found.name for found in answer.containers])
        if not answer.next_page_token:
            return pages
        request.page_token = answer.next_page_token


async def test_pages_are_filled_with_matching_containers(server: InMemoryServer) -> None:
    for number in range(6):
        await create_container(server, f"c{number}", owner="odd" if number % 2 else "even")
    assert await list_all(server, page_size=4) == [["c0", "c1", "c2", "c3"], ["c4", "c5"]]
    odd = container_service_pb2.ContainerFilter(owner="odd")
    assert await list_all(server, page_size=2, filter=odd) == [["c1", "c3"], ["c5"]]
    no_owner = container_service_pb2.ContainerFilter(owner="missing")
    assert await list_all(server, page_size=1, filter=no_owner) == [[]]


async def test_containers_and_operations_are_filtered(server: InMemoryServer) -> None:
    await create_container(server, "a")
    request = create_request("b")
    request.spec.labels["team"] = "x"
    async for _ in server.containers.CreateContainer(request):
        pass
    await server.containers.StopContainer(container_service_pb2.StopContainerRequest(name="b"))
    running = container_service_pb2.ContainerFilter(states=[container_pb2.CONTAINER_STATE_RUNNING])
    assert await list_all(server, filter=running) == [["a"]]
    for value, found in (("", ["b"]), ("x", ["b"]), ("y", [])):
        labelled = container_service_pb2.ContainerFilter(labels={"team": value})
        assert await list_all(server, filter=labelled) == [found]
    other_node = container_service_pb2.ContainerFilter(node="other")
    assert await list_all(server, filter=other_node) == [[]]
    stops = operation_service_pb2.OperationFilter(
        kinds=[operation_pb2.OPERATION_KIND_STOP_CONTAINER], target=operation_pb2.ResourceRef(name="b")
    )
    answer = await server.operation_service.ListOperations(operation_service_pb2.ListOperationsRequest(filter=stops))
    assert [found.target.name for found in answer.operations] == ["b"]


async def test_a_page_ends_before_its_message_becomes_too_large(server: InMemoryServer) -> None:
    large = (await create_container(server, "a0")).name
    record = server.store.container_records[large].value
    for number in range(1, 30):
        name = f"a{number:02}"
        spec = record.spec.changed(env={"A": "x" * 200_000})
        server.store.put(record.changed(name=name, uid=name, spec=spec))
    pages = await list_all(server)
    assert sum(map(len, pages)) == 30
    assert len(pages) > 1


async def test_gpus_and_ports_are_listed(server: InMemoryServer) -> None:
    request = create_request()
    request.spec.gpus.count = 2
    request.spec.ports.add(container_port=80)
    async for _ in server.containers.CreateContainer(request):
        pass
    page = await server.nodes.ListGpus(node_service_pb2.ListGpusRequest(page_size=3))
    assert [gpu.container for gpu in page.gpus] == ["a", "a", ""]
    rest = await server.nodes.ListGpus(node_service_pb2.ListGpusRequest(page_token=page.next_page_token))
    assert [gpu.index for gpu in rest.gpus] == [3, 4, 5, 6, 7]
    assert rest.next_page_token == ""
    scope = list_requests.gpus(node_service_pb2.ListGpusRequest()).scope
    for forged in ("-1", "9" * 5000, "x"):
        request_with_token = node_service_pb2.ListGpusRequest(page_token=tokens.encode_token(scope, forged))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await server.nodes.ListGpus(request_with_token)
        assert reason_of(refused.value) == "INVALID_ARGUMENT"
    claimed = node_service_pb2.GpuFilter(claimed=True, model="a100", container="a")
    assert len((await server.nodes.ListGpus(node_service_pb2.ListGpusRequest(filter=claimed))).gpus) == 2
    ports = await server.nodes.ListPorts(node_service_pb2.ListPortsRequest())
    assert [(port.host_port, port.container, port.container_port) for port in ports.ports] == [(20000, "a", 80)]
    assert ports.range.free_tcp_ports == 9
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await server.nodes.GetNode(node_service_pb2.GetNodeRequest(name="other"))
    assert reason_of(caught.value) == "NODE_NOT_FOUND"


async def test_a_host_path_cannot_be_mounted_if_the_engine_is_on_another_host(tmp_path: Path) -> None:
    async with serve(tmp_path, allowed_host_paths=("/srv",)) as server:
        request = create_request()
        request.spec.mounts.add(host_path="/srv/data", target="/data")
        _, error = await read_to_end(server.containers.CreateContainer(request))
        assert reason_of(error) == "HOST_PATH_FAILED"
        assert error is not None
        assert "the engine runs on another host" in (error.details() or "")
