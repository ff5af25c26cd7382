"""What a change of a container takes: whether its engine container can serve what is wanted, and what it costs.

Start, restart, scale, update and rollback each say what they want (`DesiredState`); one draft is made of it here, and
one saga (`change_saga`) does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gpudock_server.core.containers.change_arguments import ChangeArguments, SuccessorFiles, SuccessorSource
from gpudock_server.core.containers.change_saga import ChangeSaga, ContainerChanges
from gpudock_server.core.containers.history import prunable_revisions
from gpudock_server.core.containers.limits import check_limits
from gpudock_server.core.containers.snapshots import SnapshotArguments
from gpudock_server.core.listings import mounts_volume
from gpudock_server.core.operations.saga import OperationDraft
from gpudock_server.core.placement.allocator import AllocationRequest, Allocator
from gpudock_server.core.volumes.engine_volumes import require_same_engine_volumes
from gpudock_server.errors import ContainerNotRunning, RestartRequired
from gpudock_server.model.claims import ClaimKey
from gpudock_server.model.container import (
    ACTIVE_STATES,
    Container,
    ContainerState,
    EngineBinding,
    Placement,
    RevisionCause,
)
from gpudock_server.model.engine import NodeLimits, RegistryAuth
from gpudock_server.model.operation import LayerTransferMethod, OperationKind, OperationPlan
from gpudock_server.model.spec import ContainerSpec, SnapshotPolicy
from gpudock_server.model.store_changes import PutContainer, RequireVolumeVersion
from gpudock_server.ports import ContainerView, LayerTransferPlan, VolumeView

_CAUSES = {
    OperationKind.RESTART: RevisionCause.RESTARTED,
    OperationKind.UPDATE: RevisionCause.UPDATED,
    OperationKind.ROLLBACK: RevisionCause.ROLLED_BACK,
}
# What only starts a process, and does not replace one that ran: how it ends is for the caller to judge.
_MAY_END = (OperationKind.START, OperationKind.RESTART)
_LIMITS = ("cpus", "memory_bytes", "pids_limit", "restart_policy")


@dataclass(frozen=True, slots=True)
class DesiredState:
    """How a container is to be afterwards.

    `recreate`: by a new engine container in any case. `live`: by the same process, or not at all. `chooses_gpus`: the
    caller named the GPUs, so that a card that is no longer healthy is exchanged although the request is the same.
    """

    kind: OperationKind
    spec: ContainerSpec
    runs: bool
    restart: bool = False
    recreate: bool = False
    live: bool = False
    chooses_gpus: bool = False
    stop_timeout: float | None = None
    must_live: bool = False
    snapshots: SnapshotPolicy | None = None
    source: SuccessorSource = field(default_factory=SuccessorSource)
    registry_auth: RegistryAuth | None = None


@dataclass(frozen=True, slots=True)
class ChangePlanner:
    """Decides what a change takes, once for all kinds of changes."""

    changes: ContainerChanges
    allocator: Allocator
    limits: NodeLimits

    async def draft(self, view: ContainerView, desired: DesiredState) -> OperationDraft:
        """What it takes to bring a container there. Raises if the change is not possible; nothing is done here."""
        container = view.container
        engine, status = container.engine, container.status
        if engine is None:
            raise ContainerNotRunning(container=container.name, state=status.state.value)
        check_limits(self.limits, desired.spec, had=container.spec)
        placement, to_claim = await self._placement(container, engine, desired)
        lives = status.state in ACTIVE_STATES
        starts = desired.runs and (desired.restart or not lives)
        replace = not _keeps_process(container, engine, desired) and _needs_successor(engine, desired, placement)
        if replace and desired.live:
            raise RestartRequired(container=container.name, changes=("gpus",))
        # The engine would resolve the host paths of one that an older version made at this start and all others.
        replace = replace or (starts and await self.changes.engine_containers.has_unbound_host_paths(container))
        carry = LayerTransferPlan(method=LayerTransferMethod.NONE)
        joining: tuple[VolumeView, ...] = ()
        if replace:
            volumes = await self.changes.mounts.check(desired.spec.mounts, had=container.spec.mounts)
            await self._require_same_volumes(container, engine, desired.spec, volumes)
            joining = tuple(one for one in volumes if not mounts_volume(view, one.volume.name))
            if desired.source.files in (SuccessorFiles.CARRY, SuccessorFiles.GRAFT):
                carry = await self._plan_layer_transfer(container, engine, desired.source.files)
        elif starts:
            # Before anything is stopped.
            await self.changes.mounts.check_before_start(desired.spec.mounts)
        cause = _CAUSES.get(desired.kind, RevisionCause.SCALED) if desired.spec != container.spec or replace else None
        keep, prunes = SnapshotArguments(), False
        if cause is not None:
            known = await self.changes.history.revisions(container.uid)
            commits = carry.method is LayerTransferMethod.COMMIT
            keep = await self.changes.snapshots.plan(container, desired.snapshots, known, commits=commits)
            # There will be one more.
            limits = self.changes.history.limits(desired.spec)
            prunes = len(known) >= limits.keep_revisions or bool(prunable_revisions(known, limits))
        arguments = ChangeArguments(
            old=engine,
            # Of the old spec only what stops it and its limits are needed; what may be large is not written again.
            old_spec=container.spec.changed(labels={}, env={}),
            old_placement=status.placement,
            spec=desired.spec,
            placement=placement,
            revision=container.revision + (cause is not None),
            was_running=lives,
            frozen=status.state is ContainerState.PAUSED,
            stop=lives and (replace or desired.restart),
            start=starts or (desired.runs and replace),
            replace=replace,
            limits=_changes(container.spec, desired.spec, _LIMITS),
            carry=carry.method,
            source=desired.source,
            keep=keep,
            prunes=prunes,
            stop_timeout=desired.stop_timeout,
            must_live=desired.must_live,
            may_end=desired.kind in _MAY_END,
            verify=self.changes.engine_containers.watches_starts,
            cause=cause,
            owner=container.owner,
            authenticated=desired.registry_auth is not None,
        )
        return OperationDraft(
            kind=desired.kind,
            target=container.target,
            target_record=PutContainer(container, expect=view.version),
            arguments=arguments.model_dump(mode="json"),
            plan=_plan(arguments, carry, container),
            claims=self.changes.claims.claim(container, to_claim),
            # What it mounts already stays while its head says so. What it is about to mount is not to be seen from its
            # head before the commit, so nobody may delete that meanwhile.
            locks=[one.volume.target for one in joining],
            conditions=[RequireVolumeVersion(one.volume.name, one.version) for one in joining],
            build=lambda operation: ChangeSaga(self.changes, operation, desired.registry_auth),
        )

    async def _require_same_volumes(
        self, container: Container, engine: EngineBinding, spec: ContainerSpec, volumes: Sequence[VolumeView]
    ) -> None:
        """Raises VolumeDiffers where a successor would see other files in a volume than its predecessor does."""
        if any(mount.volume for mount in container.spec.mounts):
            seen = await self.changes.engine.inspect(engine.engine_id)
            if seen is not None:
                mounts = container.spec.mounts
                require_same_engine_volumes(container.name, seen, mounts, spec.mounts, [one.volume for one in volumes])

    async def _placement(
        self, container: Container, engine: EngineBinding, desired: DesiredState
    ) -> tuple[Placement, tuple[ClaimKey, ...]]:
        """What it holds afterwards, and what of that is to be claimed. What does not run keeps what it holds."""
        if not desired.runs or _keeps_process(container, engine, desired):
            return container.status.placement, ()
        request = AllocationRequest(
            uid=container.uid,
            gpus=desired.spec.gpus,
            ports=desired.spec.ports,
            current=container.status.placement,
            previous=engine.placement,
        )
        allocation = await self.allocator.allocate(request)
        return allocation.placement, allocation.to_claim

    async def _plan_layer_transfer(
        self, container: Container, engine: EngineBinding, files: SuccessorFiles
    ) -> LayerTransferPlan:
        seen = await self.changes.engine.inspect(engine.engine_id)
        if seen is None:
            raise ContainerNotRunning(container=container.name, state=ContainerState.FAILED.value)
        # On another image only what the engine has committed can be laid.
        return await (
            self.changes.layers.commit_plan(seen) if files is SuccessorFiles.GRAFT else self.changes.layers.plan(seen)
        )


def _keeps_process(container: Container, engine: EngineBinding, desired: DesiredState) -> bool:
    """Whether the container runs and nothing in the request needs another process.

    It then keeps its cards, whatever their health: to exchange a card is to restart the process, and that is only done
    where the request names the GPUs or restarts the process anyway.
    """
    before, after = container.spec, desired.spec
    return (
        desired.runs
        and container.status.state in ACTIVE_STATES
        and not (desired.restart or desired.recreate or desired.chooses_gpus)
        and desired.source.files is SuccessorFiles.CARRY
        and (before.gpus, before.ports) == (after.gpus, after.ports)
        and engine.fixed_digest == after.fixed_digest
    )


def _needs_successor(engine: EngineBinding, desired: DesiredState, placement: Placement) -> bool:
    if desired.recreate or desired.source.files is not SuccessorFiles.CARRY:
        return True
    if desired.runs:
        return not engine.matches(desired.spec, placement)
    # Cards and ports are given when it starts; a successor is made then, if they are other ones.
    return engine.fixed_digest != desired.spec.fixed_digest


def _changes(before: ContainerSpec, after: ContainerSpec, fields: Sequence[str]) -> bool:
    return any(getattr(before, name) != getattr(after, name) for name in fields)


def _plan(arguments: ChangeArguments, carry: LayerTransferPlan, container: Container) -> OperationPlan:
    keep, had = arguments.keep, container.status.placement
    return OperationPlan(
        placement=arguments.placement,
        kept_gpu_uuids=_common(had.gpu_uuids, arguments.placement.gpu_uuids),
        released_gpu_uuids=_without(had.gpu_uuids, arguments.placement.gpu_uuids),
        claimed_gpu_uuids=_without(arguments.placement.gpu_uuids, had.gpu_uuids),
        claimed_ports=tuple(port for port in arguments.placement.ports if port not in had.ports),
        bytes_to_move=carry.bytes_to_move + keep.bytes_to_move + arguments.source.bytes_to_move,
        bytes_available=carry.bytes_available or keep.bytes_available,
        restarts_process=arguments.stop,
        carry_method=carry.method,
        snapshot=keep.kind,
        warnings=(*carry.warnings, *keep.warnings, *arguments.source.warnings),
        old_spec=container.spec,
        new_spec=arguments.spec,
    )


def _common(before: Sequence[str], after: Sequence[str]) -> tuple[str, ...]:
    return tuple(uuid for uuid in after if uuid in before)


def _without(these: Sequence[str], those: Sequence[str]) -> tuple[str, ...]:
    return tuple(uuid for uuid in these if uuid not in those)
