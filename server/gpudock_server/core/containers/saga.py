"""What the sagas of containers have in common: the world that they act on, and how they see their container."""

from __future__ import annotations

from typing_extensions import override

from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.core.containers.world import World
from gpudock_server.core.operations.saga import OperationRun, Saga
from gpudock_server.ports import ContainerView


class ContainerSaga(Saga[ContainerView]):
    """A saga whose target is a container."""

    def __init__(self, world: World) -> None:
        self._world = world

    @override
    async def read_target(self, run: OperationRun) -> ContainerView | None:
        return await ContainerResource(self._world.store).view_of(run.operation.target)
