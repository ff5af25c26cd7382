"""Volumes as operations see them."""

from __future__ import annotations

from typing_extensions import override

from gpudock_server.core.operations.resource import Resource
from gpudock_server.errors import VolumeBusy, VolumeExists, VolumeOnOtherNode
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.volume import Volume
from gpudock_server.ports import VolumeView


class VolumeResource(Resource[VolumeView]):
    """See Resource."""

    kind = ResourceKind.VOLUME

    @override
    async def view(self, name: str) -> VolumeView | None:
        return await self._store.volume(name)

    @override
    def record(self, view: VolumeView) -> Volume:
        return view.volume

    @override
    def exists_error(self, name: str) -> VolumeExists:
        return VolumeExists(volume=name)

    @override
    def busy_error(self, name: str, operation_id: str) -> VolumeBusy:
        return VolumeBusy(volume=name, operation_id=operation_id)

    @override
    def wrong_node_error(self, name: str, node: str, address: str) -> VolumeOnOtherNode:
        return VolumeOnOtherNode(volume=name, node=node, address=address)
