"""Containers as operations see them."""

from __future__ import annotations

from typing_extensions import override

from gpudock_server.core.operations.resource import Resource
from gpudock_server.errors import ContainerBusy, ContainerExists, WrongNode
from gpudock_server.model.container import Container
from gpudock_server.model.resource import ResourceKind
from gpudock_server.ports import ContainerView


class ContainerResource(Resource[ContainerView]):
    """See Resource."""

    kind = ResourceKind.CONTAINER

    @override
    async def view(self, name: str) -> ContainerView | None:
        return await self._store.container(name)

    @override
    def record(self, view: ContainerView) -> Container:
        return view.container

    @override
    def exists_error(self, name: str) -> ContainerExists:
        return ContainerExists(container=name)

    @override
    def busy_error(self, name: str, operation_id: str) -> ContainerBusy:
        return ContainerBusy(container=name, operation_id=operation_id)

    @override
    def wrong_node_error(self, name: str, node: str, address: str) -> WrongNode:
        return WrongNode(container=name, node=node, address=address)
