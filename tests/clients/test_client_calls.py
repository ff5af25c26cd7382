"""Calls of the Python client: repetition, errors, connections, lists and watches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gpudock
import grpc
import pytest
from gpudock import Client
from gpudock.v1 import container_service_pb2 as pb
from gpudock.v1 import node_service_pb2
from gpudock.v1.watch_pb2 import WatchCheckpoint

from tests.clients import messages
from tests.clients.scripted_server import (
    Context,
    ScriptedServer,
    abort,
    drop_connection,
    drop_stream,
    error_reply,
    reply_with,
    unreadable_details,
)


async def test_a_watch_resumes_after_the_last_event(server: ScriptedServer, client: Client) -> None:
    first, second = messages.container(), messages.container()
    second.revision = 2

    async def begins(_: Any, context: Context) -> AsyncIterator[pb.WatchContainersResponse]:
        yield messages.watch_event("t1", added=first)
        yield messages.watch_event("t2", checkpoint=WatchCheckpoint(list_complete=True))
        await drop_connection(context)

    async def stops(_: Any, context: Context) -> AsyncIterator[pb.WatchContainersResponse]:
        yield messages.watch_event("t3", modified=second)
        await abort(context, grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")

    async def expires(_: Any, context: Context) -> AsyncIterator[pb.WatchContainersResponse]:
        yield messages.watch_event("t4", deleted=second)
        await abort(context, grpc.StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_EXPIRED")

    server.on("WatchContainers", begins, stops, drop_stream, expires)
    watch = client.containers.watch(states=["running"], owner="me", changes_only=True)
    events = [await anext(watch) for _ in range(3)]
    assert [(event.kind, event.item and event.item.revision, event.resume_token) for event in events] == [
        ("added", first.revision, "t1"),
        ("modified", 2, "t3"),
        ("deleted", 2, "t4"),
    ]
    with pytest.raises(gpudock.OutOfRange):
        await anext(watch)
    requests = server.requests["WatchContainers"]
    assert [request.resume_token for request in requests] == ["", "t2", "t3", "t3"]
    assert all(request.filter == requests[0].filter and request.changes_only for request in requests)
    assert watch.resume_token == events[-1].resume_token

    server.on("WatchContainers", begins)
    with_checkpoints = client.containers.watch(resume_token=events[0].resume_token, checkpoints=True)
    assert [(await anext(with_checkpoints)).kind for _ in range(2)] == ["added", "checkpoint"]
    await with_checkpoints.aclose()
    assert server.requests["WatchContainers"][-1].resume_token == events[0].resume_token


async def test_a_mutation_is_repeated_with_the_same_request_id(server: ScriptedServer, client: Client) -> None:
    unavailable = error_reply(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", retry_after=0.01)
    server.on(
        "StopContainer", unavailable, unavailable, reply_with(pb.StopContainerResponse(container=messages.container()))
    )
    assert (await client.containers.stop("train", timeout=2.5)).name == "train"
    requests = server.requests["StopContainer"]
    assert len(requests) == 3
    assert len({request.request_id for request in requests}) == 1
    assert requests[0].timeout.nanos == 500_000_000
    await client.containers.stop("train", request_id="mine")
    assert requests[-1].request_id == "mine"
    assert not requests[-1].HasField("timeout")


async def test_a_call_is_not_repeated_beyond_its_time_limit(server: ScriptedServer) -> None:
    server.on("GetContainer", error_reply(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN", retry_after=60.0))
    async with Client(server.address, retry_for=1.0) as client:
        with pytest.raises(gpudock.Unavailable) as caught:
            await client.containers.get("train")
    assert caught.value.retry_after == 60.0
    assert len(server.requests["GetContainer"]) == 1


EXCEPTIONS = [
    (grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND", gpudock.NotFound),
    (grpc.StatusCode.ALREADY_EXISTS, "CONTAINER_EXISTS", gpudock.AlreadyExists),
    (grpc.StatusCode.ABORTED, "CONTAINER_BUSY", gpudock.Busy),
    (grpc.StatusCode.ABORTED, "STALE_ETAG", gpudock.Aborted),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "GPU_EXHAUSTED", gpudock.Exhausted),
    (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", gpudock.InvalidArgument),
    (grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_PAUSED", gpudock.PreconditionFailed),
    (grpc.StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_EXPIRED", gpudock.OutOfRange),
    (grpc.StatusCode.CANCELLED, "OPERATION_CANCELLED", gpudock.Cancelled),
    (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE", gpudock.DeadlineExceeded),
    (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", gpudock.Unauthenticated),
    (grpc.StatusCode.PERMISSION_DENIED, "HOST_PATH_FORBIDDEN", gpudock.PermissionDenied),
    (grpc.StatusCode.UNIMPLEMENTED, "UNIMPLEMENTED", gpudock.Unimplemented),
    (grpc.StatusCode.INTERNAL, "INTERNAL", gpudock.Internal),
    (grpc.StatusCode.UNKNOWN, "UNKNOWN", gpudock.Internal),
    (grpc.StatusCode.DATA_LOSS, "DATA_LOSS", gpudock.Internal),
]


async def test_each_status_has_an_exception(server: ScriptedServer, client: Client) -> None:
    for code, reason, kind in EXCEPTIONS:
        server.on("GetContainer", error_reply(code, reason, "message"))
        with pytest.raises(gpudock.GpudockError) as caught:
            await client.containers.get("train")
        assert type(caught.value) is kind
        assert (caught.value.code, caught.value.reason, caught.value.message) == (code, reason, "message")
        assert caught.value.answered


async def test_an_exception_has_all_details_of_its_error(server: ScriptedServer, client: Client) -> None:
    violations = (("name", "has to begin with a letter"), ("spec.memory_bytes", "at least 6 MiB"))
    details: dict[str, Any] = {"metadata": {"operation_id": "17"}, "violations": violations, "retry_after": 1.5}
    server.on("PauseContainer", error_reply(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", **details))
    with pytest.raises(gpudock.InvalidArgument) as caught:
        await client.containers.pause("train")
    error = caught.value
    assert (error.metadata, error.operation_id, error.retry_after) == ({"operation_id": "17"}, "17", 1.5)
    assert [(each.field, each.description) for each in error.violations] == list(violations)
    assert str(error.violations[1]) == "spec.memory_bytes: at least 6 MiB"


async def test_an_error_with_unreadable_details_keeps_its_status(server: ScriptedServer, client: Client) -> None:
    async def garbled(_: Any, context: Context) -> None:
        await context.abort(grpc.StatusCode.NOT_FOUND, "none", (("grpc-status-details-bin", unreadable_details()),))

    server.on("GetContainer", garbled)
    with pytest.raises(gpudock.NotFound) as caught:
        await client.containers.get("train")
    assert (caught.value.reason, caught.value.message, caught.value.answered) == ("NOT_FOUND", "none", False)


async def test_connect_fails_without_a_daemon(tmp_path: Path) -> None:
    with pytest.raises(gpudock.Unavailable, match="does not answer"):
        async with gpudock.connect(f"unix:{tmp_path}/missing.sock", timeout=0.2):
            pass


async def test_connect_reads_the_environment(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    monkeypatch.setenv("GPUDOCK_ADDRESS", server.address.removeprefix("unix:"))
    monkeypatch.setenv("GPUDOCK_TOKEN_FILE", str(tmp_path / "token"))
    server.on("GetNode", reply_with(node_service_pb2.GetNodeResponse()))
    async with gpudock.connect() as client:
        await client.node.get()
    assert server.metadata[0]["authorization"] == "Bearer s3cret"
    assert str(server.metadata[0]["user-agent"]).startswith("gpudock/")


async def test_a_token_is_not_sent_without_tls() -> None:
    with pytest.raises(ValueError, match="TLS"):
        Client("gpu1.example.com:50051", token="s3cret")  # noqa: S106 - a test token
    for address in ("127.0.0.1:50051", "[::1]:50051", "dns:///localhost:50051"):
        await Client(address, token="s3cret").close()  # noqa: S106 - a test token


async def test_lists_are_awaited_as_a_whole_or_iterated(server: ScriptedServer, client: Client) -> None:
    async def page(request: pb.ListContainersRequest, _: Context) -> pb.ListContainersResponse:
        if request.page_token:
            return pb.ListContainersResponse(containers=[messages.container("c")])
        both = [messages.container("a"), messages.container("b")]
        return pb.ListContainersResponse(containers=both, next_page_token="more")  # noqa: S106 - a page token

    server.on("ListContainers", page)
    listing = client.containers.list(states=["running"], labels={"team": ""})
    assert [item.name for item in await listing] == ["a", "b", "c"]
    assert [item.name async for item in listing] == ["a", "b", "c"]
    for request in server.requests["ListContainers"]:
        assert list(request.filter.states) == [gpudock.ContainerState.CONTAINER_STATE_RUNNING]
        assert dict(request.filter.labels) == {"team": ""}
    with pytest.raises(ValueError, match="running, paused"):
        client.containers.list(states=["unknown"])
