"""Drafts a change of a container: looks up what its ChangePlan needs, and checks that the change is possible."""

from __future__ import annotations

from dataclasses import dataclass

from gpudock_server.core.containers.change_plan import (
    AllowedExits,
    ChangeMethod,
    ChangePlan,
    DesiredState,
    SuccessorFiles,
    choose_method,
)
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
from gpudock_server.model.container import Container, ContainerState, EngineBinding, Placement, RevisionCause
from gpudock_server.model.engine import NodeLimits
from gpudock_server.model.operation import LayerTransferMethod, OperationKind
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.model.store_changes import PutContainer, RequireVolumeVersion
from gpudock_server.ports import ContainerView, LayerTransferPlan, VolumeView

_CAUSES = {
    OperationKind.RESTART: RevisionCause.RESTARTED,
    OperationKind.UPDATE: RevisionCause.UPDATED,
    OperationKind.ROLLBACK: RevisionCause.ROLLED_BACK,
}
# The first two replace no running process, only start one.
_ALLOWED_EXITS = {
    OperationKind.START: AllowedExits.ANY,
    OperationKind.RESTART: AllowedExits.ANY,
    OperationKind.SCALE: AllowedExits.NONE,
}
_NO_TRANSFER = LayerTransferPlan(method=LayerTransferMethod.NONE)


@dataclass(frozen=True, slots=True)
class ChangeDrafter:
    """Drafts all kinds of changes of a container."""

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
        engine_containers, starts = self.changes.engine_containers, desired.starts(container)
        unbound = starts and await engine_containers.has_unbound_host_paths(container)
        method = choose_method(container, engine, desired, placement, unbound_host_paths=unbound)
        transfer, added = _NO_TRANSFER, tuple[VolumeView, ...]()
        if method is ChangeMethod.REPLACE:
            if desired.live:
                raise RestartRequired(container=container.name, changes=("gpus",))
            added = await self._added_volumes(view, engine, desired.spec)
            transfer = await self._plan_transfer(container, engine, desired.source.files)
        elif method is ChangeMethod.RESTART:
            # Checked here so that a failure comes before anything is stopped.
            await self.changes.mounts.check_before_start(desired.spec.mounts)
        cause: RevisionCause | None = None
        keep, prunes = SnapshotArguments(), False
        if desired.spec != container.spec or method is ChangeMethod.REPLACE:
            cause = _CAUSES.get(desired.kind, RevisionCause.SCALED)
            revisions = await self.changes.history.revisions(container.uid)
            commits = transfer.method is LayerTransferMethod.COMMIT
            keep = await self.changes.snapshots.plan(container, desired.snapshots, revisions, commits=commits)
            # `>=` because the change adds one revision.
            limits = self.changes.history.limits(desired.spec)
            prunes = len(revisions) >= limits.keep_revisions or bool(prunable_revisions(revisions, limits))
        watched = method is ChangeMethod.REPLACE or (
            method is ChangeMethod.RESTART and engine_containers.watches_starts
        )
        plan = ChangePlan(
            method=method,
            old=engine,
            old_state=status.state,
            old_spec=container.spec,
            old_placement=status.placement,
            spec=desired.spec,
            placement=placement,
            revision=container.revision + (cause is not None),
            cause=cause,
            runs=desired.runs,
            allowed_exits=_ALLOWED_EXITS.get(desired.kind, AllowedExits.ZERO) if desired.runs and watched else None,
            source=desired.source,
            transfer=transfer,
            keep=keep,
            prunes=prunes,
            stop_timeout=desired.stop_timeout,
            owner=container.owner,
            authenticated=desired.registry_auth is not None,
        )
        return OperationDraft(
            kind=desired.kind,
            target=container.target,
            target_record=PutContainer(container, expect=view.version),
            arguments=plan.recorded,
            plan=plan.shown,
            claims=self.changes.claims.claim(container, to_claim),
            # The record protects the volumes that the container mounts already. Added volumes are not in the record
            # before the commit, so they are locked until then against deletion.
            locks=[volume_view.volume.target for volume_view in added],
            conditions=[RequireVolumeVersion(volume_view.volume.name, volume_view.version) for volume_view in added],
            build=lambda operation: ChangeSaga(self.changes, operation, desired.registry_auth),
        )

    async def _added_volumes(
        self, view: ContainerView, engine: EngineBinding, spec: ContainerSpec
    ) -> tuple[VolumeView, ...]:
        """Check the volumes of a successor; returns those that the container does not mount yet.

        Raises VolumeDiffers if it would mount another engine volume for one, and the errors of Mounts.check.
        """
        container, before = view.container, view.container.spec.mounts
        volumes = await self.changes.mounts.check(spec.mounts, previous=before)
        if any(mount.volume for mount in before):
            engine_container = await self.changes.engine.inspect(engine.engine_id)
            if engine_container is not None:
                require_same_engine_volumes(
                    container.name, engine_container, before, spec.mounts, [each.volume for each in volumes]
                )
        return tuple(each for each in volumes if not mounts_volume(view, each.volume.name))

    async def _placement(
        self, container: Container, engine: EngineBinding, desired: DesiredState
    ) -> tuple[Placement, tuple[ClaimKey, ...]]:
        """The placement after the change, and its new claims. A container that will not run keeps its placement."""
        if not desired.runs or desired.keeps_process(container, engine):
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

    async def _plan_transfer(
        self, container: Container, engine: EngineBinding, files: SuccessorFiles
    ) -> LayerTransferPlan:
        """Plan how a successor gets the files of the old engine container; no transfer if it gets other files."""
        if files not in (SuccessorFiles.CARRY, SuccessorFiles.GRAFT):
            return _NO_TRANSFER
        engine_container = await self.changes.engine.inspect(engine.engine_id)
        if engine_container is None:
            raise ContainerNotRunning(container=container.name, state=ContainerState.FAILED.value)
        # Files can be put on another image only as a layer that the engine committed.
        layers = self.changes.layers
        graft = files is SuccessorFiles.GRAFT
        return await (layers.commit_plan(engine_container) if graft else layers.plan(engine_container))
