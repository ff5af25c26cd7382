"""The Python client: what it sends, what it survives, and what it raises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import gpudock
import grpc
import pytest
from gpudock import Client
from gpudock._exec import ExecExit
from gpudock.v1 import container_service_pb2 as pb
from gpudock.v1 import exec_pb2, node_service_pb2, operation_pb2, operation_service_pb2
from gpudock.v1.watch_pb2 import WatchCheckpoint

from tests.clients import messages
from tests.clients.scripted import Context, ScriptedServer, abort, lose, refusal, saying, unreadable_details
from tests.rig.patience import limit

Created = pb.CreateContainerResponse
Watched = operation_service_pb2.WatchOperationResponse


async def created(_: Any, __: Context) -> AsyncIterator[Created]:
    yield Created(operation=messages.operation(message="pulling"))
    yield Created(operation=messages.operation(message="starting"))
    yield Created(result=messages.container())


async def broken(_: Any, context: Context) -> AsyncIterator[Created]:
    yield Created(operation=messages.operation(message="pulling"))
    await lose(context)


async def lost(_: Any, context: Context) -> AsyncIterator[Created]:
    await lose(context)
    yield Created()


async def watched(_: Any, __: Context) -> AsyncIterator[Watched]:
    yield Watched(operation=messages.operation(message="starting"))
    yield Watched(result=operation_service_pb2.OperationResult(container=messages.container()))


async def test_an_operation_gives_its_snapshots_and_then_its_result(server: ScriptedServer, client: Client) -> None:
    server.on("CreateContainer", created)
    call = client.containers.create("train", "busybox", gpus=2, ports=[80], command=["sleep", "9"], restart_policy="no")
    assert [snapshot.message async for snapshot in call] == ["pulling", "starting"]
    assert (await call).name == "train"
    assert call.operation_id == messages.OPERATION_ID
    [request] = server.requests["CreateContainer"]
    assert request.spec.gpus.count == 2
    assert request.spec.ports[0].container_port == 80
    assert list(request.spec.command) == ["sleep", "9"]
    assert request.spec.restart_policy.policy == gpudock.RestartPolicyKind.RESTART_POLICY_KIND_NO
    assert request.pull_policy == pb.PULL_POLICY_MISSING


async def test_options_take_the_place_of_what_a_whole_spec_says(server: ScriptedServer, client: Client) -> None:
    server.on("CreateContainer", created)
    spec = gpudock.ContainerSpec(image="a", command=["one"], cpus=1, env={"A": "1"})
    await client.containers.create("train", spec, command=["two"], stop_timeout=timedelta(seconds=3))
    sent = server.requests["CreateContainer"][0].spec
    assert (sent.image, list(sent.command), sent.cpus, dict(sent.env)) == ("a", ["two"], 1, {"A": "1"})
    assert sent.stop_timeout.seconds == 3
    assert list(spec.command) == ["one"]


async def test_an_update_names_what_it_changes_and_what_it_clears(server: ScriptedServer, client: Client) -> None:
    async def updated(_: Any, __: Context) -> AsyncIterator[pb.UpdateContainerResponse]:
        yield pb.UpdateContainerResponse(result=messages.container())

    server.on("UpdateContainer", updated)
    policy = gpudock.RevisionPolicy(keep_revisions=3)
    await client.containers.update("train", ports=[], env={"A": "1"}, health_check=None, revision_policy=policy)
    await client.containers.update("train", image="other", files="carry-commit", pull="always", snapshots="never")
    first, second = server.requests["UpdateContainer"]
    assert sorted(first.update_mask.paths) == ["env", "health_check", "ports", "revision_policy"]
    assert first.spec == gpudock.ContainerSpec(env={"A": "1"}, revision_policy=policy)
    assert (list(second.update_mask.paths), second.spec.image) == (["image"], "other")
    assert (second.files, second.pull_policy) == (pb.FILES_POLICY_CARRY_COMMIT, pb.PULL_POLICY_ALWAYS)
    assert second.snapshots == gpudock.SnapshotPolicy.SNAPSHOT_POLICY_NEVER


async def test_a_clone_names_what_differs(server: ScriptedServer, client: Client) -> None:
    async def cloned(_: Any, __: Context) -> AsyncIterator[pb.CloneContainerResponse]:
        yield pb.CloneContainerResponse(result=messages.container("other"))

    server.on("CloneContainer", cloned)
    made = await client.containers.clone("train", "other", revision=3, owner="me", create_only=True, gpus=1, ports=[])
    await client.containers.clone("train", "same")
    assert made.name == "other"
    first, second = server.requests["CloneContainer"]
    assert (first.source, first.name, first.revision, first.owner) == ("train", "other", 3, "me")
    assert sorted(first.update_mask.paths) == ["gpus", "ports"]
    assert (first.spec.gpus.count, first.create_only, bool(first.request_id)) == (1, True, True)
    assert (list(second.update_mask.paths), second.revision, second.spec) == ([], 0, gpudock.ContainerSpec())


async def test_history_is_read_returned_to_and_pruned(server: ScriptedServer, client: Client) -> None:
    async def returned(_: Any, __: Context) -> AsyncIterator[pb.RollbackContainerResponse]:
        yield pb.RollbackContainerResponse(result=messages.container())

    one, two = (gpudock.ContainerRevision(container="train", revision=number) for number in (1, 2))
    server.on(
        "ListContainerRevisions",
        saying(pb.ListContainerRevisionsResponse(revisions=[one], next_page_token="next")),  # noqa: S106 - no secret
        saying(pb.ListContainerRevisionsResponse(revisions=[two])),
    )
    assert await client.containers.revisions("train", page_size=1) == [one, two]
    assert [each.page_token for each in server.requests["ListContainerRevisions"]] == ["", "next"]
    server.on("GetContainerRevision", saying(pb.GetContainerRevisionResponse(revision=two)))
    assert await client.containers.revision("train") == two
    assert server.requests["GetContainerRevision"][0].revision == 0
    server.on("RollbackContainer", returned)
    assert (await client.containers.rollback("train", 1, spec_only=True, snapshots="cheap")).name == "train"
    [request] = server.requests["RollbackContainer"]
    assert (request.revision, request.spec_only, bool(request.request_id)) == (1, True, True)
    assert request.snapshots == gpudock.SnapshotPolicy.SNAPSHOT_POLICY_CHEAP
    server.on("DeleteContainerRevision", saying(pb.DeleteContainerRevisionResponse()))
    await client.containers.delete_revision("train", 1, etag="e")
    [deleted] = server.requests["DeleteContainerRevision"]
    assert (deleted.name, deleted.revision, deleted.etag, bool(deleted.request_id)) == ("train", 1, "e", True)


async def test_a_dropped_stream_is_attached_to_again(server: ScriptedServer, client: Client) -> None:
    server.on("CreateContainer", broken)
    server.on("WatchOperation", watched)
    call = client.containers.create("train", "busybox")
    assert [snapshot.message async for snapshot in call] == ["pulling", "starting"]
    assert (await call).name == "train"
    assert [request.id for request in server.requests["WatchOperation"]] == [messages.OPERATION_ID]
    assert len(server.requests["CreateContainer"]) == 1


async def test_a_watch_goes_on_behind_what_was_told(server: ScriptedServer, client: Client) -> None:
    one, two = messages.container(), messages.container()
    two.revision = 2

    async def begins(_: Any, context: Context) -> AsyncIterator[pb.WatchContainersResponse]:
        yield messages.watched("t1", added=one)
        yield messages.watched("t2", checkpoint=WatchCheckpoint(list_complete=True))
        await lose(context)

    async def stops(_: Any, context: Context) -> AsyncIterator[pb.WatchContainersResponse]:
        yield messages.watched("t3", modified=two)
        await abort(context, grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")

    async def expires(_: Any, context: Context) -> AsyncIterator[pb.WatchContainersResponse]:
        yield messages.watched("t4", deleted=two)
        await abort(context, grpc.StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_EXPIRED")

    server.on("WatchContainers", begins, stops, lost, expires)
    watch = client.containers.watch(states=["running"], owner="me", changes_only=True)
    told = [await anext(watch) for _ in range(3)]
    assert [(event.kind, event.item and event.item.revision, event.resume_token) for event in told] == [
        ("added", one.revision, "t1"),
        ("modified", 2, "t3"),
        ("deleted", 2, "t4"),
    ]
    with pytest.raises(gpudock.OutOfRange):
        await anext(watch)
    requests = server.requests["WatchContainers"]
    assert [request.resume_token for request in requests] == ["", "t2", "t3", "t3"]
    assert all(request.filter == requests[0].filter and request.changes_only for request in requests)
    assert watch.resume_token == told[-1].resume_token

    server.on("WatchContainers", begins)
    patient = client.containers.watch(resume_token=told[0].resume_token, checkpoints=True)
    assert [(await anext(patient)).kind for _ in range(2)] == ["added", "checkpoint"]
    await patient.aclose()
    assert server.requests["WatchContainers"][-1].resume_token == told[0].resume_token


async def test_a_stream_lost_before_its_first_snapshot_is_begun_again_with_the_same_request_id(
    server: ScriptedServer, client: Client
) -> None:
    server.on("CreateContainer", lost, lost, created)
    assert (await client.containers.create("train", "busybox")).name == "train"
    ids = {request.request_id for request in server.requests["CreateContainer"]}
    assert len(server.requests["CreateContainer"]) == 3
    assert len(ids) == 1
    assert ids != {""}


async def test_an_operation_survives_a_restart_of_the_server(server: ScriptedServer, client: Client) -> None:
    async def endless(_: Any, __: Context) -> AsyncIterator[Created]:
        yield Created(operation=messages.operation(message="pulling"))
        await asyncio.Event().wait()

    server.on("CreateContainer", endless)
    server.on("WatchOperation", watched)
    call = client.containers.create("train", "busybox")
    assert await call.started() == messages.OPERATION_ID
    await server.stop()
    await server.start()
    assert (await call).name == "train"


async def test_a_read_that_timed_out_can_be_followed_by_another(server: ScriptedServer, client: Client) -> None:
    async def slow(_: Any, __: Context) -> AsyncIterator[Created]:
        yield Created(operation=messages.operation(message="pulling"))
        await asyncio.Event().wait()

    server.on("CreateContainer", slow)
    server.on("WatchOperation", watched)
    call = client.containers.create("train", "busybox")
    await call.started()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call.result(), 0.05)
    assert (await call).name == "train"


async def test_the_failure_of_an_operation_is_not_taken_for_a_lost_connection(
    server: ScriptedServer, client: Client
) -> None:
    async def fails(_: Any, context: Context) -> AsyncIterator[Created]:
        yield Created(operation=messages.failed(14, "ENGINE_UNAVAILABLE"))
        await abort(context, grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE", retry_after=0.01)

    server.on("CreateContainer", fails)
    call = client.containers.create("train", "busybox")
    for _ in range(2):
        with pytest.raises(gpudock.Unavailable) as caught:
            await call
        assert caught.value.reason == "ENGINE_UNAVAILABLE"
    assert not server.requests["WatchOperation"]


async def test_reattaching_ends_when_nothing_new_comes(server: ScriptedServer) -> None:
    server.on("CreateContainer", broken)

    async def same_again(_: Any, context: Context) -> AsyncIterator[Watched]:
        yield Watched(operation=messages.operation(message="pulling"))
        await lose(context)

    server.on("WatchOperation", same_again)
    async with Client(server.address, reattach_for=0.5) as client:
        with pytest.raises(gpudock.Unavailable) as caught:
            await client.containers.create("train", "busybox")
    assert not caught.value.answered
    assert 1 <= len(server.requests["WatchOperation"]) <= 8


BEGINNINGS: dict[str, Callable[[Client], gpudock.OperationCall[Any]]] = {
    "create": lambda client: client.containers.create("train", "busybox"),
    "start": lambda client: client.containers.start("train"),
    "restart": lambda client: client.containers.restart("train"),
    "scale": lambda client: client.containers.scale("train", gpus=1),
    "watch": lambda client: client.operations.watch(messages.OPERATION_ID),
}


@pytest.mark.parametrize("begin", BEGINNINGS.values(), ids=BEGINNINGS)
async def test_an_operation_that_nobody_has_answered_for_is_given_up_like_any_call(
    server: ScriptedServer, begin: Callable[[Client], gpudock.OperationCall[Any]]
) -> None:
    await server.stop()
    async with Client(server.address, retry_for=0.2, reattach_for=3600) as client:
        with pytest.raises(gpudock.Unavailable):
            await asyncio.wait_for(begin(client).result(), limit(20))


async def test_a_plan_needs_no_result(server: ScriptedServer, client: Client) -> None:
    async def planned(_: Any, __: Context) -> AsyncIterator[pb.ScaleContainerResponse]:
        plan = operation_pb2.OperationPlan(stages=["stop"], gpus_to_claim=2)
        yield pb.ScaleContainerResponse(
            operation=operation_pb2.Operation(state=operation_pb2.OPERATION_STATE_PLANNED, plan=plan)
        )

    server.on("ScaleContainer", planned)
    call = client.containers.scale("train", gpus=4, validate_only=True)
    assert (await call.plan()).gpus_to_claim == 2
    assert [snapshot.plan.gpus_to_claim async for snapshot in call] == [2]
    with pytest.raises(ValueError, match="plan"):
        await call
    assert server.requests["ScaleContainer"][0].validate_only
    assert not server.requests["ScaleContainer"][0].HasField("cpus")


async def test_cancel_goes_to_the_operation(server: ScriptedServer, client: Client) -> None:
    async def until_cancelled(_: Any, context: Context) -> AsyncIterator[Created]:
        yield Created(operation=messages.operation())
        await cancelled.wait()
        await abort(context, grpc.StatusCode.CANCELLED, "OPERATION_CANCELLED")

    cancelled = asyncio.Event()
    server.on("CreateContainer", until_cancelled)

    async def cancel(_: Any, __: Context) -> operation_service_pb2.CancelOperationResponse:
        cancelled.set()
        return operation_service_pb2.CancelOperationResponse(operation=messages.operation())

    server.on("CancelOperation", cancel)
    call = client.containers.create("train", "busybox")
    assert (await call.cancel()).id == messages.OPERATION_ID
    with pytest.raises(gpudock.Cancelled):
        await call
    assert server.requests["CancelOperation"][0].id == messages.OPERATION_ID


async def test_an_operation_without_a_container_has_no_result(server: ScriptedServer, client: Client) -> None:
    async def deleted(_: Any, __: Context) -> AsyncIterator[Watched]:
        yield Watched(operation=messages.operation())
        yield Watched(result=operation_service_pb2.OperationResult())

    server.on("WatchOperation", deleted)
    assert await client.operations.watch(messages.OPERATION_ID) is None


async def test_a_mutation_is_repeated_with_the_same_request_id(server: ScriptedServer, client: Client) -> None:
    unavailable = refusal(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", retry_after=0.01)
    server.on(
        "StopContainer", unavailable, unavailable, saying(pb.StopContainerResponse(container=messages.container()))
    )
    assert (await client.containers.stop("train", timeout=2.5)).name == "train"
    requests = server.requests["StopContainer"]
    assert len(requests) == 3
    assert len({request.request_id for request in requests}) == 1
    assert requests[0].timeout.nanos == 500_000_000
    await client.containers.stop("train", request_id="mine")
    assert requests[-1].request_id == "mine"
    assert not requests[-1].HasField("timeout")


async def test_repetition_ends(server: ScriptedServer) -> None:
    server.on("GetContainer", refusal(grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN", retry_after=60.0))
    async with Client(server.address, retry_for=1.0) as client:
        with pytest.raises(gpudock.Unavailable) as caught:
            await client.containers.get("train")
    assert caught.value.retry_after == 60.0
    assert len(server.requests["GetContainer"]) == 1


TABLE = [
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


async def test_each_status_has_its_exception(server: ScriptedServer, client: Client) -> None:
    for code, reason, kind in TABLE:
        server.on("GetContainer", refusal(code, reason, "what happened"))
        with pytest.raises(gpudock.GpudockError) as caught:
            await client.containers.get("train")
        assert type(caught.value) is kind
        assert (caught.value.code, caught.value.reason, caught.value.message) == (code, reason, "what happened")
        assert caught.value.answered


async def test_an_error_carries_every_detail(server: ScriptedServer, client: Client) -> None:
    violations = (("name", "has to begin with a letter"), ("spec.memory_bytes", "at least 6 MiB"))
    details: dict[str, Any] = {"metadata": {"operation_id": "17"}, "violations": violations, "retry_after": 1.5}
    server.on("PauseContainer", refusal(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT", **details))
    with pytest.raises(gpudock.InvalidArgument) as caught:
        await client.containers.pause("train")
    error = caught.value
    assert (error.metadata, error.operation_id, error.retry_after) == ({"operation_id": "17"}, "17", 1.5)
    assert [(each.field, each.description) for each in error.violations] == list(violations)
    assert str(error.violations[1]) == "spec.memory_bytes: at least 6 MiB"


async def test_details_that_cannot_be_read_leave_the_status(server: ScriptedServer, client: Client) -> None:
    async def garbled(_: Any, context: Context) -> None:
        await context.abort(grpc.StatusCode.NOT_FOUND, "none", (("grpc-status-details-bin", unreadable_details()),))

    server.on("GetContainer", garbled)
    with pytest.raises(gpudock.NotFound) as caught:
        await client.containers.get("train")
    assert (caught.value.reason, caught.value.message, caught.value.answered) == ("NOT_FOUND", "none", False)


async def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(gpudock.Unavailable, match="does not answer"):
        async with gpudock.connect(f"unix:{tmp_path}/none", timeout=0.2):
            pass


async def test_connect_and_the_environment(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("s3cret\n")
    monkeypatch.setenv("GPUDOCK_ADDRESS", server.address.removeprefix("unix:"))
    monkeypatch.setenv("GPUDOCK_TOKEN_FILE", str(tmp_path / "token"))
    server.on("GetNode", saying(node_service_pb2.GetNodeResponse()))
    async with gpudock.connect() as client:
        await client.node.get()
    assert server.metadata[0]["authorization"] == "Bearer s3cret"
    assert str(server.metadata[0]["user-agent"]).startswith("gpudock/")


async def test_a_token_does_not_travel_in_the_clear() -> None:
    with pytest.raises(ValueError, match="TLS"):
        Client("gpu1.example.com:50051", token="s3cret")  # noqa: S106 - nobody's
    for address in ("127.0.0.1:50051", "[::1]:50051", "dns:///localhost:50051"):
        await Client(address, token="s3cret").close()  # noqa: S106 - nobody's


async def test_lists_come_whole_and_piece_by_piece(server: ScriptedServer, client: Client) -> None:
    async def page(request: pb.ListContainersRequest, _: Context) -> pb.ListContainersResponse:
        if request.page_token:
            return pb.ListContainersResponse(containers=[messages.container("c")])
        both = [messages.container("a"), messages.container("b")]
        return pb.ListContainersResponse(containers=both, next_page_token="more")  # noqa: S106 - of a page

    server.on("ListContainers", page)
    listing = client.containers.list(states=["running"], labels={"team": ""})
    assert [item.name for item in await listing] == ["a", "b", "c"]
    assert [item.name async for item in listing] == ["a", "b", "c"]
    for request in server.requests["ListContainers"]:
        assert list(request.filter.states) == [gpudock.ContainerState.CONTAINER_STATE_RUNNING]
        assert dict(request.filter.labels) == {"team": ""}
    with pytest.raises(ValueError, match="running, paused"):
        client.containers.list(states=["walking"])


Answer = exec_pb2.ExecContainerResponse


async def shell(requests: AsyncIterator[exec_pb2.ExecContainerRequest], _: Context) -> AsyncIterator[Answer]:
    """Says what it is told: input to stdout, the rest to stderr, and ends with code 3 when input ends."""
    async for request in requests:
        match request.WhichOneof("message"):
            case "start":
                yield Answer(started=exec_pb2.ExecStarted(exec_id=request.start.exec_id or "made"))
            case "stdin":
                yield Answer(stdout=request.stdin)
            case "close_stdin":
                yield Answer(exited=exec_pb2.ExecExited(code=3))
                return
            case "resize":
                yield Answer(stderr=f"{request.resize.columns}x{request.resize.rows}".encode())
            case "signal":
                yield Answer(exited=exec_pb2.ExecExited(signal=request.signal.signal))
                return


async def test_an_exec_has_streams_and_an_exit(server: ScriptedServer, client: Client) -> None:
    server.on("ExecContainer", shell)
    async with client.containers.exec("train", ["sh"], stdin=True, tty=True, size=(80, 24), timeout=1.5) as session:
        assert session.exec_id == "made"
        await session.write(b"hello")
        await session.resize(100, 40)
        await session.close_stdin()
        output = [chunk async for chunk in session.output()]
        exited = await session.exit()
        assert (exited.code, exited.returncode, exited.timed_out) == (3, 3, False)
        with pytest.raises(BrokenPipeError):
            await session.write(b"too late")
    assert output == [("stdout", b"hello"), ("stderr", b"100x40")]


@pytest.mark.parametrize(
    ("name", "number"), [("SIGKILL", 137), ("SIGTERM", 143), ("SIGRTMIN+3", 165), ("SIGRTMAX-1", 191)]
)
async def test_a_signal_is_a_return_code(server: ScriptedServer, client: Client, name: str, number: int) -> None:
    server.on("ExecContainer", shell)
    async with client.containers.exec("train", ["sh"]) as session:
        await session.signal(name)
        assert await session.exit() == ExecExit(code=None, signal=name, message="", timed_out=False)
        assert (await session.exit()).returncode == number


async def test_run_collects_and_caps_output(server: ScriptedServer, client: Client) -> None:
    server.on("ExecContainer", shell)
    data = bytes(range(256)) * 4096
    done = await client.containers.run("train", ["cat"], input=data)
    assert (done.stdout, done.stderr, done.returncode, done.truncated) == (data, b"", 3, False)
    capped = await client.containers.run("train", ["cat"], input=data, limit_bytes=100_000)
    assert (capped.stdout, capped.truncated) == (data[:100_000], True)


async def test_run_of_a_command_that_does_not_read_its_input(server: ScriptedServer, client: Client) -> None:
    async def deaf(requests: AsyncIterator[Any], _: Context) -> AsyncIterator[Answer]:
        await anext(requests)
        yield Answer(started=exec_pb2.ExecStarted(exec_id="made"))
        yield Answer(exited=exec_pb2.ExecExited(code=0))

    server.on("ExecContainer", deaf)
    done = await client.containers.run("train", ["true"], input=b"x" * 8_000_000)
    assert done.returncode == 0


async def test_an_exec_that_is_refused_or_breaks(server: ScriptedServer, client: Client) -> None:
    async def refused(_: Any, context: Context) -> AsyncIterator[Answer]:
        await abort(context, grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING")
        yield Answer()

    async def breaks(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Answer]:
        await anext(requests)
        yield Answer(started=exec_pb2.ExecStarted(exec_id="made"))
        yield Answer(stdout=b"half")
        await lose(context)

    server.on("ExecContainer", refused)
    with pytest.raises(gpudock.PreconditionFailed) as caught:
        await client.containers.run("train", ["sh"], input=b"x")
    assert caught.value.reason == "CONTAINER_NOT_RUNNING"
    server.on("ExecContainer", breaks)
    async with client.containers.exec("train", ["sh"]) as session:
        with pytest.raises(gpudock.Unavailable):
            await session.exit()
        with pytest.raises(gpudock.Unavailable):
            await session.exit()
    assert len(server.requests["ExecContainer"]) == 2


async def test_a_refusal_is_not_lost_to_a_write_that_fails_at_the_same_time(
    server: ScriptedServer, client: Client
) -> None:
    """https://github.com/grpc/grpc/issues/36066: about every second one would be INTERNAL."""

    async def refused(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Answer]:
        await anext(requests)
        yield Answer(started=exec_pb2.ExecStarted(exec_id="made"))
        for _ in range(20):
            await anext(requests)
        await abort(context, grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING")

    server.on("ExecContainer", refused)
    for _ in range(20):
        with pytest.raises(gpudock.PreconditionFailed) as caught:
            await client.containers.run("train", ["sh"], input=bytes(2**23))
        assert caught.value.reason == "CONTAINER_NOT_RUNNING"


async def test_output_that_was_not_read_when_a_write_fails_is_read_all_the_same(
    server: ScriptedServer, client: Client
) -> None:
    async def heedless(requests: AsyncIterator[Any], __: Context) -> AsyncIterator[Answer]:
        await anext(requests)
        yield Answer(started=exec_pb2.ExecStarted(exec_id="made"))
        for _ in range(5):
            await anext(requests)
        for _ in range(40):
            yield Answer(stdout=bytes(1000))
        yield Answer(exited=exec_pb2.ExecExited(code=3))

    server.on("ExecContainer", heedless)
    async with client.containers.exec("train", ["sh"], stdin=True) as session:
        with pytest.raises(BrokenPipeError):
            await session.write(bytes(2**26))
        assert sum([len(data) async for _, data in session.output()]) == 40_000
        assert (await session.exit()).code == 3


async def test_leaving_an_exec_hangs_up(server: ScriptedServer, client: Client) -> None:
    hung_up = asyncio.Event()

    async def endless(requests: AsyncIterator[Any], _: Context) -> AsyncIterator[Answer]:
        await anext(requests)
        yield Answer(started=exec_pb2.ExecStarted(exec_id="made"))
        try:
            await asyncio.Event().wait()
        finally:
            hung_up.set()

    server.on("ExecContainer", endless)
    async with client.containers.exec("train", ["sleep", "inf"]):
        pass
    await asyncio.wait_for(hung_up.wait(), limit(5))


async def test_a_commit_gives_the_image(server: ScriptedServer, client: Client) -> None:
    async def committed(_: Any, context: Context) -> AsyncIterator[pb.CommitContainerResponse]:
        yield pb.CommitContainerResponse(operation=messages.operation())
        if len(server.requests["CommitContainer"]) > 1:
            await lose(context)
        yield pb.CommitContainerResponse(result=gpudock.CommittedImage(id="sha256:1", name="team/model:v1"))

    async def watched_image(_: Any, __: Context) -> AsyncIterator[Watched]:
        image = gpudock.CommittedImage(id="sha256:2")
        yield Watched(result=operation_service_pb2.OperationResult(image=image))

    server.on("CommitContainer", committed)
    server.on("WatchOperation", watched_image)
    image = await client.containers.commit("train", "team/model", tag="v1", changes=["CMD true"], pause=False)
    assert (image.id, image.name) == ("sha256:1", "team/model:v1")
    [request] = server.requests["CommitContainer"]
    assert (request.repository, request.tag, list(request.changes)) == ("team/model", "v1", ["CMD true"])
    assert request.HasField("pause")
    assert not request.pause
    # Also where the connection broke, and by the operation alone.
    assert (await client.containers.commit("train", "team/model")).id == "sha256:2"
    assert server.requests["CommitContainer"][1].pause
    left = await client.operations.watch(messages.OPERATION_ID)
    assert isinstance(left, gpudock.CommittedImage)
