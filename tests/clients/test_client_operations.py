"""Operations of the Python client: requests, progress, results, and dropped connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import gpudock
import grpc
import pytest
from gpudock import Client
from gpudock.v1 import container_service_pb2 as pb
from gpudock.v1 import operation_pb2, operation_service_pb2

from tests.clients import messages
from tests.clients.scripted_server import (
    Context,
    ScriptedServer,
    abort,
    drop_connection,
    drop_stream,
    reply_with,
)
from tests.rig.patience import limit

Created = pb.CreateContainerResponse
Watched = operation_service_pb2.WatchOperationResponse


async def created(_: Any, __: Context) -> AsyncIterator[Created]:
    yield Created(operation=messages.operation(message="pulling"))
    yield Created(operation=messages.operation(message="starting"))
    yield Created(result=messages.container())


async def created_then_dropped(_: Any, context: Context) -> AsyncIterator[Created]:
    yield Created(operation=messages.operation(message="pulling"))
    await drop_connection(context)


async def watched(_: Any, __: Context) -> AsyncIterator[Watched]:
    yield Watched(operation=messages.operation(message="starting"))
    yield Watched(result=operation_service_pb2.OperationResult(container=messages.container()))


async def test_a_call_yields_the_operation_and_returns_its_result(server: ScriptedServer, client: Client) -> None:
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


async def test_options_override_the_fields_of_a_spec(server: ScriptedServer, client: Client) -> None:
    server.on("CreateContainer", created)
    spec = gpudock.ContainerSpec(image="a", command=["one"], cpus=1, env={"A": "1"})
    await client.containers.create("train", spec, command=["two"], stop_timeout=timedelta(seconds=3))
    sent = server.requests["CreateContainer"][0].spec
    assert (sent.image, list(sent.command), sent.cpus, dict(sent.env)) == ("a", ["two"], 1, {"A": "1"})
    assert sent.stop_timeout.seconds == 3
    assert list(spec.command) == ["one"]


async def test_an_update_names_the_fields_that_it_changes_and_clears(server: ScriptedServer, client: Client) -> None:
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


async def test_a_clone_names_its_differences(server: ScriptedServer, client: Client) -> None:
    async def cloned(_: Any, __: Context) -> AsyncIterator[pb.CloneContainerResponse]:
        yield pb.CloneContainerResponse(result=messages.container("other"))

    server.on("CloneContainer", cloned)
    clone = await client.containers.clone("train", "other", revision=3, owner="me", create_only=True, gpus=1, ports=[])
    await client.containers.clone("train", "same")
    assert clone.name == "other"
    first, second = server.requests["CloneContainer"]
    assert (first.source, first.name, first.revision, first.owner) == ("train", "other", 3, "me")
    assert sorted(first.update_mask.paths) == ["gpus", "ports"]
    assert (first.spec.gpus.count, first.create_only, bool(first.request_id)) == (1, True, True)
    assert (list(second.update_mask.paths), second.revision, second.spec) == ([], 0, gpudock.ContainerSpec())


async def test_revisions_are_read_rolled_back_to_and_deleted(server: ScriptedServer, client: Client) -> None:
    async def returned(_: Any, __: Context) -> AsyncIterator[pb.RollbackContainerResponse]:
        yield pb.RollbackContainerResponse(result=messages.container())

    first, second = (gpudock.ContainerRevision(container="train", revision=number) for number in (1, 2))
    server.on(
        "ListContainerRevisions",
        reply_with(pb.ListContainerRevisionsResponse(revisions=[first], next_page_token="next")),  # noqa: S106 - no secret
        reply_with(pb.ListContainerRevisionsResponse(revisions=[second])),
    )
    assert await client.containers.revisions("train", page_size=1) == [first, second]
    assert [each.page_token for each in server.requests["ListContainerRevisions"]] == ["", "next"]
    server.on("GetContainerRevision", reply_with(pb.GetContainerRevisionResponse(revision=second)))
    assert await client.containers.revision("train") == second
    assert server.requests["GetContainerRevision"][0].revision == 0
    server.on("RollbackContainer", returned)
    assert (await client.containers.rollback("train", 1, spec_only=True, snapshots="cheap")).name == "train"
    [request] = server.requests["RollbackContainer"]
    assert (request.revision, request.spec_only, bool(request.request_id)) == (1, True, True)
    assert request.snapshots == gpudock.SnapshotPolicy.SNAPSHOT_POLICY_CHEAP
    server.on("DeleteContainerRevision", reply_with(pb.DeleteContainerRevisionResponse()))
    await client.containers.delete_revision("train", 1, etag="e")
    [deleted] = server.requests["DeleteContainerRevision"]
    assert (deleted.name, deleted.revision, deleted.etag, bool(deleted.request_id)) == ("train", 1, "e", True)


async def test_a_dropped_stream_is_continued_by_a_watch_of_the_operation(
    server: ScriptedServer, client: Client
) -> None:
    server.on("CreateContainer", created_then_dropped)
    server.on("WatchOperation", watched)
    call = client.containers.create("train", "busybox")
    assert [snapshot.message async for snapshot in call] == ["pulling", "starting"]
    assert (await call).name == "train"
    assert [request.id for request in server.requests["WatchOperation"]] == [messages.OPERATION_ID]
    assert len(server.requests["CreateContainer"]) == 1


async def test_a_stream_dropped_before_its_first_message_is_repeated_with_the_same_request_id(
    server: ScriptedServer, client: Client
) -> None:
    server.on("CreateContainer", drop_stream, drop_stream, created)
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


async def test_a_result_can_be_awaited_again_after_a_timeout(server: ScriptedServer, client: Client) -> None:
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


async def test_a_failed_operation_does_not_count_as_a_dropped_connection(
    server: ScriptedServer, client: Client
) -> None:
    async def fails(_: Any, context: Context) -> AsyncIterator[Created]:
        yield Created(operation=messages.failed_operation(14, "ENGINE_UNAVAILABLE"))
        await abort(context, grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE", retry_after=0.01)

    server.on("CreateContainer", fails)
    call = client.containers.create("train", "busybox")
    for _ in range(2):
        with pytest.raises(gpudock.Unavailable) as caught:
            await call
        assert caught.value.reason == "ENGINE_UNAVAILABLE"
    assert not server.requests["WatchOperation"]


async def test_reattaching_ends_without_progress(server: ScriptedServer) -> None:
    server.on("CreateContainer", created_then_dropped)

    async def same_then_dropped(_: Any, context: Context) -> AsyncIterator[Watched]:
        yield Watched(operation=messages.operation(message="pulling"))
        await drop_connection(context)

    server.on("WatchOperation", same_then_dropped)
    async with Client(server.address, reattach_for=0.5) as client:
        with pytest.raises(gpudock.Unavailable) as caught:
            await client.containers.create("train", "busybox")
    assert not caught.value.answered
    assert 1 <= len(server.requests["WatchOperation"]) <= 8


CALLS: dict[str, Callable[[Client], gpudock.OperationCall[Any]]] = {
    "create": lambda client: client.containers.create("train", "busybox"),
    "start": lambda client: client.containers.start("train"),
    "restart": lambda client: client.containers.restart("train"),
    "scale": lambda client: client.containers.scale("train", gpus=1),
    "watch": lambda client: client.operations.watch(messages.OPERATION_ID),
}


@pytest.mark.parametrize("begin", CALLS.values(), ids=CALLS)
async def test_an_operation_without_a_response_is_given_up_like_any_call(
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


async def test_cancel_cancels_the_operation(server: ScriptedServer, client: Client) -> None:
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


async def test_a_commit_returns_the_image(server: ScriptedServer, client: Client) -> None:
    async def committed(_: Any, context: Context) -> AsyncIterator[pb.CommitContainerResponse]:
        yield pb.CommitContainerResponse(operation=messages.operation())
        if len(server.requests["CommitContainer"]) > 1:
            await drop_connection(context)
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
    # Also after a dropped connection, and from a watch of the operation.
    assert (await client.containers.commit("train", "team/model")).id == "sha256:2"
    assert server.requests["CommitContainer"][1].pause
    watched_result = await client.operations.watch(messages.OPERATION_ID)
    assert isinstance(watched_result, gpudock.CommittedImage)
