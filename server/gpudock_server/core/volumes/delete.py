"""DeleteVolume: remove the engine volume, then the backing on the host, and last the record.

With force, stopped containers that mount the volume first get specs without it:

    detach -> check -> remove the engine volume -> remove the backing | the record

The engine does not delete a volume that a container mounts, and an engine container cannot lose a mount. Each container
therefore gets a new engine container, by the same update that a user can make, with a revision of its own. These
updates stay if the deletion fails.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from typing_extensions import override

from gpudock_server.core.listings import containers_mounting
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Saga, Step
from gpudock_server.core.volumes.backends import VolumeBackends
from gpudock_server.core.volumes.commands import Delete
from gpudock_server.core.volumes.resource import VolumeResource
from gpudock_server.errors import VolumeInUse, VolumeMounted, VolumeMountedByRunning
from gpudock_server.model import store_changes
from gpudock_server.model.container import STOPPED_STATES
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan, StageState
from gpudock_server.model.record import Record
from gpudock_server.model.resource import ResourceRef
from gpudock_server.model.store_changes import PutVolume, StoreChange
from gpudock_server.model.volume import VolumeBacking, VolumeState
from gpudock_server.ports import Engine, Store, VolumeView

_DESTROY_STAGE = "destroy"


class DeleteArguments(Record):
    """The arguments from which the saga is rebuilt."""

    backing: VolumeBacking | None
    detach: tuple[ResourceRef, ...] = ()


# Drafts the update of a stopped container (the reference) to a spec without a volume (the name).
# Raises VolumeMountedByRunning if the container is not stopped.
DraftUnmount: TypeAlias = Callable[[ResourceRef, str], Awaitable[OperationDraft]]


@dataclass(frozen=True, slots=True)
class DeleteVolume:
    """Drafts the deletion of a volume, which nothing mounts or which can be detached."""

    store: Store
    engine: Engine
    volumes: VolumeResource
    backends: VolumeBackends
    draft_unmount: DraftUnmount

    async def draft(self, command: Delete) -> OperationDraft:
        """Check that nothing mounts the volume; with force, plan to detach it. Its deletion may have begun before.

        Raises VolumeMounted, VolumeMountedByRunning, VolumeInUse.
        """
        view = await self.volumes.find(command.name, command.etag)
        volume = view.volume
        arguments, plan = DeleteArguments(backing=volume.backing), OperationPlan()
        if command.force:
            arguments, plan = await self._plan_detach(volume.name, arguments)
        else:
            await self.require_unused(volume.name, volume.backing)
        return OperationDraft(
            kind=OperationKind.DELETE_VOLUME,
            target=volume.target,
            target_record=PutVolume(volume.changed(state=VolumeState.DELETING), expect=view.version),
            arguments=arguments.model_dump(mode="json"),
            plan=plan,
            build=partial(DeleteSaga, self),
        )

    async def require_unused(self, name: str, backing: VolumeBacking | None) -> None:
        """Raise VolumeMounted or VolumeInUse if any container mounts it, gpudock's or other, running or not."""
        if containers := [view.container.name for view in await containers_mounting(self.store, name)]:
            raise VolumeMounted(volume=name, holders=tuple(containers))
        if backing is not None and (mounting := await self.engine.mounting(backing.engine_volume)):
            raise VolumeInUse(volume=name, holders=tuple(engine_container.name for engine_container in mounting))

    async def _plan_detach(self, name: str, arguments: DeleteArguments) -> tuple[DeleteArguments, OperationPlan]:
        """The containers to detach, and the plan of their updates. Raises VolumeMountedByRunning, VolumeInUse."""
        views = await containers_mounting(self.store, name)
        if running := [view.container.name for view in views if view.container.status.state not in STOPPED_STATES]:
            raise VolumeMountedByRunning(volume=name, holders=tuple(running))
        known = {view.container.engine.engine_id for view in views if view.container.engine}
        mounting = await self.engine.mounting(arguments.backing.engine_volume) if arguments.backing else ()
        if unknown := [engine_container.name for engine_container in mounting if engine_container.id not in known]:
            raise VolumeInUse(volume=name, holders=tuple(unknown))
        plans = [(await self.draft_unmount(view.container.target, name)).plan for view in views]
        warnings = [f"container {view.container.name}: new revision without volume {name}" for view in views]
        plan = OperationPlan(
            bytes_to_move=sum(plan.bytes_to_move for plan in plans),
            bytes_available=max((plan.bytes_available for plan in plans), default=0),
            warnings=(*warnings, *(warning for plan in plans for warning in plan.warnings)),
        )
        return arguments.model_copy(update={"detach": tuple(view.container.target for view in views)}), plan


class DeleteSaga(Saga[VolumeView]):
    """Removal cannot be undone. A failure keeps the record, so that the same call can finish the deletion."""

    cancellable = False

    def __init__(self, delete: DeleteVolume, operation: Operation) -> None:
        """Read the arguments from the operation's record."""
        super().__init__(delete.volumes)
        self._delete = delete
        self._arguments = DeleteArguments.model_validate(operation.arguments)
        self._backing = self._arguments.backing

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        detach = [Step("detach", self._detach)] if self._arguments.detach else []
        return (
            *detach,
            Step("check", self._check),
            Step("engine-volume", self._remove_engine_volume),
            Step(_DESTROY_STAGE, self._destroy),
        )

    async def _detach(self, run: OperationRun) -> None:
        volume = run.operation.target.name
        for target in self._arguments.detach:
            view = await self._delete.store.container(target.name)
            # Also for a container that no longer mounts it: its update may still have to remove the old engine
            # container.
            if view is not None and view.container.target == target:
                await run.run_child(target.name, partial(self._delete.draft_unmount, target, volume))

    async def _check(self, run: OperationRun) -> None:
        # Since this operation holds the volume's lock, nothing can mount it after this check.
        await self._delete.require_unused(run.operation.target.name, self._backing)

    async def _remove_engine_volume(self, _run: OperationRun) -> None:
        if self._backing is not None:
            await self._delete.engine.remove_volume(self._backing.engine_volume)

    async def _destroy(self, _run: OperationRun) -> None:
        if self._backing is not None:
            await self._delete.backends.of_kind(self._backing.kind).destroy(self._backing)

    @override
    async def success_changes(self, run: OperationRun, view: VolumeView) -> Outcome:
        volume = view.volume
        return Outcome([store_changes.DeleteVolume(volume.name, volume.uid, expect=view.version)], volume)

    @override
    async def failure_changes(self, run: OperationRun, view: VolumeView) -> Sequence[StoreChange]:
        complete = await self._has_all_files(run.operation)
        state = VolumeState.READY if complete else VolumeState.DELETING
        return [PutVolume(view.volume.changed(state=state), expect=view.version)]

    async def _has_all_files(self, operation: Operation) -> bool:
        if self._backing is None:
            return False
        begun = {stage.name for stage in operation.stages if stage.state is not StageState.PENDING}
        engine_volume = await self._delete.engine.inspect_volume(self._backing.engine_volume)
        return _DESTROY_STAGE not in begun and engine_volume is not None
