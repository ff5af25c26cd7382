"""Containers: what can be asked of them, and the saga behind each request.

`commands` names the requests. Each is drafted by the module of its name (start, restart and scale share `lifecycle`),
which checks it, picks cards and ports, and says what it will do; the saga it builds does it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from gpudock_server.core.containers import (
    clone,
    commit,
    create,
    delete,
    history,
    lifecycle,
    pause,
    rollback,
    stop,
    update,
)
from gpudock_server.core.containers.change_saga import ChangeSaga
from gpudock_server.core.containers.clone import CloneSaga
from gpudock_server.core.containers.commands import (
    Clone,
    Command,
    Commit,
    Create,
    Delete,
    DeleteRevision,
    Pause,
    Restart,
    Rollback,
    Scale,
    Start,
    Stop,
    Unpause,
    Update,
)
from gpudock_server.core.containers.commit import CommitSaga
from gpudock_server.core.containers.create import CreateSaga
from gpudock_server.core.containers.delete import DeleteSaga
from gpudock_server.core.containers.history import DeleteRevisionSaga, find_revision
from gpudock_server.core.containers.images import ImagePolicy
from gpudock_server.core.containers.pause import PauseSaga
from gpudock_server.core.containers.stop import StopSaga
from gpudock_server.core.containers.world import HistoryDefaults, World
from gpudock_server.core.operations.engine import Draft, Operations, RequestKey, planned_operation
from gpudock_server.core.operations.saga import Saga
from gpudock_server.errors import ContainerNotFound
from gpudock_server.model.container import Container
from gpudock_server.model.engine import HostCapacity
from gpudock_server.model.operation import Operation, OperationKind
from gpudock_server.ports import ContainerView, Page, RevisionView

__all__ = ["Containers", "HistoryDefaults", "ImagePolicy", "World", "build_saga"]


def build_saga(world: World, operation: Operation) -> Saga[Any]:  # noqa: PLR0911 - one case for each kind of operation
    """Makes the saga of a recorded operation on a container."""
    match operation.kind:
        case OperationKind.CREATE:
            return CreateSaga(world, operation)
        case (
            OperationKind.START
            | OperationKind.RESTART
            | OperationKind.SCALE
            | OperationKind.UPDATE
            | OperationKind.ROLLBACK
        ):
            return ChangeSaga(world, operation)
        case OperationKind.CLONE:
            return CloneSaga(world, operation)
        case OperationKind.DELETE_REVISION:
            return DeleteRevisionSaga(world, operation)
        case OperationKind.STOP:
            return StopSaga(world, operation)
        case OperationKind.PAUSE | OperationKind.UNPAUSE:
            return PauseSaga(world, operation)
        case OperationKind.DELETE:
            return DeleteSaga(world, operation)
        case OperationKind.COMMIT:
            return CommitSaga(world, operation)
        case kind:
            raise ValueError(f"{kind} is not done to containers")


class Containers:
    """Reads containers, and begins operations on them."""

    def __init__(self, world: World, operations: Operations) -> None:
        """`operations` must have been built with `saga_factory` (core/saga_factory.py)."""
        self._world = world
        self._operations = operations

    async def get(self, name: str) -> ContainerView:
        """A container of any node. Raises ContainerNotFound."""
        view = await self._world.store.container(name)
        if view is None:
            raise ContainerNotFound(container=name)
        return view

    async def list(self, *, page_size: int, page_token: str) -> Page[ContainerView]:
        """Containers of all nodes in the order of their names. Raises ResumeTokenExpired."""
        return await self._world.store.containers(page_size=page_size, page_token=page_token)

    @property
    def host(self) -> HostCapacity:
        """What a container can be given at most."""
        return self._world.capacity

    async def revision(self, name: str, number: int) -> tuple[Container, RevisionView]:
        """A container and one of its revisions, 0 for the current one. Raises ContainerNotFound, RevisionNotFound."""
        container = (await self.get(name)).container
        return container, await find_revision(self._world, container, number or container.revision)

    async def revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[RevisionView]:
        """A container's history, oldest first. Raises ResumeTokenExpired."""
        return await self._world.store.revisions(uid, page_size=page_size, page_token=page_token)

    async def begin(self, command: Command, request: RequestKey | None) -> str:
        """Begin what is asked for; the id of its operation. Nothing has been done before this returns."""
        return await self._operations.begin(lambda: self._draft(command), request)

    async def run(self, command: Command, request: RequestKey | None) -> Container:
        """Begin what is asked for and wait for its end, which it reaches even when the caller does not."""
        result = await self._operations.result(await self.begin(command, request))
        if not isinstance(result, Container):
            raise TypeError(f"{type(command).__name__} leaves no container")
        return result

    async def run_to_end(self, command: Command, request: RequestKey | None) -> None:
        """`run` for what leaves nothing, such as a deletion."""
        await self._operations.done(await self.begin(command, request))

    async def preview(self, command: Command) -> Operation:
        """What `begin` would do, with nothing done: an operation that is PLANNED and has no id."""
        return planned_operation(await self._draft(command), self._world.node)

    async def _draft(self, command: Command) -> Draft:
        return await _DRAFTERS[type(command)](self._world, command)


_DRAFTERS: dict[type, Callable[[World, Any], Awaitable[Draft]]] = {
    Create: create.draft,
    Start: lifecycle.draft_start,
    Restart: lifecycle.draft_restart,
    Scale: lifecycle.draft_scale,
    Update: update.draft_update,
    Rollback: rollback.draft_rollback,
    Clone: clone.draft,
    DeleteRevision: history.draft,
    Stop: stop.draft,
    Pause: pause.draft,
    Unpause: pause.draft,
    Delete: delete.draft,
    Commit: commit.draft,
}
