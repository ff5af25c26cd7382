"""Calls of a daemon through the generated stubs, each as one method of `Caller`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2
from gpudock.v1 import (
    committed_image_pb2,
    container_pb2,
    container_revision_pb2,
    container_service_pb2,
    container_service_pb2_grpc,
    exec_pb2,
    node_service_pb2,
    node_service_pb2_grpc,
    operation_pb2,
    operation_service_pb2,
    operation_service_pb2_grpc,
    volume_pb2,
    volume_service_pb2,
    volume_service_pb2_grpc,
)

from tests.contract import COVERAGE, recording_channel
from tests.rig.images import BUSYBOX
from tests.rig.patience import limit

IMAGE = BUSYBOX
# Exits immediately on SIGTERM, unlike a bare sleep as PID 1.
IDLE = ("sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done")

_UNFINISHED = (operation_pb2.OPERATION_STATE_RUNNING, operation_pb2.OPERATION_STATE_UNDOING)


@dataclass
class ExecResult:
    """The output of a command, and how the command ended."""

    stdout: bytes = b""
    stderr: bytes = b""
    code: int | None = None
    signal: str = ""
    message: str = ""
    timed_out: bool = False
    ended: bool = False
    """Whether the daemon has reported the end of the command."""

    def add(self, response: exec_pb2.ExecContainerResponse) -> None:
        """Add a message of an exec session."""
        match response.WhichOneof("event"):
            case "stdout":
                self.stdout += response.stdout
            case "stderr":
                self.stderr += response.stderr
            case "exited":
                assert not self.ended, "the command has ended twice"
                exited = response.exited
                self.code = exited.code if exited.WhichOneof("result") == "code" else None
                self.signal, self.message, self.timed_out = exited.signal, exited.message, exited.timed_out
                self.ended = True


@dataclass
class Progress:
    """The messages of an operation's stream."""

    snapshots: list[operation_pb2.Operation] = field(default_factory=list)
    result: Any = None

    @property
    def stages(self) -> list[str]:
        """The names of the stages in the last snapshot."""
        return [stage.name for stage in self.snapshots[-1].stages]


class Caller:
    """A channel to a daemon, with a stub for each service."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.aio.insecure_channel(target)
        channel = recording_channel(self.channel)
        self.containers = container_service_pb2_grpc.ContainerServiceStub(channel)
        self.volumes = volume_service_pb2_grpc.VolumeServiceStub(channel)
        self.nodes = node_service_pb2_grpc.NodeServiceStub(channel)
        self.operations = operation_service_pb2_grpc.OperationServiceStub(channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.channel.close(None)

    # -- containers --------------------------------------------------------------------------------------------------

    @staticmethod
    def spec(gpus: int = 0, **fields: Any) -> container_pb2.ContainerSpec:
        """The spec of an idle container; `fields` are fields of the spec."""
        fields.setdefault("image", IMAGE)
        fields.setdefault("command", IDLE)
        return container_pb2.ContainerSpec(gpus=container_pb2.GpuRequest(count=gpus), **fields)

    async def create(self, name: str, gpus: int = 0, **fields: Any) -> container_pb2.Container:
        """Create and start an idle container."""
        request = container_service_pb2.CreateContainerRequest(name=name, spec=self.spec(gpus, **fields))
        return await result_of(self.containers.CreateContainer(request))

    async def get(self, name: str) -> container_pb2.Container:
        """Get a container."""
        response = await self.containers.GetContainer(container_service_pb2.GetContainerRequest(name=name))
        return response.container

    async def scale(self, name: str, gpus: int | None = None, **fields: Any) -> container_pb2.Container:
        """Scale a container and wait."""
        return await result_of(self.containers.ScaleContainer(scale_request(name, gpus, **fields)))

    async def commit(self, name: str, repository: str, **fields: Any) -> committed_image_pb2.CommittedImage:
        """Commit a container's files to an image and wait."""
        request = container_service_pb2.CommitContainerRequest(name=name, repository=repository, **fields)
        progress = await progress_of(self.containers.CommitContainer(request))
        assert isinstance(progress.result, committed_image_pb2.CommittedImage)
        return progress.result

    async def start(self, name: str, gpus: int | None = None) -> container_pb2.Container:
        """Start a container and wait."""
        request = container_service_pb2.StartContainerRequest(name=name)
        if gpus is not None:
            request.gpus.count = gpus
        return await result_of(self.containers.StartContainer(request))

    async def update(self, name: str, mask: str = "", **fields: Any) -> container_pb2.Container:
        """Change fields of the spec (those of `mask`, comma-separated, unless `mask` is empty) and wait."""
        return await result_of(self.containers.UpdateContainer(update_request(name, mask, **fields)))

    async def rollback(self, name: str, revision: int, **fields: Any) -> container_pb2.Container:
        """Roll a container back to a revision and wait."""
        request = container_service_pb2.RollbackContainerRequest(name=name, revision=revision, **fields)
        return await result_of(self.containers.RollbackContainer(request))

    async def clone(self, source: str, name: str, mask: str = "", **fields: Any) -> container_pb2.Container:
        """Clone a container, with changed fields of the spec, and wait."""
        return await result_of(self.containers.CloneContainer(clone_request(source, name, mask, **fields)))

    async def revisions(self, name: str) -> list[container_revision_pb2.ContainerRevision]:
        """The revisions of a container, oldest first."""
        request = container_service_pb2.ListContainerRevisionsRequest(name=name)
        return list((await self.containers.ListContainerRevisions(request)).revisions)

    async def delete_revision(self, name: str, revision: int) -> None:
        """Delete a revision."""
        request = container_service_pb2.DeleteContainerRevisionRequest(name=name, revision=revision)
        await self.containers.DeleteContainerRevision(request)

    async def stop(self, name: str, *, keep_resources: bool = False) -> container_pb2.Container:
        """Stop a container."""
        request = container_service_pb2.StopContainerRequest(name=name, keep_resources=keep_resources)
        return (await self.containers.StopContainer(request)).container

    async def restart(self, name: str) -> container_pb2.Container:
        """Restart a container and wait."""
        return await result_of(
            self.containers.RestartContainer(container_service_pb2.RestartContainerRequest(name=name))
        )

    async def delete(self, name: str, *, force: bool = True) -> None:
        """Delete a container."""
        await self.containers.DeleteContainer(container_service_pb2.DeleteContainerRequest(name=name, force=force))

    async def delete_all(self) -> None:
        """Delete every container and every volume."""
        await self.until_idle()
        response = await self.containers.ListContainers(container_service_pb2.ListContainersRequest(page_size=1000))
        for container in response.containers:
            await self.delete(container.name)
        for volume in (await self.volumes.ListVolumes(volume_service_pb2.ListVolumesRequest(page_size=1000))).volumes:
            await self.delete_volume(volume.name)

    async def until_idle(self) -> None:
        """Wait until every operation has ended."""
        unfinished = operation_service_pb2.OperationFilter(states=_UNFINISHED)
        request = operation_service_pb2.ListOperationsRequest(page_size=1, filter=unfinished)
        async with asyncio.timeout(limit(60)):
            while (await self.operations.ListOperations(request)).operations:
                await asyncio.sleep(0.05)

    # -- volumes -----------------------------------------------------------------------------------------------------

    async def create_volume(self, name: str, size_bytes: int = 0, **fields: Any) -> volume_pb2.Volume:
        """Create a volume."""
        request = volume_service_pb2.CreateVolumeRequest(name=name, size_bytes=size_bytes, **fields)
        return (await self.volumes.CreateVolume(request)).volume

    async def volume(self, name: str) -> volume_pb2.Volume:
        """Get a volume."""
        return (await self.volumes.GetVolume(volume_service_pb2.GetVolumeRequest(name=name))).volume

    async def resize_volume(self, name: str, size_bytes: int, **fields: Any) -> Progress:
        """Resize a volume and wait."""
        request = volume_service_pb2.ResizeVolumeRequest(name=name, size_bytes=size_bytes, **fields)
        return await progress_of(self.volumes.ResizeVolume(request))

    async def adopt_volume(self, name: str, engine_volume: str = "", size_bytes: int = 0) -> volume_pb2.Volume:
        """Adopt a volume of the engine and wait."""
        request = volume_service_pb2.AdoptVolumeRequest(name=name, engine_volume=engine_volume, size_bytes=size_bytes)
        volume: volume_pb2.Volume = (await progress_of(self.volumes.AdoptVolume(request))).result
        return volume

    async def delete_volume(self, name: str, **fields: Any) -> volume_service_pb2.DeleteVolumeResponse:
        """Delete a volume, or only return the plan (`validate_only`)."""
        request = volume_service_pb2.DeleteVolumeRequest(name=name, **fields)
        response: volume_service_pb2.DeleteVolumeResponse = await self.volumes.DeleteVolume(request)
        return response

    # -- exec --------------------------------------------------------------------------------------------------------

    async def run(self, container: str, *command: str, stdin: bytes | None = None, **fields: Any) -> ExecResult:
        """Run a command in a container and wait until it ends."""
        start = exec_pb2.ExecStart(container=container, command=command, stdin=stdin is not None, **fields)
        requests = [exec_pb2.ExecContainerRequest(start=start)]
        if stdin is not None:
            requests += [
                exec_pb2.ExecContainerRequest(stdin=stdin[at : at + 65536]) for at in range(0, len(stdin), 65536)
            ]
        result = ExecResult()
        try:
            async for response in self.containers.ExecContainer(iterate(requests)):
                result.add(response)
        except grpc.aio.AioRpcError as error:
            # When a call ends while input is still being written, grpc.aio replaces the server's status with INTERNAL.
            # The end of the command has arrived in this case; an INTERNAL of the daemon would come in its place.
            may_be_replaced = stdin is not None and result.ended
            if not (may_be_replaced and error.code() is grpc.StatusCode.INTERNAL):
                raise
        return result

    async def shell(self, container: str, script: str) -> str:
        """The standard output of a shell script in a container; raises AssertionError unless it exits with 0."""
        result = await self.run(container, "sh", "-c", script)
        assert result.code == 0, (script, result)
        return result.stdout.decode()

    # -- the node ----------------------------------------------------------------------------------------------------

    async def holders(self) -> dict[str, str]:
        """The name of the container that holds each GPU, by UUID; empty for a free GPU."""
        response = await self.nodes.ListGpus(node_service_pb2.ListGpusRequest())
        return {gpu.uuid: gpu.container for gpu in response.gpus}

    async def free_gpus(self) -> int:
        """The number of free GPUs."""
        return sum(not holder for holder in (await self.holders()).values())


def scale_request(name: str, gpus: int | None = None, **fields: Any) -> container_service_pb2.ScaleContainerRequest:
    """A ScaleContainerRequest; with None it does not change the GPUs."""
    request = container_service_pb2.ScaleContainerRequest(name=name, **fields)
    if gpus is not None:
        request.gpus.SetInParent()
        request.gpus.count = gpus
    return request


def update_request(name: str, mask: str = "", **fields: Any) -> container_service_pb2.UpdateContainerRequest:
    """An UpdateContainerRequest; each of `fields` is a field of the request or else of the spec."""
    request_fields = {field.name for field in container_service_pb2.UpdateContainerRequest.DESCRIPTOR.fields}
    request = container_service_pb2.UpdateContainerRequest(
        name=name,
        spec=container_pb2.ContainerSpec(**{key: value for key, value in fields.items() if key not in request_fields}),
        **{key: value for key, value in fields.items() if key in request_fields},
    )
    request.update_mask.paths.extend(mask.split(",") if mask else ())
    return request


def clone_request(source: str, name: str, mask: str = "", **fields: Any) -> container_service_pb2.CloneContainerRequest:
    """A CloneContainerRequest; each of `fields` is a field of the request or else of the spec."""
    request_fields = {field.name for field in container_service_pb2.CloneContainerRequest.DESCRIPTOR.fields}
    request = container_service_pb2.CloneContainerRequest(
        name=name, source=source, **{key: value for key, value in fields.items() if key in request_fields}
    )
    spec_fields = {key: value for key, value in fields.items() if key not in request_fields}
    if spec_fields:
        request.spec.CopyFrom(container_pb2.ContainerSpec(**spec_fields))
    request.update_mask.paths.extend(mask.split(",") if mask else ())
    return request


async def iterate(requests: Iterable[Any]) -> AsyncIterator[Any]:
    """Yield the requests of a stream."""
    for request in requests:
        yield request


async def progress_of(stream: Any) -> Progress:
    """Read an operation's stream until it ends."""
    progress = Progress()
    async for response in stream:
        if response.WhichOneof("event") == "operation":
            assert progress.result is None, "a message follows the result"
            progress.snapshots.append(response.operation)
        else:
            assert progress.result is None, "the stream has two results"
            progress.result = response.result
    return progress


async def result_of(stream: Any) -> container_pb2.Container:
    """Read an operation's stream until it ends, and return its result."""
    progress = await progress_of(stream)
    assert isinstance(progress.result, container_pb2.Container)
    return progress.result


@dataclass(frozen=True)
class Failure:
    """What a failed call says."""

    code: grpc.StatusCode
    reason: str
    metadata: dict[str, str]
    message: str
    violations: tuple[str, ...]


def failure_of(error: grpc.aio.AioRpcError) -> Failure:
    """The status code and the details of an error."""
    reason, metadata, violations = "", {}, ()
    trailing: Sequence[Any] = error.trailing_metadata() or ()
    for key, value in trailing:
        if key != "grpc-status-details-bin":
            continue
        for detail in status_pb2.Status.FromString(value).details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo.FromString(detail.value)
                assert info.domain == "gpudock"
                reason, metadata = info.reason, dict(info.metadata)
                COVERAGE.reasons.add(reason)
            elif detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
                request = error_details_pb2.BadRequest.FromString(detail.value)
                violations = tuple(violation.field for violation in request.field_violations)
    return Failure(error.code(), reason, metadata, error.details() or "", violations)


async def failure(call: Any) -> Failure:
    """The error that an awaited call ends with; raises AssertionError if the call succeeds."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    raise AssertionError("the call succeeded")
