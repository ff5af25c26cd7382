"""Containers: what can be asked of them, and the saga behind each request.

`commands` names the requests. Each is drafted by the module of its name (start, restart and scale share `lifecycle`),
which checks it, picks cards and ports, and says what it will do; the saga it builds does it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
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
from gpudock_server.core.operations.commands import Commands
from gpudock_server.core.operations.engine import Operations, RequestKey
from gpudock_server.core.operations.saga import OperationDraft, Saga, SagaBuilder
from gpudock_server.errors import ContainerNotFound
from gpudock_server.model.container import Container
from gpudock_server.model.engine import HostCapacity
from gpudock_server.model.operation import Operation, OperationKind
from gpudock_server.ports import ContainerView, Page, RevisionView

__all__ = ["Containers", "HistoryDefaults", "ImagePolicy", "World", "saga_builders"]


def saga_builders(world: World) -> dict[OperationKind, SagaBuilder]:
    """Makes the saga of a recorded operation on a container, by its kind."""
    changes = (
        OperationKind.START,
        OperationKind.RESTART,
        OperationKind.SCALE,
        OperationKind.UPDATE,
        OperationKind.ROLLBACK,
    )
    sagas: dict[OperationKind, Callable[[World, Operation], Saga[Any]]] = {
        OperationKind.CREATE: CreateSaga,
        **dict.fromkeys(changes, ChangeSaga),
        OperationKind.CLONE: CloneSaga,
        OperationKind.DELETE_REVISION: DeleteRevisionSaga,
        OperationKind.STOP: StopSaga,
        OperationKind.PAUSE: PauseSaga,
        OperationKind.UNPAUSE: PauseSaga,
        OperationKind.DELETE: DeleteSaga,
        OperationKind.COMMIT: CommitSaga,
    }
    return {kind: partial(saga, world) for kind, saga in sagas.items()}


class Containers(Commands):
    """Reads containers, and begins operations on them."""

    def __init__(self, world: World, operations: Operations) -> None:
        """`operations` must have been built with `saga_builders`."""
        super().__init__(operations, {command: partial(draft, world) for command, draft in _DRAFTERS.items()})
        self._world = world

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

    async def run(self, command: Command, request: RequestKey | None) -> Container:
        """Begin an operation and wait for its end; the container that it leaves."""
        result = await self._run(command, request)
        if not isinstance(result, Container):
            raise TypeError(f"{type(command).__name__} leaves no container")
        return result


_DRAFTERS: dict[type, Callable[[World, Any], Awaitable[OperationDraft]]] = {
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
