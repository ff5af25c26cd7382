"""DeleteVolume: what the engine has, what the host has, and the record last.

With force, containers that mount it and do not run are first given specs without it:

    detach -> check -> remove the engine's volume -> remove the store | the record

The engine keeps a volume that any container refers to, and an engine container never forgets one: so each is given a
successor, by an update like a user's, with a revision that says so. These stay when the deletion fails.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from typing_extensions import override

from gpudock_server.core.listings import containers_mounting
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Step
from gpudock_server.core.volumes.backends import VolumeBackends
from gpudock_server.core.volumes.commands import Delete
from gpudock_server.core.volumes.resource import VolumeResource
from gpudock_server.core.volumes.saga import VolumeSaga
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
    """What the saga needs to be built again."""

    backing: VolumeBacking | None
    detach: tuple[ResourceRef, ...] = ()


# Drafts an update of a container (the reference) that does not run, to a spec without a volume (the name).
# Raises VolumeMountedByRunning where the container runs.
DraftUnmount: TypeAlias = Callable[[ResourceRef, str], Awaitable[OperationDraft]]


@dataclass(frozen=True, slots=True)
class DeleteVolume:
    """Checks that nothing mounts a volume, or plans how what mounts it forgets it."""

    store: Store
    engine: Engine
    volumes: VolumeResource
    backends: VolumeBackends
    draft_unmount: DraftUnmount

    async def draft(self, command: Delete) -> OperationDraft:
        """One that nothing mounts can be deleted; what is left of one that was half deleted, too."""
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
        """Neither a container of ours, running or not, has it, nor one that somebody made in the engine."""
        if ours := [view.container.name for view in await containers_mounting(self.store, name)]:
            raise VolumeMounted(volume=name, holders=tuple(ours))
        if backing is not None and (theirs := await self.engine.mounting(backing.engine_volume)):
            raise VolumeInUse(volume=name, holders=tuple(one.name for one in theirs))

    async def _plan_detach(self, name: str, arguments: DeleteArguments) -> tuple[DeleteArguments, OperationPlan]:
        """Who is to forget it, and what that takes. Raises VolumeInUse where somebody has it who cannot."""
        views = await containers_mounting(self.store, name)
        if others := [view.container.name for view in views if view.container.status.state not in STOPPED_STATES]:
            raise VolumeMountedByRunning(volume=name, holders=tuple(others))
        ours = {view.container.engine.engine_id for view in views if view.container.engine}
        mounting = await self.engine.mounting(arguments.backing.engine_volume) if arguments.backing else ()
        if strangers := [one.name for one in mounting if one.id not in ours]:
            raise VolumeInUse(volume=name, holders=tuple(strangers))
        plans = [(await self.draft_unmount(view.container.target, name)).plan for view in views]
        warnings = [
            f"container {view.container.name} gets a revision without the mount of volume {name}" for view in views
        ]
        plan = OperationPlan(
            bytes_to_move=sum(one.bytes_to_move for one in plans),
            bytes_available=max((one.bytes_available for one in plans), default=0),
            warnings=(*warnings, *(warning for one in plans for warning in one.warnings)),
        )
        return arguments.model_copy(update={"detach": tuple(view.container.target for view in views)}), plan


class DeleteSaga(VolumeSaga):
    """Removal cannot be undone; what fails leaves the record, so that the same call finishes the work."""

    cancellable = False

    def __init__(self, delete: DeleteVolume, operation: Operation) -> None:
        """Builds the script from the operation's arguments."""
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
            # Also of one that no longer mounts it: to remove the old engine container may be left of its update.
            if view is not None and view.container.target == target:
                await run.run_child(target.name, partial(self._delete.draft_unmount, target, volume))

    async def _check(self, run: OperationRun) -> None:
        # Whoever wants to mount it from now on meets our lock; whoever came before is seen.
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
        whole = await self._has_all_files(run.operation)
        state = VolumeState.READY if whole else VolumeState.DELETING
        return [PutVolume(view.volume.changed(state=state), expect=view.version)]

    async def _has_all_files(self, operation: Operation) -> bool:
        if self._backing is None:
            return False
        begun = {stage.name for stage in operation.stages if stage.state is not StageState.PENDING}
        kept = await self._delete.engine.inspect_volume(self._backing.engine_volume)
        return _DESTROY_STAGE not in begun and kept is not None
