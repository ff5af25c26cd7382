"""Plans a change of a container: in place or with a new engine container, what is claimed, and what it costs.

Start, restart, scale, update and rollback each give a `DesiredState`. This module makes the draft for all of them, and
one saga (`change_saga`) carries it out.
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
# These only start a process and replace no running one: its exit does not fail the operation.
_MAY_END = (OperationKind.START, OperationKind.RESTART)
_LIMITS = ("cpus", "memory_bytes", "pids_limit", "restart_policy")


@dataclass(frozen=True, slots=True)
class DesiredState:
    """The state of a container after the change.

    `recreate`: always use a new engine container. `live`: keep the process, or fail. `chooses_gpus`: the request names
    the GPUs, so an unhealthy GPU is replaced even if the request is the same as before.
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
    """Plans all kinds of changes of a container."""

    changes: ContainerChanges
    allocator: Allocator
    limits: NodeLimits

    async def draft(self, view: ContainerView, desired: DesiredState) -> OperationDraft:
        """Draft the operation that brings a container to the desired state. Raises if the change is not possible."""
        container = view.container
        engine, status = container.engine, container.status
        if engine is None:
            raise ContainerNotRunning(container=container.name, state=status.state.value)
        check_limits(self.limits, desired.spec, previous=container.spec)
        placement, to_claim = await self._placement(container, engine, desired)
        active = status.state in ACTIVE_STATES
        starts = desired.runs and (desired.restart or not active)
        replace = not _keeps_process(container, engine, desired) and _needs_successor(engine, desired, placement)
        if replace and desired.live:
            raise RestartRequired(container=container.name, changes=("gpus",))
        # The engine resolves the host paths of an engine container of an older version itself, at every start.
        replace = replace or (starts and await self.changes.engine_containers.has_unbound_host_paths(container))
        carry = LayerTransferPlan(method=LayerTransferMethod.NONE)
        added: tuple[VolumeView, ...] = ()
        if replace:
            volumes = await self.changes.mounts.check(desired.spec.mounts, previous=container.spec.mounts)
            await self._require_same_volumes(container, engine, desired.spec, volumes)
            added = tuple(volume_view for volume_view in volumes if not mounts_volume(view, volume_view.volume.name))
            if desired.source.files in (SuccessorFiles.CARRY, SuccessorFiles.GRAFT):
                carry = await self._plan_layer_transfer(container, engine, desired.source.files)
        elif starts:
            # Checked here so that a failure comes before anything is stopped.
            await self.changes.mounts.check_before_start(desired.spec.mounts)
        cause = _CAUSES.get(desired.kind, RevisionCause.SCALED) if desired.spec != container.spec or replace else None
        keep, prunes = SnapshotArguments(), False
        if cause is not None:
            revisions = await self.changes.history.revisions(container.uid)
            commits = carry.method is LayerTransferMethod.COMMIT
            keep = await self.changes.snapshots.plan(container, desired.snapshots, revisions, commits=commits)
            # `>=` because the change adds one revision.
            limits = self.changes.history.limits(desired.spec)
            prunes = len(revisions) >= limits.keep_revisions or bool(prunable_revisions(revisions, limits))
        arguments = ChangeArguments(
            old=engine,
            # The saga needs only the stop settings and limits of the old spec; fields that can be large are left out.
            old_spec=container.spec.changed(labels={}, env={}),
            old_placement=status.placement,
            spec=desired.spec,
            placement=placement,
            revision=container.revision + (cause is not None),
            was_running=active,
            frozen=status.state is ContainerState.PAUSED,
            stop=active and (replace or desired.restart),
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
            # The record protects the volumes that the container mounts already. Added volumes are not in the record
            # before the commit, so they are locked until then against deletion.
            locks=[volume_view.volume.target for volume_view in added],
            conditions=[RequireVolumeVersion(volume_view.volume.name, volume_view.version) for volume_view in added],
            build=lambda operation: ChangeSaga(self.changes, operation, desired.registry_auth),
        )

    async def _require_same_volumes(
        self, container: Container, engine: EngineBinding, spec: ContainerSpec, volumes: Sequence[VolumeView]
    ) -> None:
        """Raise VolumeDiffers if a successor would mount another engine volume for the same volume."""
        if any(mount.volume for mount in container.spec.mounts):
            engine_container = await self.changes.engine.inspect(engine.engine_id)
            if engine_container is not None:
                mounts = container.spec.mounts
                require_same_engine_volumes(
                    container.name,
                    engine_container,
                    mounts,
                    spec.mounts,
                    [volume_view.volume for volume_view in volumes],
                )

    async def _placement(
        self, container: Container, engine: EngineBinding, desired: DesiredState
    ) -> tuple[Placement, tuple[ClaimKey, ...]]:
        """The placement after the change, and its new claims. A container that will not run keeps its placement."""
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
        engine_container = await self.changes.engine.inspect(engine.engine_id)
        if engine_container is None:
            raise ContainerNotRunning(container=container.name, state=ContainerState.FAILED.value)
        # Files can be put on another image only as a layer that the engine committed.
        return await (
            self.changes.layers.commit_plan(engine_container)
            if files is SuccessorFiles.GRAFT
            else self.changes.layers.plan(engine_container)
        )


def _keeps_process(container: Container, engine: EngineBinding, desired: DesiredState) -> bool:
    """Whether the container runs and nothing in the request needs a new process.

    The container then keeps its GPUs, even unhealthy ones: replacing a GPU restarts the process, which is only done if
    the request names the GPUs or restarts the process anyway.
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
    # A stopped container gets its GPUs and ports at its next start, which creates a successor if they differ.
    return engine.fixed_digest != desired.spec.fixed_digest


def _changes(before: ContainerSpec, after: ContainerSpec, fields: Sequence[str]) -> bool:
    return any(getattr(before, name) != getattr(after, name) for name in fields)


def _plan(arguments: ChangeArguments, carry: LayerTransferPlan, container: Container) -> OperationPlan:
    keep, before = arguments.keep, container.status.placement
    return OperationPlan(
        placement=arguments.placement,
        kept_gpu_uuids=_common(before.gpu_uuids, arguments.placement.gpu_uuids),
        released_gpu_uuids=_without(before.gpu_uuids, arguments.placement.gpu_uuids),
        claimed_gpu_uuids=_without(arguments.placement.gpu_uuids, before.gpu_uuids),
        claimed_ports=tuple(port for port in arguments.placement.ports if port not in before.ports),
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


def _without(uuids: Sequence[str], excluded: Sequence[str]) -> tuple[str, ...]:
    return tuple(uuid for uuid in uuids if uuid not in excluded)
