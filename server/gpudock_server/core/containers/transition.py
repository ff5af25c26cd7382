"""Drafts of start, restart and scale: what is wanted, whether the engine container can serve it, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpudock_server.core.allocation import Wish
from gpudock_server.core.containers.change import ChangeArguments, ChangeSaga
from gpudock_server.core.containers.commands import Restart, Scale, ScaleStrategy, Start
from gpudock_server.core.containers.create import check_mounts
from gpudock_server.core.containers.world import World
from gpudock_server.core.operations import Draft
from gpudock_server.errors import (
    ContainerNotRunning,
    ContainerPaused,
    ContainerRunning,
    RestartRequired,
)
from gpudock_server.model.changes import Claim, PutContainer
from gpudock_server.model.claims import ClaimKey
from gpudock_server.model.container import Container, ContainerState, EngineBinding, Placement, RevisionCause
from gpudock_server.model.operation import CarryMethod, Operation, OperationKind, OperationPlan
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.ports import CarryPlan, ContainerView

_LIVES = (ContainerState.RUNNING, ContainerState.PAUSED)
_DOES_NOT_RUN = (ContainerState.STOPPED, ContainerState.EXITED)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """How a container is to be afterwards."""

    kind: OperationKind
    spec: ContainerSpec
    runs: bool
    restart: bool = False
    recreate: bool = False
    limits: bool = False
    stop_timeout: float | None = None
    must_live: bool = False


async def draft_start(world: World, command: Start) -> Draft:
    """Start what does not run, with what it held, or had, or is asked for now."""
    view = await world.lookup(command.name, command.etag)
    container = view.container
    spec = container.spec if command.gpus is None else container.spec.changed(gpus=command.gpus)
    match container.status.state:
        case ContainerState.PAUSED:
            raise ContainerPaused(container=command.name)
        case ContainerState.RUNNING:
            if spec.gpus != container.spec.gpus:
                raise ContainerRunning(container=command.name, state=container.status.state.value)
        case state if state not in _DOES_NOT_RUN:
            raise ContainerNotRunning(container=command.name, state=state.value)
    return await _draft(world, view, _Wanted(OperationKind.START, spec, runs=True))


async def draft_restart(world: World, command: Restart) -> Draft:
    """Stop what runs, and start it."""
    view = await world.lookup(command.name, command.etag)
    state = view.container.status.state
    if state not in (*_LIVES, *_DOES_NOT_RUN):
        raise ContainerNotRunning(container=command.name, state=state.value)
    wanted = _Wanted(OperationKind.RESTART, view.container.spec, runs=True, restart=True, stop_timeout=command.timeout)
    return await _draft(world, view, wanted)


async def draft_scale(world: World, command: Scale) -> Draft:
    """Other cards, limits or /dev/shm."""
    view = await world.lookup(command.name, command.etag)
    container = view.container
    spec = _scaled(container.spec, command)
    state = container.status.state
    if state is ContainerState.PAUSED:
        raise ContainerPaused(container=command.name)
    fixed = tuple(
        field for field in ("gpus", "shm_size_bytes") if getattr(spec, field) != getattr(container.spec, field)
    )
    recreate = command.strategy is ScaleStrategy.RECREATE
    if state is not ContainerState.RUNNING and (fixed or recreate or state not in _DOES_NOT_RUN):
        raise ContainerNotRunning(container=command.name, state=state.value)
    if command.strategy is ScaleStrategy.LIVE and fixed:
        raise RestartRequired(container=command.name, changes=fixed)
    wanted = _Wanted(
        OperationKind.SCALE,
        spec,
        runs=state is ContainerState.RUNNING,
        recreate=recreate,
        limits=(spec.cpus, spec.memory_bytes) != (container.spec.cpus, container.spec.memory_bytes),
        must_live=True,
    )
    return await _draft(world, view, wanted)


def _scaled(spec: ContainerSpec, command: Scale) -> ContainerSpec:
    asked = {
        "gpus": command.gpus,
        "cpus": command.cpus,
        "memory_bytes": command.memory_bytes,
        "shm_size_bytes": command.shm_size_bytes,
    }
    return spec.changed(**{field: value for field, value in asked.items() if value is not None})


async def _draft(world: World, view: ContainerView, wanted: _Wanted) -> Draft:
    container = view.container
    engine, status = container.engine, container.status
    if engine is None:
        raise ContainerNotRunning(container=container.name, state=status.state.value)
    lives = status.state in _LIVES
    placement: Placement = status.placement
    to_claim: tuple[ClaimKey, ...] = ()
    if wanted.runs:
        wish = Wish(
            uid=container.uid,
            gpus=wanted.spec.gpus,
            ports=wanted.spec.ports,
            held=status.placement,
            had=engine.placement,
        )
        proposal = await world.allocator.propose(wish)
        placement, to_claim = proposal.placement, proposal.to_claim
    replace = wanted.recreate or (wanted.runs and not engine.fits(wanted.spec, placement))
    carry = CarryPlan(method=CarryMethod.NONE)
    if replace:
        await check_mounts(world, wanted.spec.mounts)
        carry = await _plan_carry(world, container, engine)
    changed = wanted.spec != container.spec or replace
    cause = _cause(wanted.kind) if changed else None
    arguments = ChangeArguments(
        old=engine,
        old_spec=container.spec,
        old_placement=status.placement,
        spec=wanted.spec,
        placement=placement,
        revision=container.revision + (cause is not None),
        was_running=lives,
        frozen=status.state is ContainerState.PAUSED,
        stop=lives and (replace or wanted.restart),
        start=wanted.runs and (replace or wanted.restart or not lives),
        replace=replace,
        limits=wanted.limits,
        carry=carry.method,
        stop_timeout=wanted.stop_timeout,
        must_live=wanted.must_live,
        cause=cause,
    )
    return Draft(
        kind=wanted.kind,
        target=container.target,
        head=PutContainer(container, expect=view.version),
        arguments=arguments.model_dump(mode="json"),
        plan=_plan(arguments, carry, status.placement),
        claims=[Claim(world.host, key, world.holder(container)) for key in to_claim],
        build=_builder(world),
    )


def _builder(world: World) -> Callable[[Operation], ChangeSaga]:
    return lambda operation: ChangeSaga(world, operation)


async def _plan_carry(world: World, container: Container, engine: EngineBinding) -> CarryPlan:
    seen = await world.engine.inspect(engine.engine_id)
    if seen is None:
        raise ContainerNotRunning(container=container.name, state=ContainerState.FAILED.value)
    return await world.layers.plan(seen)


def _cause(kind: OperationKind) -> RevisionCause:
    return RevisionCause.RESTARTED if kind is OperationKind.RESTART else RevisionCause.SCALED


def _plan(arguments: ChangeArguments, carry: CarryPlan, had: Placement) -> OperationPlan:
    return OperationPlan(
        placement=arguments.placement,
        kept_gpu_uuids=_both(had.gpu_uuids, arguments.placement.gpu_uuids),
        released_gpu_uuids=_without(had.gpu_uuids, arguments.placement.gpu_uuids),
        claimed_gpu_uuids=_without(arguments.placement.gpu_uuids, had.gpu_uuids),
        claimed_ports=tuple(port for port in arguments.placement.ports if port not in had.ports),
        bytes_to_move=carry.bytes_to_move,
        bytes_available=carry.bytes_available,
        restarts_process=arguments.stop,
        carry_method=carry.method,
        warnings=carry.warnings,
    )


def _both(before: Sequence[str], after: Sequence[str]) -> tuple[str, ...]:
    return tuple(uuid for uuid in after if uuid in before)


def _without(these: Sequence[str], those: Sequence[str]) -> tuple[str, ...]:
    return tuple(uuid for uuid in these if uuid not in those)
