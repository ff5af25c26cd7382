"""VolumeService: each request is checked, handed to core, and its outcome shown."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Protocol, TypeVar

from gpudock.v1 import operation_pb2, volume_pb2, volume_service_pb2
from gpudock.v1.volume_service_pb2_grpc import VolumeServiceServicer
from typing_extensions import override

from gpudock_server.core.operations.engine import Operations, RequestKey
from gpudock_server.core.volumes import Volumes
from gpudock_server.core.volumes.commands import Command
from gpudock_server.core.watches import Watches
from gpudock_server.model.volume import VolumeRevision
from gpudock_server.ports import Page, VolumeDetails
from gpudock_server.rpc import list_requests, opaque_tokens, pagination, watch_requests
from gpudock_server.rpc.middleware.interceptor import Context
from gpudock_server.rpc.operations import stream
from gpudock_server.rpc.operations.request_key import MutationRequest, request_key
from gpudock_server.rpc.volumes import requests as validation
from gpudock_server.rpc.volumes.messages import volume_details_message, volume_revision_message
from gpudock_server.rpc.watch_stream import watch_stream

SERVICE = volume_service_pb2.DESCRIPTOR.services_by_name["VolumeService"].full_name

R_co = TypeVar("R_co", covariant=True)


class _OperationRequest(MutationRequest, Protocol):
    """A request that begins an operation, or asks for its plan alone."""

    @property
    def validate_only(self) -> bool:
        """Whether nothing is to be done."""
        ...


class _ResponseType(Protocol[R_co]):
    """The class of a response that holds a snapshot or the result."""

    def __call__(
        self, *, operation: operation_pb2.Operation | None = None, result: volume_pb2.Volume | None = None
    ) -> R_co:
        """Make one."""
        ...


class VolumeService(VolumeServiceServicer):
    """Serves gpudock.v1.VolumeService. Its streaming methods return their generators: see ContainerService."""

    def __init__(self, volumes: Volumes, operations: Operations, watches: Watches) -> None:
        self._volumes = volumes
        self._watches = watches
        self._operations = operations

    @override
    async def CreateVolume(
        self, request: volume_service_pb2.CreateVolumeRequest, context: Context
    ) -> volume_service_pb2.CreateVolumeResponse:
        made = await self._volumes.run(validation.create(request), _key("CreateVolume", request))
        return volume_service_pb2.CreateVolumeResponse(volume=volume_details_message(made))

    @override
    async def GetVolume(
        self, request: volume_service_pb2.GetVolumeRequest, context: Context
    ) -> volume_service_pb2.GetVolumeResponse:
        seen = await self._volumes.get(validation.get(request))
        return volume_service_pb2.GetVolumeResponse(volume=volume_details_message(seen))

    @override
    async def ListVolumes(
        self, request: volume_service_pb2.ListVolumesRequest, context: Context
    ) -> volume_service_pb2.ListVolumesResponse:
        moment = ""

        async def read(page_size: int, page_token: str) -> Page[VolumeDetails]:
            nonlocal moment
            found = await self._volumes.list(page_size=page_size, page_token=page_token)
            moment = found.watch_token
            return found

        found, token = await pagination.from_store(list_requests.volumes(request), read, volume_details_message)
        return volume_service_pb2.ListVolumesResponse(
            volumes=found,
            next_page_token=token,
            resume_token=opaque_tokens.encode_token(watch_requests.volume_scope(request.filter), moment),
        )

    @override
    def WatchVolumes(
        self, request: volume_service_pb2.WatchVolumesRequest, context: Context
    ) -> AsyncIterator[volume_service_pb2.WatchVolumesResponse]:
        asked = watch_requests.volumes(request)
        watch = self._watches.volumes(asked.matches, token=asked.resume, listing=asked.listing)
        return watch_stream(asked, watch, volume_details_message, volume_service_pb2.WatchVolumesResponse)

    @override
    def ResizeVolume(
        self, request: volume_service_pb2.ResizeVolumeRequest, context: Context
    ) -> AsyncIterator[volume_service_pb2.ResizeVolumeResponse]:
        command = validation.resize(request)
        return self._operate("ResizeVolume", request, command, volume_service_pb2.ResizeVolumeResponse)

    @override
    async def DeleteVolume(
        self, request: volume_service_pb2.DeleteVolumeRequest, context: Context
    ) -> volume_service_pb2.DeleteVolumeResponse:
        command = validation.delete(request)
        if request.validate_only:
            plan = stream.record_message(await self._volumes.preview(command))
            return volume_service_pb2.DeleteVolumeResponse(plan=plan)
        await self._volumes.run_to_end(command, _key("DeleteVolume", request))
        return volume_service_pb2.DeleteVolumeResponse()

    @override
    async def ListVolumeRevisions(
        self, request: volume_service_pb2.ListVolumeRevisionsRequest, context: Context
    ) -> volume_service_pb2.ListVolumeRevisionsResponse:
        async def read(page_size: int, page_token: str) -> Page[VolumeRevision]:
            return await self._volumes.revisions(request.name, page_size=page_size, page_token=page_token)

        found, token = await pagination.from_store(
            list_requests.volume_revisions(request), read, volume_revision_message
        )
        return volume_service_pb2.ListVolumeRevisionsResponse(revisions=found, next_page_token=token)

    @override
    def AdoptVolume(
        self, request: volume_service_pb2.AdoptVolumeRequest, context: Context
    ) -> AsyncIterator[volume_service_pb2.AdoptVolumeResponse]:
        command = validation.adopt(request)
        return self._operate("AdoptVolume", request, command, volume_service_pb2.AdoptVolumeResponse)

    async def _operate(
        self, method: str, request: _OperationRequest, command: Command, event: _ResponseType[R_co]
    ) -> AsyncIterator[R_co]:
        """The plan alone, or the operation to its end. Whoever leaves leaves it to itself."""
        if request.validate_only:
            yield event(operation=stream.record_message(await self._volumes.preview(command)))
            return
        operation_id = await self._volumes.begin(command, _key(method, request))
        async with aclosing(stream.follow(self._operations, operation_id)) as shown:
            async for message in shown:
                match message:
                    case operation_pb2.Operation():
                        yield event(operation=message)
                    case volume_pb2.Volume() | None:
                        yield event(result=message)
                    case other:
                        raise TypeError(f"{command} left {other}")


def _key(method: str, request: MutationRequest) -> RequestKey | None:
    return request_key(f"/{SERVICE}/{method}", request)
