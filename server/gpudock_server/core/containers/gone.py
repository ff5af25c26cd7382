"""Containers whose engine container was removed outside gpudock, and what is left of them."""

from __future__ import annotations

from gpudock_server.core.containers.world import World
from gpudock_server.errors import ContainerGone
from gpudock_server.model.container import Container, ContainerState
from gpudock_server.ports import RevisionView


async def is_gone(world: World, container: Container) -> bool:
    """Whether the engine has nothing of a container any more."""
    return container.engine is None or await world.engine.inspect(container.engine.engine_id) is None


async def refuse_if_gone(world: World, container: Container) -> None:
    """Raises ContainerGone, with the revisions that it can be brought back to, where its engine container is gone."""
    if container.status.state is ContainerState.FAILED and await is_gone(world, container):
        kept = await with_files(world, container.uid)
        numbers = tuple(str(one.revision.revision) for one in kept)
        raise ContainerGone(container=container.name, revisions=numbers)


async def with_files(world: World, uid: str) -> tuple[RevisionView, ...]:
    """The revisions whose files are kept, oldest first."""
    return tuple(one for one in await world.store.history(uid) if one.snapshot is not None)
