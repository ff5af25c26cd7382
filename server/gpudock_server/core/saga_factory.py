"""The saga of any recorded operation, by what it works on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gpudock_server.core import containers, volumes
from gpudock_server.core.containers.world import World
from gpudock_server.core.operations.saga import Saga
from gpudock_server.core.volumes.storage import Storage
from gpudock_server.model.operation import Operation
from gpudock_server.model.resource import ResourceKind


def saga_factory(world: World, storage: Storage) -> Callable[[Operation], Saga[Any]]:
    """Makes the saga of any recorded operation, for `Operations` to resume."""

    def build(operation: Operation) -> Saga[Any]:
        match operation.target.kind:
            case ResourceKind.CONTAINER:
                return containers.build_saga(world, operation)
            case ResourceKind.VOLUME:
                return volumes.build_saga(storage, operation)

    return build
