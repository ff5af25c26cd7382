"""PauseContainer and UnpauseContainer: freeze and thaw the processes of a container, which keeps its GPUs and ports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from typing_extensions import override

from gpudock_server.core.containers.commands import Pause, Unpause
from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.containers.resource import ContainerResource, require_state
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Saga, Step
from gpudock_server.errors import ContainerNotPaused, ContainerNotRunning
from gpudock_server.model.container import ContainerState
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.record import Record, now
from gpudock_server.model.store_changes import PutContainer, StoreChange
from gpudock_server.ports import ContainerView, Engine


class PauseArguments(Record):
    """The arguments from which the saga is rebuilt."""

    engine_id: str
    freeze: bool


@dataclass(frozen=True, slots=True)
class PauseContainer:
    """Drafts the pause and unpause of a container."""

    containers: ContainerResource
    engine: Engine
    engine_containers: EngineContainers

    async def draft(self, command: Pause | Unpause) -> OperationDraft:
        """Check that the container is RUNNING (pause) or PAUSED (unpause)."""
        view = await self.containers.find_unlocked(command.name, command.etag)
        container = view.container
        state = container.status.state
        freeze = isinstance(command, Pause)
        if freeze:
            require_state(container, (ContainerState.RUNNING,), "to pause it, it must be RUNNING")
        if not freeze and state is not ContainerState.PAUSED:
            raise ContainerNotPaused(container=command.name, state=state.value)
        if container.engine is None:
            raise ContainerNotRunning(container=command.name, state=state.value)
        arguments = PauseArguments(engine_id=container.engine.engine_id, freeze=freeze)
        return OperationDraft(
            kind=OperationKind.PAUSE if freeze else OperationKind.UNPAUSE,
            target=container.target,
            target_record=PutContainer(container, expect=view.version),
            arguments=arguments.model_dump(mode="json"),
            plan=OperationPlan(placement=container.status.placement),
            build=partial(PauseSaga, self),
        )


class PauseSaga(Saga[ContainerView]):
    """One step: freeze or thaw. Each is the undo of the other."""

    cancellable = False

    def __init__(self, pause: PauseContainer, operation: Operation) -> None:
        """Read the arguments from the operation's record."""
        super().__init__(pause.containers)
        self._pause = pause
        self._arguments = PauseArguments.model_validate(operation.arguments)

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        if self._arguments.freeze:
            return (Step("pause", self._freeze, self._thaw),)
        return (Step("unpause", self._thaw, self._freeze),)

    async def _freeze(self, _run: OperationRun) -> None:
        await self._pause.engine.pause(self._arguments.engine_id)

    async def _thaw(self, _run: OperationRun) -> None:
        await self._pause.engine.unpause(self._arguments.engine_id)

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        container = await self._pause.engine_containers.observe(view.container, self._arguments.engine_id)
        container = container.changed(generation=container.generation + 1, update_time=now())
        return Outcome([PutContainer(container, expect=view.version)], container)

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        container = await self._pause.engine_containers.observe(view.container, self._arguments.engine_id)
        return [PutContainer(container.changed(update_time=now()), expect=view.version)]
