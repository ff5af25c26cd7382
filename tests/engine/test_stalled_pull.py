"""A registry that stops sending in the middle of a layer: no other call and no restart waits for the pull."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from gpudock.v1 import container_pb2, container_service_pb2, node_service_pb2, operation_pb2, operation_service_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.calls import Caller, failure, progress_of
from tests.engine.docker_registry import registry_image, release
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, read_to_end, until
from tests.engine.operation_calls import cancel_operation, get_operation
from tests.rig import Rig
from tests.rig.patience import limit

__all__ = ["daemons"]

# Longer than a test may take: a test that waits for such a timeout fails.
LONG = "3h"
ANSWERED_WITHIN = 10


@pytest_asyncio.fixture
async def stalled_image(rig: Rig, tmp_path: Path) -> AsyncIterator[str]:
    """The name of an image whose registry stops sending in the middle of its layer."""
    async with registry_image(rig, tmp_path, stalls=True) as image:
        yield image


def create_request(caller: Caller, image: str, **fields: Any) -> container_service_pb2.CreateContainerRequest:
    """A request for a container that is not started, since the image has no program."""
    spec = caller.spec(image=image)
    return container_service_pb2.CreateContainerRequest(name="box", spec=spec, create_only=True, **fields)


async def start_stalled_pull(caller: Caller, image: str) -> str:
    """Start a create, and return the id of its operation once the pull has received some bytes."""
    async with asyncio.timeout(limit(30)):
        async for answer in caller.containers.CreateContainer(create_request(caller, image)):
            if answer.operation.stage == "pull" and answer.operation.current_bytes:
                return str(answer.operation.id)
    raise AssertionError("the operation ended before its pull stalled")


@pytest.mark.deep
async def test_a_daemon_stops_immediately_during_a_stalled_pull(
    daemons: IsolatedDaemons, stalled_image: str, tmp_path: Path
) -> None:
    daemon = await daemons.start("--shutdown-grace", LONG, "--pull-stall-timeout", LONG)
    async with Caller(daemon.target) as caller:
        operation_id = await start_stalled_pull(caller, stalled_image)
        request = operation_service_pb2.WatchOperationRequest(id=operation_id)
        stream = aiter(caller.operations.WatchOperation(request))
        # The daemon has the call before it is stopped.
        await anext(stream)
        watch = asyncio.create_task(failure(read_to_end(stream)))
        assert await asyncio.to_thread(daemon.stop) == 0, daemon.log_text
        assert (await watch).reason == "SHUTTING_DOWN"
    daemon = await daemons.start("--pull-stall-timeout", LONG, after=daemon)
    async with Caller(daemon.target) as caller:
        assert (await get_operation(caller, operation_id)).stage == "pull"
        release(tmp_path)
        await caller.until_idle()
        assert (await get_operation(caller, operation_id)).state == operation_pb2.OPERATION_STATE_SUCCEEDED
        assert (await caller.get("box")).status.state == container_pb2.CONTAINER_STATE_STOPPED


@pytest.mark.deep
async def test_a_restarted_daemon_serves_during_a_stalled_pull(
    daemons: IsolatedDaemons, stalled_image: str, tmp_path: Path
) -> None:
    daemon = await daemons.start("--pull-stall-timeout", LONG)
    async with Caller(daemon.target) as caller:
        await caller.create("other")
        operation_id = await start_stalled_pull(caller, stalled_image)
    await asyncio.to_thread(daemon.kill9)
    daemon = await daemons.start("--pull-stall-timeout", LONG, after=daemon, serving=False)
    async with Caller(daemon.target) as caller:
        listed = await caller.containers.ListContainers(
            container_service_pb2.ListContainersRequest(), timeout=limit(ANSWERED_WITHIN), wait_for_ready=True
        )
        assert {container.name for container in listed.containers} == {"box", "other"}
        operation = await get_operation(caller, operation_id, timeout=limit(ANSWERED_WITHIN))
        assert operation.state == operation_pb2.OPERATION_STATE_RUNNING
        async with asyncio.timeout(limit(ANSWERED_WITHIN)):
            await until(lambda: asyncio.to_thread(daemon.serving))
            await caller.stop("other")
        refused = await failure(caller.delete("box"))
        assert (refused.reason, refused.metadata["operation_id"]) == ("CONTAINER_BUSY", operation_id)
        release(tmp_path)
        await caller.until_idle()
        assert (await get_operation(caller, operation_id)).state == operation_pb2.OPERATION_STATE_SUCCEEDED


async def collect_messages(
    caller: Caller, request: container_service_pb2.CreateContainerRequest, messages: list[str]
) -> None:
    """Create a container, and append the message of each snapshot to `messages`."""
    async for answer in caller.containers.CreateContainer(request):
        messages.append(answer.operation.message)  # noqa: PERF401 - a comprehension loses the messages before an error


async def test_a_pull_without_progress_fails(daemons: IsolatedDaemons, stalled_image: str) -> None:
    """The time limit is that of the daemon or of the call; until then, the message says since when the pull stalls."""
    daemon = await daemons.start("--pull-stall-timeout", "1.5s")
    async with Caller(daemon.target) as caller:
        for fields in ({}, {"pull_stall_timeout": Duration(seconds=3)}):
            messages: list[str] = []
            failed = await failure(collect_messages(caller, create_request(caller, stalled_image, **fields), messages))
            assert failed.reason == "IMAGE_PULL_FAILED"
            assert f"no progress for {'3' if fields else '1.5'} s (last at 20" in failed.metadata["detail"]
            assert [message for message in messages if message.startswith("pull stalled since 20")]
            assert messages[-1] == ""
        invalid = await failure(
            progress_of(
                caller.containers.CreateContainer(
                    create_request(caller, stalled_image, pull_stall_timeout=Duration(seconds=0))
                )
            )
        )
        assert set(invalid.violations) == {"pull_stall_timeout"}
        # The engine has ended the pull, and the name of the container is free.
        await caller.create("box")
        updated = await failure(
            caller.update(
                "box",
                image=stalled_image,
                files=container_service_pb2.FILES_POLICY_DISCARD,
                pull_stall_timeout=Duration(nanos=500_000_000),
            )
        )
        assert "no progress for 0.5 s" in updated.metadata["detail"]


async def test_a_recovering_daemon_answers_reads_and_refuses_changes(
    daemons: IsolatedDaemons, rig: Rig, stalled_image: str
) -> None:
    """The engine does not answer the first call of the recovery."""
    async with rig.engine_proxy() as proxy:
        daemon = await daemons.start("--pull-stall-timeout", LONG)
        async with Caller(daemon.target) as caller:
            await caller.create("other", 1)
            operation_id = await start_stalled_pull(caller, stalled_image)
        await asyncio.to_thread(daemon.kill9)
        fault = proxy.faults.hang("GET", "/containers/json")
        daemon = await daemons.start(
            "--engine-timeout", LONG, "--pull-stall-timeout", LONG, after=daemon, docker_host=proxy.url, serving=False
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
                cancel_operation(caller, operation_id),
            ):
                refused = await failure(change)
                assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "RECOVERING")
            # A watch of an operation that is not resumed yet continues when it is.
            watch = caller.operations.WatchOperation(operation_service_pb2.WatchOperationRequest(id=operation_id))
            assert (await anext(aiter(watch))).operation.state == operation_pb2.OPERATION_STATE_RUNNING
            fault.release()
            await until(lambda: asyncio.to_thread(daemon.serving))
            await caller.stop("other")
            await cancel_operation(caller, operation_id)
            assert (await failure(read_to_end(watch))).reason == "OPERATION_CANCELLED"
            await caller.delete_all()
