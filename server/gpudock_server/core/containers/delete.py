"""DeleteContainer: remove the engine container and all files, then the record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from typing_extensions import override

from gpudock_server.core.containers.commands import Delete
from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.containers.history import History
from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Saga, Step
from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.errors import ContainerRunning
from gpudock_server.model import store_changes
from gpudock_server.model.claims import claim_keys
from gpudock_server.model.container import ACTIVE_STATES, ContainerState, EngineBinding, Placement
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.record import Record, now
from gpudock_server.model.store_changes import PutContainer, StoreChange
from gpudock_server.ports import ContainerView, Engine


class DeleteArguments(Record):
    """The arguments from which the saga is rebuilt."""

    engine: EngineBinding | None
    placement: Placement


@dataclass(frozen=True, slots=True)
class DeleteContainer:
    """Drafts the deletion of a container."""

    containers: ContainerResource
    engine: Engine
    engine_containers: EngineContainers
    history: History
    claims: HostClaims

    async def draft(self, command: Delete) -> OperationDraft:
        """Check that the container is stopped, or that `force` is set. Raises ContainerRunning."""
        view = await self.containers.find_unlocked(command.name, command.etag)
        container = view.container
        state = container.status.state
        if state in ACTIVE_STATES and not command.force:
            raise ContainerRunning(container=command.name, state=state.value)
        arguments = DeleteArguments(engine=container.engine, placement=container.status.placement)
        return OperationDraft(
            kind=OperationKind.DELETE,
            target=container.target,
            target_record=PutContainer(container.with_status(state=ContainerState.DELETING), expect=view.version),
            arguments=arguments.model_dump(mode="json"),
            plan=OperationPlan(),
            build=partial(DeleteSaga, self),
        )


class DeleteSaga(Saga[ContainerView]):
    """Removal cannot be undone. A failure keeps the record, so that the same call can finish the deletion."""

    cancellable = False

    def __init__(self, delete: DeleteContainer, operation: Operation) -> None:
        """Read the arguments from the operation's record."""
        super().__init__(delete.containers)
        self._delete = delete
        self._arguments = DeleteArguments.model_validate(operation.arguments)

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        return (Step("remove", self._remove), Step("clean", self._clean))

    async def _remove(self, _run: OperationRun) -> None:
        if self._arguments.engine is not None:
            await self._delete.engine_containers.remove(
                self._arguments.engine.engine_id, self._arguments.engine.engine_name
            )

    async def _clean(self, run: OperationRun) -> None:
        """Remove the anonymous volumes, layer images, snapshots and history of the container."""
        await self._delete.history.delete_all(run.operation.target.uid)
        if self._arguments.engine is None:
            return
        for volume in self._arguments.engine.anonymous_volumes.values():
            await self._delete.engine.remove_volume(volume)
        for image in reversed(self._arguments.engine.layer_images):
            await self._delete.engine.remove_image(image)

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        container = view.container
        changes: list[StoreChange] = [
            store_changes.DeleteContainer(container.name, container.uid, expect=view.version),
            *self._delete.claims.release(container.uid, claim_keys(self._arguments.placement)),
        ]
        return Outcome(changes, container)

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        container = view.container
        if self._arguments.engine is not None:
            container = await self._delete.engine_containers.observe(container, self._arguments.engine.engine_id)
            container = container.changed(update_time=now())
        return [PutContainer(container, expect=view.version)]
