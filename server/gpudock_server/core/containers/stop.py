"""StopContainer: stop the process, then give back what it held."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from gpudock_server.core.containers.commands import Stop
from gpudock_server.core.containers.observation import observed
from gpudock_server.core.containers.saga import ContainerSaga
from gpudock_server.core.containers.world import World
from gpudock_server.core.operations import Draft
from gpudock_server.core.saga import Outcome, Run, Step
from gpudock_server.errors import ContainerNotRunning
from gpudock_server.model.changes import Change, PutContainer, Release
from gpudock_server.model.claims import keys_of
from gpudock_server.model.container import LIVES, ContainerState, Placement
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.record import Record, now
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.ports import ContainerView


class StopArguments(Record):
    """What the saga needs to be built again. `reason` is why gpudock stops it on its own; empty where a user does."""

    engine_id: str
    spec: ContainerSpec
    lives: bool
    frozen: bool
    timeout: float | None
    keep_resources: bool
    placement: Placement
    reason: str = ""


async def draft(world: World, command: Stop) -> Draft:
    """Anything that has been created can be stopped; what has stopped already may still hold something."""
    view = await world.lookup(command.name, command.etag)
    container = view.container
    state = container.status.state
    if container.engine is None or state in (ContainerState.CREATING, ContainerState.DELETING):
        needs = "there is nothing to stop; it can be deleted"
        raise ContainerNotRunning(container=command.name, state=state.value, needs=needs)
    arguments = StopArguments(
        engine_id=container.engine.engine_id,
        spec=container.spec,
        lives=state in LIVES,
        frozen=state is ContainerState.PAUSED,
        timeout=command.timeout,
        keep_resources=command.keep_resources,
        placement=container.status.placement,
    )
    return _draft(world, view, arguments)


def draft_against(world: World, view: ContainerView, shown: EngineContainer, reason: str) -> Draft:
    """Stop what somebody else started, and leave `reason` in its status."""
    container = view.container
    arguments = StopArguments(
        engine_id=shown.id,
        spec=container.spec,
        lives=True,
        frozen=shown.state is EngineState.PAUSED,
        timeout=None,
        keep_resources=False,
        placement=container.status.placement,
        reason=reason,
    )
    return _draft(world, view, arguments)


def _draft(world: World, view: ContainerView, arguments: StopArguments) -> Draft:
    container = view.container
    return Draft(
        kind=OperationKind.STOP,
        target=container.target,
        head=PutContainer(container, expect=view.version),
        arguments=arguments.model_dump(mode="json"),
        plan=OperationPlan(
            placement=container.status.placement if arguments.keep_resources else Placement(),
            released_gpu_uuids=() if arguments.keep_resources else container.status.placement.gpu_uuids,
        ),
        build=lambda operation: StopSaga(world, operation),
    )


class StopSaga(ContainerSaga):
    """One step; there is no undo, since starting again what a user wanted stopped helps nobody."""

    cancellable = False

    def __init__(self, world: World, operation: Operation) -> None:
        """Builds the script from the operation's arguments."""
        super().__init__(world)
        self._arguments = StopArguments.model_validate(operation.arguments)

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        return (Step("stop", self._stop),)

    async def _stop(self, _run: Run) -> None:
        arguments = self._arguments
        await self._world.stop(arguments.engine_id, arguments.spec, arguments.timeout, frozen=arguments.frozen)

    @override
    async def commit(self, run: Run, view: ContainerView) -> Outcome:
        arguments = self._arguments
        container = view.container.changed(generation=view.container.generation + 1, update_time=now())
        seen = await self._world.engine.inspect(arguments.engine_id)
        # Where its last start failed it would else be started again, as its restart policy says.
        if arguments.lives or (seen is not None and not seen.running and seen.error):
            container = container.with_status(state=ContainerState.STOPPED)
        container = container.changed(status=observed(container, seen))
        if arguments.reason and seen is not None and not seen.running:
            container = container.with_status(message=arguments.reason)
        if arguments.keep_resources:
            return Outcome([PutContainer(container, expect=view.version)], container)
        container = container.with_status(placement=Placement(), holds_resources=False)
        changes: list[Change] = [
            PutContainer(container, expect=view.version),
            *(Release(self._world.host, key, container.uid) for key in keys_of(arguments.placement)),
        ]
        return Outcome(changes, container)

    @override
    async def abandon(self, run: Run, view: ContainerView) -> Sequence[Change]:
        seen = await self._world.engine.inspect(self._arguments.engine_id)
        container = view.container.changed(status=observed(view.container, seen), update_time=now())
        return [PutContainer(container, expect=view.version)]
