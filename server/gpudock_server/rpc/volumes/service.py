"""VolumeService: converts each request, calls core, and converts the result."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Protocol, TypeVar

from gpudock.v1 import operation_pb2, volume_pb2, volume_service_pb2
from gpudock.v1.volume_service_pb2_grpc import VolumeServiceServicer
from typing_extensions import override

from gpudock_server import tokens
from gpudock_server.core.operations.engine import Operations, RequestKey
from gpudock_server.core.volumes.commands import Command
from gpudock_server.core.volumes.service import Volumes
from gpudock_server.core.watches import Watches
from gpudock_server.model.volume import VolumeRevision
from gpudock_server.ports import Page, VolumeDetails
from gpudock_server.rpc import list_requests, pagination, watch_requests
from gpudock_server.rpc.middleware.interceptor import Context
from gpudock_server.rpc.operations import stream
from gpudock_server.rpc.operations.request_key import MutationRequest, request_key
from gpudock_server.rpc.volumes import requests as validation
from gpudock_server.rpc.volumes.messages import volume_details_message, volume_revision_message
from gpudock_server.rpc.watch_stream import watch_stream

SERVICE = volume_service_pb2.DESCRIPTOR.services_by_name["VolumeService"].full_name

R_co = TypeVar("R_co", covariant=True)


class _OperationRequest(MutationRequest, Protocol):
    """A request that starts an operation, or only plans it."""

    @property
    def validate_only(self) -> bool:
        """Whether to return the plan only."""
        ...


class _ResponseType(Protocol[R_co]):
    """The class of a response that holds an operation or its result."""

    def __call__(
        self, *, operation: operation_pb2.Operation | None = None, result: volume_pb2.Volume | None = None
    ) -> R_co:
        """Create a response."""
        ...


class VolumeService(VolumeServiceServicer):
    """Serves gpudock.v1.VolumeService. Its streaming methods return a generator: see ContainerService."""

    def __init__(self, volumes: Volumes, operations: Operations, watches: Watches) -> None:
        self._volumes = volumes
        self._watches = watches
        self._operations = operations

    @override
    async def CreateVolume(
        self, request: volume_service_pb2.CreateVolumeRequest, context: Context
    ) -> volume_service_pb2.CreateVolumeResponse:
        created = await self._volumes.run(validation.create(request), _key("CreateVolume", request))
        return volume_service_pb2.CreateVolumeResponse(volume=volume_details_message(created))

    @override
    async def GetVolume(
        self, request: volume_service_pb2.GetVolumeRequest, context: Context
    ) -> volume_service_pb2.GetVolumeResponse:
        details = await self._volumes.get(validation.get(request))
        return volume_service_pb2.GetVolumeResponse(volume=volume_details_message(details))

    @override
    async def ListVolumes(
        self, request: volume_service_pb2.ListVolumesRequest, context: Context
    ) -> volume_service_pb2.ListVolumesResponse:
        watch_token = ""

        async def read(page_size: int, page_token: str) -> Page[VolumeDetails]:
            nonlocal watch_token
            found = await self._volumes.list(page_size=page_size, page_token=page_token)
            watch_token = found.watch_token
            return found

        found, token = await pagination.from_store(list_requests.volumes(request), read, volume_details_message)
        return volume_service_pb2.ListVolumesResponse(
            volumes=found,
            next_page_token=token,
            resume_token=tokens.encode_token(watch_requests.volume_scope(request.filter), watch_token),
        )

    @override
    def WatchVolumes(
        self, request: volume_service_pb2.WatchVolumesRequest, context: Context
    ) -> AsyncIterator[volume_service_pb2.WatchVolumesResponse]:
        watch_request = watch_requests.volumes(request)
        watch = self._watches.volumes(watch_request.matches, token=watch_request.resume, listing=watch_request.listing)
        return watch_stream(watch_request, watch, volume_details_message, volume_service_pb2.WatchVolumesResponse)

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
        """Stream the plan, or the operation until it ends. Disconnecting does not cancel the operation."""
        if request.validate_only:
            yield event(operation=stream.record_message(await self._volumes.preview(command)))
            return
        operation_id = await self._volumes.begin(command, _key(method, request))
        async with aclosing(stream.follow(self._operations, operation_id)) as messages:
            async for message in messages:
                match message:
                    case operation_pb2.Operation():
                        yield event(operation=message)
                    case volume_pb2.Volume() | None:
                        yield event(result=message)
                    case other:
                        raise TypeError(f"{command} has the result {other}")


def _key(method: str, request: MutationRequest) -> RequestKey | None:
    return request_key(f"/{SERVICE}/{method}", request)
