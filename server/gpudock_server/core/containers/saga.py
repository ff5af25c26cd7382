"""The base of the sagas of containers, which reads their container."""

from __future__ import annotations

from typing_extensions import override

from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.core.operations.saga import OperationRun, Saga
from gpudock_server.ports import ContainerView


class ContainerSaga(Saga[ContainerView]):
    """A saga whose target is a container."""

    def __init__(self, containers: ContainerResource) -> None:
        self._containers = containers

    @override
    async def read_target(self, run: OperationRun) -> ContainerView | None:
        return await self._containers.view_of(run.operation.target)
