"""VolumeService: each request is checked, handed to core, and its outcome shown."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Protocol, TypeVar

from gpudock.v1 import operation_pb2, volume_pb2, volume_service_pb2
from gpudock.v1.volume_service_pb2_grpc import VolumeServiceServicer
from typing_extensions import override

from gpudock_server.core.operations import Operations, RequestKey
from gpudock_server.core.volumes import Volumes
from gpudock_server.core.volumes.commands import Command
from gpudock_server.core.watches import Watches
from gpudock_server.model.volume import VolumeRevision
from gpudock_server.ports import Page, VolumeSeen
from gpudock_server.rpc import page, page_token, progress
from gpudock_server.rpc.convert.volume import revision_message, seen_message
from gpudock_server.rpc.interception import Context
from gpudock_server.rpc.request_key import Mutation, request_key
from gpudock_server.rpc.telling import telling
from gpudock_server.rpc.validation import listing, watching
from gpudock_server.rpc.validation import volumes as validation

SERVICE = volume_service_pb2.DESCRIPTOR.services_by_name["VolumeService"].full_name

R_co = TypeVar("R_co", covariant=True)


class _Plannable(Mutation, Protocol):
    """A request that begins an operation, or asks for its plan alone."""

    @property
    def validate_only(self) -> bool:
        """Whether nothing is to be done."""
        ...


class _Event(Protocol[R_co]):
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
        return volume_service_pb2.CreateVolumeResponse(volume=seen_message(made))

    @override
    async def GetVolume(
        self, request: volume_service_pb2.GetVolumeRequest, context: Context
    ) -> volume_service_pb2.GetVolumeResponse:
        seen = await self._volumes.get(validation.get(request))
        return volume_service_pb2.GetVolumeResponse(volume=seen_message(seen))

    @override
    async def ListVolumes(
        self, request: volume_service_pb2.ListVolumesRequest, context: Context
    ) -> volume_service_pb2.ListVolumesResponse:
        moment = ""

        async def read(page_size: int, page_token: str) -> Page[VolumeSeen]:
            nonlocal moment
            found = await self._volumes.list(page_size=page_size, page_token=page_token)
            moment = found.watch_token
            return found

        found, token = await page.from_store(listing.volumes(request), read, seen_message)
        return volume_service_pb2.ListVolumesResponse(
            volumes=found,
            next_page_token=token,
            resume_token=page_token.sealed(watching.volume_scope(request.filter), moment),
        )

    @override
    def WatchVolumes(
        self, request: volume_service_pb2.WatchVolumesRequest, context: Context
    ) -> AsyncIterator[volume_service_pb2.WatchVolumesResponse]:
        asked = watching.volumes(request)
        watch = self._watches.volumes(asked.wanted, token=asked.resume, listing=asked.listing)
        return telling(asked, watch, seen_message, volume_service_pb2.WatchVolumesResponse)

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
            plan = progress.recorded(await self._volumes.preview(command))
            return volume_service_pb2.DeleteVolumeResponse(plan=plan)
        await self._volumes.run_to_end(command, _key("DeleteVolume", request))
        return volume_service_pb2.DeleteVolumeResponse()

    @override
    async def ListVolumeRevisions(
        self, request: volume_service_pb2.ListVolumeRevisionsRequest, context: Context
    ) -> volume_service_pb2.ListVolumeRevisionsResponse:
        async def read(page_size: int, page_token: str) -> Page[VolumeRevision]:
            return await self._volumes.revisions(request.name, page_size=page_size, page_token=page_token)

        found, token = await page.from_store(listing.volume_revisions(request), read, revision_message)
        return volume_service_pb2.ListVolumeRevisionsResponse(revisions=found, next_page_token=token)

    @override
    def AdoptVolume(
        self, request: volume_service_pb2.AdoptVolumeRequest, context: Context
    ) -> AsyncIterator[volume_service_pb2.AdoptVolumeResponse]:
        command = validation.adopt(request)
        return self._operate("AdoptVolume", request, command, volume_service_pb2.AdoptVolumeResponse)

    async def _operate(
        self, method: str, request: _Plannable, command: Command, event: _Event[R_co]
    ) -> AsyncIterator[R_co]:
        """The plan alone, or the operation to its end. Whoever leaves leaves it to itself."""
        if request.validate_only:
            yield event(operation=progress.recorded(await self._volumes.preview(command)))
            return
        operation_id = await self._volumes.begin(command, _key(method, request))
        async with aclosing(progress.follow(self._operations, operation_id)) as shown:
            async for message in shown:
                match message:
                    case operation_pb2.Operation():
                        yield event(operation=message)
                    case volume_pb2.Volume() | None:
                        yield event(result=message)
                    case other:
                        raise TypeError(f"{command} left {other}")


def _key(method: str, request: Mutation) -> RequestKey | None:
    return request_key(f"/{SERVICE}/{method}", request)
