"""A registry that stops sending in the middle of a layer: nobody else waits for it, and neither does a restart."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from gpudock.v1 import container_pb2, container_service_pb2, node_service_pb2, operation_pb2, operation_service_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.calls import Caller, failure, progress_of
from tests.engine.docker_registry import registry, release
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until
from tests.rig import Rig
from tests.rig.patience import limit

__all__ = ["daemons"]

# Longer than any test waits: what is done at once is told from what waits for this to be over.
HOURS = "3h"
ANSWERED_WITHIN = 10


@pytest_asyncio.fixture
async def stalled(rig: Rig, tmp_path: Path) -> AsyncIterator[str]:
    """The name of an image whose layer stops coming."""
    async with registry(rig, tmp_path, stalls=True) as host:
        image = f"{host}/whole:latest"
        yield image
        rig.engine.remove_all()
        if image in {tag for stored in rig.engine.call("GET", "/images/json") for tag in stored["RepoTags"] or ()}:
            rig.engine.call("DELETE", f"/images/{image}")


def asked(caller: Caller, image: str, **fields: Any) -> container_service_pb2.CreateContainerRequest:
    """A container of the image, which has nothing that could run."""
    spec = caller.spec(image=image)
    return container_service_pb2.CreateContainerRequest(name="box", spec=spec, create_only=True, **fields)


async def stuck(caller: Caller, image: str) -> str:
    """Begin a pull; its operation once the layer has stopped coming."""
    async with asyncio.timeout(limit(30)):
        async for answer in caller.containers.CreateContainer(asked(caller, image)):
            if answer.operation.stage == "pull" and answer.operation.current_bytes:
                return str(answer.operation.id)
    raise AssertionError("it did not stall")


async def operation(caller: Caller, operation_id: str) -> operation_pb2.Operation:
    """An operation as it is."""
    request = operation_service_pb2.GetOperationRequest(id=operation_id)
    return (await caller.operations.GetOperation(request, timeout=limit(ANSWERED_WITHIN))).operation


@pytest.mark.deep
async def test_a_stop_leaves_a_pull_at_once(daemons: IsolatedDaemons, stalled: str, tmp_path: Path) -> None:
    daemon = await daemons.start("--shutdown-grace", HOURS, "--pull-stall-timeout", HOURS)
    async with Caller(daemon.target) as caller:
        operation_id = await stuck(caller, stalled)
        request = operation_service_pb2.WatchOperationRequest(id=operation_id)
        watching = asyncio.create_task(failure(_to_end(caller.operations.WatchOperation(request))))
        assert await asyncio.to_thread(daemon.stop) == 0, daemon.log_text
        assert (await watching).reason == "SHUTTING_DOWN"
    daemon = await daemons.start("--pull-stall-timeout", HOURS, after=daemon)
    async with Caller(daemon.target) as caller:
        assert (await operation(caller, operation_id)).stage == "pull"
        release(tmp_path)
        await caller.until_idle()
        assert (await operation(caller, operation_id)).state == operation_pb2.OPERATION_STATE_SUCCEEDED
        assert (await caller.get("box")).status.state == container_pb2.CONTAINER_STATE_STOPPED


@pytest.mark.deep
async def test_a_restart_serves_while_a_pull_is_stuck(daemons: IsolatedDaemons, stalled: str, tmp_path: Path) -> None:
    daemon = await daemons.start("--pull-stall-timeout", HOURS)
    async with Caller(daemon.target) as caller:
        await caller.create("other")
        operation_id = await stuck(caller, stalled)
    await asyncio.to_thread(daemon.kill9)
    daemon = await daemons.start("--pull-stall-timeout", HOURS, after=daemon, serving=False)
    async with Caller(daemon.target) as caller:
        listed = await caller.containers.ListContainers(
            container_service_pb2.ListContainersRequest(), timeout=limit(ANSWERED_WITHIN), wait_for_ready=True
        )
        assert {container.name for container in listed.containers} == {"box", "other"}
        assert (await operation(caller, operation_id)).state == operation_pb2.OPERATION_STATE_RUNNING
        async with asyncio.timeout(limit(ANSWERED_WITHIN)):
            await until(lambda: asyncio.to_thread(daemon.serving))
            await caller.stop("other")
        busy = await failure(caller.delete("box"))
        assert (busy.reason, busy.metadata["operation_id"]) == ("CONTAINER_BUSY", operation_id)
        release(tmp_path)
        await caller.until_idle()
        assert (await operation(caller, operation_id)).state == operation_pb2.OPERATION_STATE_SUCCEEDED


async def said(caller: Caller, request: container_service_pb2.CreateContainerRequest, messages: list[str]) -> None:
    """Create, adding what is said meanwhile to `messages`."""
    async for answer in caller.containers.CreateContainer(request):
        messages.append(answer.operation.message)  # noqa: PERF401 - what was said before an error counts


async def test_a_pull_without_progress_fails(daemons: IsolatedDaemons, stalled: str) -> None:
    """After the node's time, or that of the call; and says meanwhile since when nothing came."""
    daemon = await daemons.start("--pull-stall-timeout", "1.5s")
    async with Caller(daemon.target) as caller:
        for fields in ({}, {"pull_stall_timeout": Duration(seconds=3)}):
            messages: list[str] = []
            failed = await failure(said(caller, asked(caller, stalled, **fields), messages))
            assert failed.reason == "IMAGE_PULL_FAILED"
            assert f"no progress for {'3' if fields else '1.5'} s (last at 20" in failed.metadata["detail"]
            assert [message for message in messages if message.startswith("pull stalled since 20")]
            assert messages[-1] == ""
        wrong = await failure(
            progress_of(
                caller.containers.CreateContainer(asked(caller, stalled, pull_stall_timeout=Duration(seconds=0)))
            )
        )
        assert set(wrong.violations) == {"pull_stall_timeout"}
        # The engine does not go on with it, and the name is free.
        await caller.create("box")
        updated = await failure(
            caller.update(
                "box",
                image=stalled,
                files=container_service_pb2.FILES_POLICY_DISCARD,
                pull_stall_timeout=Duration(nanos=500_000_000),
            )
        )
        assert "no progress for 0.5 s" in updated.metadata["detail"]


async def test_while_it_recovers_reads_are_answered_and_changes_are_not(
    daemons: IsolatedDaemons, rig: Rig, stalled: str
) -> None:
    """The engine does not answer the first question of a start."""
    async with rig.engine_proxy() as proxy:
        daemon = await daemons.start("--pull-stall-timeout", HOURS)
        async with Caller(daemon.target) as caller:
            await caller.create("other", 1)
            operation_id = await stuck(caller, stalled)
        await asyncio.to_thread(daemon.kill9)
        fault = proxy.faults.hang("GET", "/containers/json")
        daemon = await daemons.start(
            "--engine-timeout", HOURS, "--pull-stall-timeout", HOURS, after=daemon, docker_host=proxy.url, serving=False
        )
        async with Caller(daemon.target) as caller:
            listed = await caller.containers.ListContainers(
                container_service_pb2.ListContainersRequest(), timeout=limit(ANSWERED_WITHIN), wait_for_ready=True
            )
            assert [container.name for container in listed.containers] == ["box", "other"]
            await asyncio.wait_for(fault.hit.wait(), limit(ANSWERED_WITHIN))
            health = health_pb2_grpc.HealthStub(caller.channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=limit(ANSWERED_WITHIN))
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
            await caller.nodes.ListPorts(node_service_pb2.ListPortsRequest(), timeout=limit(ANSWERED_WITHIN))
            for change in (
                caller.create("third"),
                caller.stop("other"),
                caller.create_volume("data"),
                cancel(caller, operation_id),
            ):
                refused = await failure(change)
                assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "RECOVERING")
            # A watch of what is not resumed yet goes on when it is.
            watch = caller.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id))
            assert (await anext(aiter(watch))).operation.state == operation_pb2.OPERATION_STATE_RUNNING
            fault.release()
            await until(lambda: asyncio.to_thread(daemon.serving))
            await caller.stop("other")
            await cancel(caller, operation_id)
            assert (await failure(_to_end(watch))).reason == "OPERATION_CANCELLED"
            await caller.delete_all()


async def cancel(caller: Caller, operation_id: str) -> None:
    """Ask for an operation to be undone."""
    await caller.operations.CancelOperation(operation_service_pb2.CancelOperationRequest(id=operation_id))


async def _to_end(stream: AsyncIterable[object]) -> None:
    async for _ in stream:
        pass
