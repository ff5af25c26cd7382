"""Volumes: create, read, watch, resize, adopt and delete."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import grpc.aio

from gpudock._calls import Calls, request_id_or_new
from gpudock._enums import enum_value
from gpudock._operations import OperationCall, Operations
from gpudock._pages import Pages
from gpudock._watch import Watch
from gpudock.v1 import volume_service_pb2 as pb
from gpudock.v1.operation_pb2 import Operation
from gpudock.v1.operation_service_pb2 import OperationResult
from gpudock.v1.volume_pb2 import VOLUME_BACKEND_UNSPECIFIED, Volume, VolumeBackend, VolumeRevision
from gpudock.v1.volume_service_pb2_grpc import VolumeServiceStub


class Volumes:
    """The volumes of the installation. `request_id`, `etag` and `validate_only` are as in `Containers`."""

    def __init__(self, calls: Calls, channel: grpc.aio.Channel, operations: Operations) -> None:
        self._calls = calls
        self._stub = VolumeServiceStub(channel)
        self._operations = operations

    async def create(
        self,
        name: str,
        size_bytes: int = 0,
        *,
        owner: str = "",
        backend: str = "",
        labels: Mapping[str, str] | None = None,
        request_id: str | None = None,
    ) -> Volume:
        """Create an empty volume; without a size it may grow until the disk of the node is full.

        `backend` is `project-quota`, `loop` or `plain`; by default the best that the node supports.
        """
        request = pb.CreateVolumeRequest(
            name=name,
            owner=owner,
            size_bytes=size_bytes,
            backend=_backend(backend),
            labels=labels or {},
            request_id=request_id_or_new(request_id),
        )
        return (await self._calls.change(self._stub.CreateVolume, request)).volume

    async def get(self, name: str) -> Volume:
        """Return a volume."""
        return (await self._calls.read(self._stub.GetVolume, pb.GetVolumeRequest(name=name))).volume

    def list(
        self, *, labels: Mapping[str, str] | None = None, owner: str = "", node: str = "", page_size: int = 0
    ) -> Pages[Volume]:
        """List volumes by name: with all `labels` (`""` matches any value), of an `owner`, on a `node`."""
        filters = pb.VolumeFilter(labels=labels or {}, owner=owner, node=node)
        request = pb.ListVolumesRequest(page_size=page_size, filter=filters)
        return Pages(self._calls, self._stub.ListVolumes, request, lambda answer: answer.volumes)

    def watch(
        self,
        *,
        labels: Mapping[str, str] | None = None,
        owner: str = "",
        node: str = "",
        resume_token: str = "",
        changes_only: bool = False,
        checkpoints: bool = False,
    ) -> Watch[Volume]:
        """Watch volumes and who mounts them, as `Containers.watch` does for containers.

        The filter is that of `list`. The volumes in the events have no `used_bytes`.
        """
        filters = pb.VolumeFilter(labels=labels or {}, owner=owner, node=node)
        request = pb.WatchVolumesRequest(filter=filters, resume_token=resume_token, changes_only=changes_only)
        return Watch(self._calls, self._stub.WatchVolumes, request, checkpoints=checkpoints)

    def resize(
        self,
        name: str,
        size_bytes: int,
        *,
        validate_only: bool = False,
        etag: str = "",
        request_id: str | None = None,
    ) -> OperationCall[Volume]:
        """Resize a volume, also while containers use it.

        Growing stops no container. Shrinking may need a copy, which stops the containers that use it for a moment.
        """
        request = pb.ResizeVolumeRequest(
            name=name,
            size_bytes=size_bytes,
            request_id=request_id_or_new(request_id),
            etag=etag,
            validate_only=validate_only,
        )
        return self._operations.begin(self._stub.ResizeVolume, request, _volume_of)

    async def delete(self, name: str, *, force: bool = False, etag: str = "", request_id: str | None = None) -> None:
        """Delete a volume and its files; refused while a container mounts it.

        With `force`, refused only while a running container mounts it; each stopped one gets a revision without the
        mount.
        """
        request = pb.DeleteVolumeRequest(name=name, request_id=request_id_or_new(request_id), etag=etag, force=force)
        await self._calls.change(self._stub.DeleteVolume, request)

    async def plan_delete(self, name: str, *, force: bool = False) -> Operation:
        """Return what `delete` would do; `plan.warnings` names the containers that `force` would update."""
        request = pb.DeleteVolumeRequest(name=name, force=force, validate_only=True)
        return (await self._calls.read(self._stub.DeleteVolume, request)).plan

    def revisions(self, name: str, *, page_size: int = 0) -> Pages[VolumeRevision]:
        """List the revisions of a volume with their sizes, oldest first."""
        request = pb.ListVolumeRevisionsRequest(name=name, page_size=page_size)
        return Pages(self._calls, self._stub.ListVolumeRevisions, request, lambda answer: answer.revisions)

    def adopt(
        self,
        name: str,
        engine_volume: str = "",
        *,
        size_bytes: int = 0,
        owner: str = "",
        backend: str = "",
        labels: Mapping[str, str] | None = None,
        validate_only: bool = False,
        request_id: str | None = None,
    ) -> OperationCall[Volume]:
        """Adopt a volume of the engine, whose name there is `engine_volume` or else `name`.

        Without a size the volume stays where it is; with a size its files are copied to a new volume.
        """
        request = pb.AdoptVolumeRequest(
            name=name,
            engine_volume=engine_volume,
            owner=owner,
            size_bytes=size_bytes,
            backend=_backend(backend),
            labels=labels or {},
            request_id=request_id_or_new(request_id),
            validate_only=validate_only,
        )
        return self._operations.begin(self._stub.AdoptVolume, request, _volume_of)


def _backend(word: str) -> VolumeBackend.ValueType:
    return enum_value(VolumeBackend, word) if word else VOLUME_BACKEND_UNSPECIFIED


def _volume_of(result: Any) -> Volume:  # noqa: ANN401 - the result's type is that of the RPC's own message
    """Return the volume of a result, which is that of the operation's own RPC or of WatchOperation."""
    return result.volume if isinstance(result, OperationResult) else cast("Volume", result)
