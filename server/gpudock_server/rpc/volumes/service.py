"""VolumeService: converts each request, calls core, and converts the result."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from typing import TypeVar

from gpudock.v1 import volume_service_pb2 as pb
from gpudock.v1.volume_service_pb2_grpc import VolumeServiceServicer
from typing_extensions import override

from gpudock_server import tokens
from gpudock_server.core.operations.engine import Operations
from gpudock_server.core.volumes.commands import Command
from gpudock_server.core.volumes.service import Volumes
from gpudock_server.core.watches import Watches
from gpudock_server.rpc import list_requests, pagination, watch_requests
from gpudock_server.rpc.middleware.interceptor import Context
from gpudock_server.rpc.operations import stream
from gpudock_server.rpc.operations.request_key import OperationRequest, request_key
from gpudock_server.rpc.volumes import requests as validation
from gpudock_server.rpc.volumes.messages import volume_details_message, volume_revision_message
from gpudock_server.rpc.watch_stream import watch_stream

SERVICE = pb.DESCRIPTOR.services_by_name["VolumeService"].full_name

R = TypeVar("R")


class VolumeService(VolumeServiceServicer):
    """Serves gpudock.v1.VolumeService. Its streaming methods return a generator: see ContainerService."""

    def __init__(self, volumes: Volumes, operations: Operations, watches: Watches) -> None:
        self._volumes = volumes
        self._watches = watches
        self._operations = operations

    @override
    async def CreateVolume(self, request: pb.CreateVolumeRequest, context: Context) -> pb.CreateVolumeResponse:
        created = await self._volumes.run(validation.create(request), request_key(request))
        return pb.CreateVolumeResponse(volume=volume_details_message(created))

    @override
    async def GetVolume(self, request: pb.GetVolumeRequest, context: Context) -> pb.GetVolumeResponse:
        details = await self._volumes.get(validation.get(request))
        return pb.GetVolumeResponse(volume=volume_details_message(details))

    @override
    async def ListVolumes(self, request: pb.ListVolumesRequest, context: Context) -> pb.ListVolumesResponse:
        page = await pagination.from_store(list_requests.volumes(request), self._volumes.list, volume_details_message)
        return pb.ListVolumesResponse(
            volumes=page.messages,
            next_page_token=page.next_token,
            resume_token=tokens.encode_token(watch_requests.volume_scope(request.filter), page.watch_position),
        )

    @override
    def WatchVolumes(self, request: pb.WatchVolumesRequest, context: Context) -> AsyncIterator[pb.WatchVolumesResponse]:
        watch_request = watch_requests.volumes(request)
        watch = self._watches.volumes(watch_request.matches, token=watch_request.resume, listing=watch_request.listing)
        return watch_stream(watch_request, watch, volume_details_message, pb.WatchVolumesResponse)

    @override
    def ResizeVolume(self, request: pb.ResizeVolumeRequest, context: Context) -> AsyncIterator[pb.ResizeVolumeResponse]:
        command = validation.resize(request)
        return self._operate(request, command, pb.ResizeVolumeResponse)

    @override
    async def DeleteVolume(self, request: pb.DeleteVolumeRequest, context: Context) -> pb.DeleteVolumeResponse:
        command = validation.delete(request)
        if request.validate_only:
            plan = stream.record_message(await self._volumes.preview(command))
            return pb.DeleteVolumeResponse(plan=plan)
        await self._volumes.run_to_end(command, request_key(request))
        return pb.DeleteVolumeResponse()

    @override
    async def ListVolumeRevisions(
        self, request: pb.ListVolumeRevisionsRequest, context: Context
    ) -> pb.ListVolumeRevisionsResponse:
        page = await pagination.from_store(
            list_requests.volume_revisions(request),
            partial(self._volumes.revisions, request.name),
            volume_revision_message,
        )
        return pb.ListVolumeRevisionsResponse(revisions=page.messages, next_page_token=page.next_token)

    @override
    def AdoptVolume(self, request: pb.AdoptVolumeRequest, context: Context) -> AsyncIterator[pb.AdoptVolumeResponse]:
        command = validation.adopt(request)
        return self._operate(request, command, pb.AdoptVolumeResponse)

    def _operate(
        self, request: OperationRequest, command: Command, response: stream.OperationResponse[R]
    ) -> AsyncIterator[R]:
        return stream.operate(self._volumes, self._operations, request, command, response)
