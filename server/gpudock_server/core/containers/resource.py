"""The container as a Resource of operations."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from typing_extensions import override

from gpudock_server.core.containers.operation_history import read_operation_history
from gpudock_server.core.containers.status import observed_status
from gpudock_server.core.operations.resource import Resource
from gpudock_server.errors import (
    ContainerBusy,
    ContainerExists,
    ContainerNotFound,
    ContainerNotRunning,
    ContainerPaused,
    ContainerRecordLost,
    StaleEtag,
    WrongNode,
)
from gpudock_server.model.container import RUNNING_STATES, STOPPED_STATES, Container, ContainerState
from gpudock_server.model.engine import LABEL_NAME, LABEL_NODE, LABEL_OPERATION, LABEL_SPEC, LABEL_UID, EngineContainer
from gpudock_server.model.resource import ResourceKind
from gpudock_server.ports import ContainerView, Engine, Store

# The states of a container with an engine container that is not frozen.
UNPAUSED_STATES = RUNNING_STATES | STOPPED_STATES


class ContainerResource(Resource[ContainerView]):
    """Reads the records of containers and builds the errors that name them; see Resource."""

    kind = ResourceKind.CONTAINER

    def __init__(self, store: Store, node: str, engine: Engine) -> None:
        super().__init__(store, node)
        self._engine = engine

    @override
    async def view(self, name: str) -> ContainerView | None:
        return await self._store.container(name)

    @override
    def record(self, view: ContainerView) -> Container:
        return view.container

    @override
    async def not_found_error(self, name: str) -> ContainerNotFound:
        return ContainerNotFound(container=name)

    @override
    def exists_error(self, name: str) -> ContainerExists:
        return ContainerExists(container=name)

    @override
    def busy_error(self, name: str, operation_id: str) -> ContainerBusy:
        return ContainerBusy(container=name, operation_id=operation_id)

    @override
    def stale_etag_error(self, name: str, etag: str, current: str) -> StaleEtag:
        return StaleEtag(container=name, etag=etag, current_etag=current)

    @override
    def wrong_node_error(self, name: str, node: str, address: str) -> WrongNode:
        return WrongNode(container=name, node=node, address=address)

    @override
    async def find_unlocked(self, name: str, etag: str = "") -> ContainerView:
        """See Resource. If the record is FAILED but the engine has the container again, its status is read again.

        Reconcile records the same status a moment later.
        """
        view = await super().find_unlocked(name, etag)
        container = view.container
        if container.status.state is not ContainerState.FAILED or container.engine is None:
            return view
        engine_container = await self._engine.inspect(container.engine.engine_id)
        return replace(view, container=container.changed(status=observed_status(container, engine_container)))

    async def require_free_name(self, name: str) -> None:
        """Raise ContainerExists, or ContainerRecordLost if engine containers of that name may have files.

        A new container of that name would prevent that reconcile restores their record. Engine containers that
        reconcile removes (core/reconcile/orphans.py) do not count.
        """
        if await self.view(name) is not None:
            raise self.exists_error(name)
        labelled = await self._engine.find({LABEL_NODE: self.node, LABEL_NAME: name})
        found = [candidate for candidate in labelled if candidate.name == candidate.created_name]
        if not found:
            return
        history = await read_operation_history(self._store, {_uid(candidate) for candidate in found})
        adoptable = [
            candidate
            for candidate in found
            if LABEL_SPEC in candidate.labels and _uid(candidate) not in history.deleted
        ]
        if len(found) == 1:
            adoptable = [
                candidate
                for candidate in adoptable
                if not history.was_undone(candidate.labels.get(LABEL_OPERATION, ""))
            ]
        if adoptable:
            raise ContainerRecordLost(container=name)


def require_state(container: Container, states: Collection[ContainerState], needs: str) -> None:
    """Raise ContainerPaused or ContainerNotRunning if a container is in none of these states.

    `needs`: the rest of the error's sentence, with the states that would be right.
    """
    state = container.status.state
    if state is ContainerState.PAUSED and state not in states:
        raise ContainerPaused(container=container.name)
    if state not in states:
        raise ContainerNotRunning(container=container.name, state=state.value, needs=needs)


def _uid(engine_container: EngineContainer) -> str:
    return engine_container.labels.get(LABEL_UID, "")
