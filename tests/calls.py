"""Calls a daemon through the generated stubs, as any client would, with the words that tests use."""

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
from tests.rig.patience import limit

IMAGE = "gpudock/busybox:test"
# Ends at once when asked to, unlike a bare sleep as PID 1.
IDLE = ("sh", "-c", "trap 'exit 0' TERM INT; while :; do sleep 3600 & wait $!; done")

_AT_WORK = (operation_pb2.OPERATION_STATE_RUNNING, operation_pb2.OPERATION_STATE_UNDOING)


@dataclass
class ExecResult:
    """What a command did."""

    stdout: bytes = b""
    stderr: bytes = b""
    code: int | None = None
    signal: str = ""
    message: str = ""
    timed_out: bool = False
    ended: bool = False
    """Whether the end of the command was told."""


@dataclass
class Progress:
    """What an operation's stream said."""

    snapshots: list[operation_pb2.Operation] = field(default_factory=list)
    result: Any = None

    @property
    def stages(self) -> list[str]:
        """The names of the stages, as the last snapshot has them."""
        return [stage.name for stage in self.snapshots[-1].stages]


class Caller:
    """A channel with the services."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.aio.insecure_channel(target)
        noted = recording_channel(self.channel)
        self.containers = container_service_pb2_grpc.ContainerServiceStub(noted)
        self.volumes = volume_service_pb2_grpc.VolumeServiceStub(noted)
        self.nodes = node_service_pb2_grpc.NodeServiceStub(noted)
        self.operations = operation_service_pb2_grpc.OperationServiceStub(noted)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.channel.close(None)

    # -- containers --------------------------------------------------------------------------------------------------

    @staticmethod
    def spec(gpus: int = 0, **fields: Any) -> container_pb2.ContainerSpec:
        """An idle container; `fields` are the spec's own."""
        fields.setdefault("image", IMAGE)
        fields.setdefault("command", IDLE)
        return container_pb2.ContainerSpec(gpus=container_pb2.GpuRequest(count=gpus), **fields)

    async def create(self, name: str, gpus: int = 0, **fields: Any) -> container_pb2.Container:
        """Create and start an idle container."""
        request = container_service_pb2.CreateContainerRequest(name=name, spec=self.spec(gpus, **fields))
        return await result_of(self.containers.CreateContainer(request))

    async def get(self, name: str) -> container_pb2.Container:
        """A container as it is."""
        answer = await self.containers.GetContainer(container_service_pb2.GetContainerRequest(name=name))
        return answer.container

    async def scale(self, name: str, gpus: int | None = None, **fields: Any) -> container_pb2.Container:
        """Scale and wait."""
        return await result_of(self.containers.ScaleContainer(scale_request(name, gpus, **fields)))

    async def commit(self, name: str, repository: str, **fields: Any) -> committed_image_pb2.CommittedImage:
        """Make an image of its files and wait."""
        request = container_service_pb2.CommitContainerRequest(name=name, repository=repository, **fields)
        progress = await progress_of(self.containers.CommitContainer(request))
        assert isinstance(progress.result, committed_image_pb2.CommittedImage)
        return progress.result

    async def start(self, name: str, gpus: int | None = None) -> container_pb2.Container:
        """Start and wait."""
        request = container_service_pb2.StartContainerRequest(name=name)
        if gpus is not None:
            request.gpus.count = gpus
        return await result_of(self.containers.StartContainer(request))

    async def update(self, name: str, mask: str = "", **fields: Any) -> container_pb2.Container:
        """Give fields of the spec (those of `mask`, comma-separated, if it says any) other values, and wait."""
        return await result_of(self.containers.UpdateContainer(update_request(name, mask, **fields)))

    async def rollback(self, name: str, revision: int, **fields: Any) -> container_pb2.Container:
        """Return to a revision and wait."""
        request = container_service_pb2.RollbackContainerRequest(name=name, revision=revision, **fields)
        return await result_of(self.containers.RollbackContainer(request))

    async def clone(self, source: str, name: str, mask: str = "", **fields: Any) -> container_pb2.Container:
        """Make a container of another one, with other values in fields of its spec, and wait."""
        return await result_of(self.containers.CloneContainer(clone_request(source, name, mask, **fields)))

    async def revisions(self, name: str) -> list[container_revision_pb2.ContainerRevision]:
        """The history, oldest first."""
        request = container_service_pb2.ListContainerRevisionsRequest(name=name)
        return list((await self.containers.ListContainerRevisions(request)).revisions)

    async def delete_revision(self, name: str, revision: int) -> None:
        """Take a revision out of the history."""
        request = container_service_pb2.DeleteContainerRevisionRequest(name=name, revision=revision)
        await self.containers.DeleteContainerRevision(request)

    async def stop(self, name: str, *, keep_resources: bool = False) -> container_pb2.Container:
        """Stop."""
        request = container_service_pb2.StopContainerRequest(name=name, keep_resources=keep_resources)
        return (await self.containers.StopContainer(request)).container

    async def restart(self, name: str) -> container_pb2.Container:
        """Restart and wait."""
        return await result_of(
            self.containers.RestartContainer(container_service_pb2.RestartContainerRequest(name=name))
        )

    async def delete(self, name: str, *, force: bool = True) -> None:
        """Delete."""
        await self.containers.DeleteContainer(container_service_pb2.DeleteContainerRequest(name=name, force=force))

    async def delete_all(self) -> None:
        """Delete every container and every volume there is."""
        await self.until_idle()
        listed = await self.containers.ListContainers(container_service_pb2.ListContainersRequest(page_size=1000))
        for container in listed.containers:
            await self.delete(container.name)
        for volume in (await self.volumes.ListVolumes(volume_service_pb2.ListVolumesRequest(page_size=1000))).volumes:
            await self.delete_volume(volume.name)

    async def until_idle(self) -> None:
        """Wait until no operation is under way."""
        wanted = operation_service_pb2.OperationFilter(states=_AT_WORK)
        request = operation_service_pb2.ListOperationsRequest(page_size=1, filter=wanted)
        async with asyncio.timeout(limit(60)):
            while (await self.operations.ListOperations(request)).operations:
                await asyncio.sleep(0.05)

    # -- volumes -----------------------------------------------------------------------------------------------------

    async def create_volume(self, name: str, size_bytes: int = 0, **fields: Any) -> volume_pb2.Volume:
        """Create a volume."""
        request = volume_service_pb2.CreateVolumeRequest(name=name, size_bytes=size_bytes, **fields)
        return (await self.volumes.CreateVolume(request)).volume

    async def volume(self, name: str) -> volume_pb2.Volume:
        """A volume as it is."""
        return (await self.volumes.GetVolume(volume_service_pb2.GetVolumeRequest(name=name))).volume

    async def resize_volume(self, name: str, size_bytes: int, **fields: Any) -> Progress:
        """Resize and wait."""
        request = volume_service_pb2.ResizeVolumeRequest(name=name, size_bytes=size_bytes, **fields)
        return await progress_of(self.volumes.ResizeVolume(request))

    async def adopt_volume(self, name: str, engine_volume: str = "", size_bytes: int = 0) -> volume_pb2.Volume:
        """Take one in and wait."""
        request = volume_service_pb2.AdoptVolumeRequest(name=name, engine_volume=engine_volume, size_bytes=size_bytes)
        adopted: volume_pb2.Volume = (await progress_of(self.volumes.AdoptVolume(request))).result
        return adopted

    async def delete_volume(self, name: str, **fields: Any) -> volume_service_pb2.DeleteVolumeResponse:
        """Delete a volume; or, with `validate_only`, say what that would do."""
        request = volume_service_pb2.DeleteVolumeRequest(name=name, **fields)
        answer: volume_service_pb2.DeleteVolumeResponse = await self.volumes.DeleteVolume(request)
        return answer

    # -- exec --------------------------------------------------------------------------------------------------------

    async def run(self, container: str, *command: str, stdin: bytes | None = None, **fields: Any) -> ExecResult:
        """Run a command to its end."""
        start = exec_pb2.ExecStart(container=container, command=command, stdin=stdin is not None, **fields)
        requests = [exec_pb2.ExecContainerRequest(start=start)]
        if stdin is not None:
            requests += [
                exec_pb2.ExecContainerRequest(stdin=stdin[at : at + 65536]) for at in range(0, len(stdin), 65536)
            ]
        result = ExecResult()
        try:
            await self._read_exec(self.containers.ExecContainer(iterate(requests)), result)
        except grpc.aio.AioRpcError as error:
            # Where the call ends while input is still being written, grpc.aio puts this status in the place of the
            # server's. How the command ended has arrived; a daemon's own INTERNAL would have come instead of that.
            written = stdin is not None and result.ended
            if not (written and error.code() is grpc.StatusCode.INTERNAL):
                raise
        return result

    async def _read_exec(self, call: Any, result: ExecResult) -> None:
        """Add up what a session sends until it ends."""
        async for answer in call:
            match answer.WhichOneof("event"):
                case "stdout":
                    result.stdout += answer.stdout
                case "stderr":
                    result.stderr += answer.stderr
                case "exited":
                    exited = answer.exited
                    result.code = exited.code if exited.WhichOneof("result") == "code" else None
                    result.signal, result.message, result.timed_out = exited.signal, exited.message, exited.timed_out
                    result.ended = True

    async def shell(self, container: str, script: str) -> str:
        """The output of a script that must succeed."""
        result = await self.run(container, "sh", "-c", script)
        assert result.code == 0, (script, result)
        return result.stdout.decode()

    # -- the node ----------------------------------------------------------------------------------------------------

    async def holders(self) -> dict[str, str]:
        """Who holds each card (by UUID); empty: free."""
        listed = await self.nodes.ListGpus(node_service_pb2.ListGpusRequest())
        return {gpu.uuid: gpu.container for gpu in listed.gpus}

    async def free_gpus(self) -> int:
        """How many cards nobody holds."""
        return sum(not holder for holder in (await self.holders()).values())


def scale_request(name: str, gpus: int | None = None, **fields: Any) -> container_service_pb2.ScaleContainerRequest:
    """What ScaleContainer takes; None leaves the cards alone."""
    request = container_service_pb2.ScaleContainerRequest(name=name, **fields)
    if gpus is not None:
        request.gpus.SetInParent()
        request.gpus.count = gpus
    return request


def update_request(name: str, mask: str = "", **fields: Any) -> container_service_pb2.UpdateContainerRequest:
    """What UpdateContainer takes; what is not a field of the spec is one of the request."""
    own = {field.name for field in container_service_pb2.UpdateContainerRequest.DESCRIPTOR.fields}
    request = container_service_pb2.UpdateContainerRequest(
        name=name,
        spec=container_pb2.ContainerSpec(**{key: value for key, value in fields.items() if key not in own}),
        **{key: value for key, value in fields.items() if key in own},
    )
    request.update_mask.paths.extend(mask.split(",") if mask else ())
    return request


def clone_request(source: str, name: str, mask: str = "", **fields: Any) -> container_service_pb2.CloneContainerRequest:
    """What CloneContainer takes; what is not a field of the spec is one of the request."""
    own = {field.name for field in container_service_pb2.CloneContainerRequest.DESCRIPTOR.fields}
    request = container_service_pb2.CloneContainerRequest(
        name=name, source=source, **{key: value for key, value in fields.items() if key in own}
    )
    asked = {key: value for key, value in fields.items() if key not in own}
    if asked:
        request.spec.CopyFrom(container_pb2.ContainerSpec(**asked))
    request.update_mask.paths.extend(mask.split(",") if mask else ())
    return request


async def iterate(requests: Iterable[Any]) -> AsyncIterator[Any]:
    """Requests for a stream."""
    for request in requests:
        yield request


async def progress_of(stream: Any) -> Progress:
    """All that an operation's stream says."""
    progress = Progress()
    async for answer in stream:
        if answer.WhichOneof("event") == "operation":
            assert progress.result is None, "the result comes last"
            progress.snapshots.append(answer.operation)
        else:
            assert progress.result is None, "the result comes once"
            progress.result = answer.result
    return progress


async def result_of(stream: Any) -> container_pb2.Container:
    """The result that an operation's stream ends with."""
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
    """The code and the details of an error."""
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
    """The error that an awaited call ends with; it must."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    raise AssertionError("it did not fail")
