"""Drafts of start, restart and scale: which states allow them, and the state that each requests."""

from __future__ import annotations

from dataclasses import dataclass

from gpudock_server.core.containers.change_draft import ChangeDrafter
from gpudock_server.core.containers.change_plan import DesiredState
from gpudock_server.core.containers.commands import Restart, Scale, ScaleStrategy, Start
from gpudock_server.core.containers.history import History
from gpudock_server.core.containers.resource import UNPAUSED_STATES, ContainerResource, require_state
from gpudock_server.core.operations.saga import OperationDraft
from gpudock_server.errors import GpusOfRunningContainer, RestartRequired, ScaledContainerNotRunning
from gpudock_server.model.container import RUNNING_STATES, STOPPED_STATES, ContainerState
from gpudock_server.model.operation import OperationKind
from gpudock_server.model.spec import ContainerSpec


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """Drafts start, restart and scale of a container."""

    containers: ContainerResource
    history: History
    changes: ChangeDrafter

    async def draft_start(self, command: Start) -> OperationDraft:
        """Draft a start. A running container stays as it is; other GPUs then raise GpusOfRunningContainer."""
        view = await self.containers.find_unlocked(command.name, command.etag)
        container = view.container
        spec = container.spec if command.gpus is None else container.spec.changed(gpus=command.gpus)
        await self.history.refuse_if_gone(container)
        require_state(container, UNPAUSED_STATES, "to start it, it must be STOPPED or EXITED")
        if container.status.state in RUNNING_STATES and spec.gpus != container.spec.gpus:
            raise GpusOfRunningContainer(container=command.name, state=container.status.state.value)
        return await self.changes.draft(
            view, DesiredState(OperationKind.START, spec, runs=True, snapshots=command.snapshots)
        )

    async def draft_restart(self, command: Restart) -> OperationDraft:
        """Draft a restart: stop the container if it runs, and start it."""
        view = await self.containers.find_unlocked(command.name, command.etag)
        await self.history.refuse_if_gone(view.container)
        needs = "to restart it, it must be RUNNING, PAUSED, STOPPED or EXITED"
        require_state(view.container, UNPAUSED_STATES | {ContainerState.PAUSED}, needs)
        desired = DesiredState(
            OperationKind.RESTART,
            view.container.spec,
            runs=True,
            restart=True,
            stop_timeout=command.timeout,
            snapshots=command.snapshots,
        )
        return await self.changes.draft(view, desired)

    async def draft_scale(self, command: Scale) -> OperationDraft:
        """Draft a change of GPUs, limits or /dev/shm size."""
        view = await self.containers.find_unlocked(command.name, command.etag)
        container = view.container
        spec = _scaled(container.spec, command)
        state = container.status.state
        await self.history.refuse_if_gone(container)
        require_state(container, UNPAUSED_STATES, "to scale it, it must be RUNNING, STOPPED or EXITED")
        fixed = tuple(
            field for field in ("gpus", "shm_size_bytes") if getattr(spec, field) != getattr(container.spec, field)
        )
        recreate = command.strategy is ScaleStrategy.RECREATE
        if state in STOPPED_STATES and (fixed or recreate):
            raise ScaledContainerNotRunning(container=command.name, state=state.value)
        if command.strategy is ScaleStrategy.LIVE and fixed:
            raise RestartRequired(container=command.name, changes=fixed)
        desired = DesiredState(
            OperationKind.SCALE,
            spec,
            runs=state in RUNNING_STATES,
            recreate=recreate,
            live=command.strategy is ScaleStrategy.LIVE,
            chooses_gpus=command.gpus is not None,
            snapshots=command.snapshots,
        )
        return await self.changes.draft(view, desired)


def _scaled(spec: ContainerSpec, command: Scale) -> ContainerSpec:
    requested = {
        "gpus": command.gpus,
        "cpus": command.cpus,
        "memory_bytes": command.memory_bytes,
        "shm_size_bytes": command.shm_size_bytes,
    }
    return spec.changed(**{field: value for field, value in requested.items() if value is not None})
