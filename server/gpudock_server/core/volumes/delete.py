"""DeleteVolume: what the engine has, what the host has, and the record last."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from gpudock_server.core.containers.mounting import attached
from gpudock_server.core.operations import Draft
from gpudock_server.core.saga import Outcome, Run, Step
from gpudock_server.core.volumes.commands import Delete
from gpudock_server.core.volumes.saga import VolumeSaga
from gpudock_server.core.volumes.storage import Storage
from gpudock_server.errors import VolumeInUse
from gpudock_server.model.changes import Change, DeleteVolume, PutVolume
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan, StageState
from gpudock_server.model.record import Record
from gpudock_server.model.volume import VolumeBacking, VolumeState
from gpudock_server.ports import VolumeView

_DESTROY_STAGE = "destroy"


class DeleteArguments(Record):
    """What the saga needs to be built again."""

    backing: VolumeBacking | None


async def draft(storage: Storage, command: Delete) -> Draft:
    """One that nothing mounts can be deleted; what is left of one that was half deleted, too."""
    view = await storage.lookup(command.name, command.etag)
    volume = view.volume
    await _must_be_free(storage, volume.name, volume.backing)
    return Draft(
        kind=OperationKind.DELETE_VOLUME,
        target=volume.target,
        head=PutVolume(volume.changed(state=VolumeState.DELETING), expect=view.version),
        arguments=DeleteArguments(backing=volume.backing).model_dump(mode="json"),
        plan=OperationPlan(),
        build=lambda operation: DeleteSaga(storage, operation),
    )


async def _must_be_free(storage: Storage, name: str, backing: VolumeBacking | None) -> None:
    """Neither a container of ours, running or not, has it, nor one that somebody made in the engine."""
    holders = [view.container.name for view in await attached(storage.world.store, name)]
    if backing is not None and not holders:
        holders = [one.name for one in await storage.world.engine.mounting(backing.engine_volume)]
    if holders:
        raise VolumeInUse(volume=name, holders=tuple(holders))


class DeleteSaga(VolumeSaga):
    """Removal cannot be undone; what fails leaves the record, so that the same call finishes the work."""

    cancellable = False

    def __init__(self, storage: Storage, operation: Operation) -> None:
        """Builds the script from the operation's arguments."""
        super().__init__(storage)
        self._backing = DeleteArguments.model_validate(operation.arguments).backing

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        return (
            Step("check", self._check),
            Step("engine-volume", self._take),
            Step(_DESTROY_STAGE, self._destroy),
        )

    async def _check(self, run: Run) -> None:
        # Whoever wants to mount it from now on meets our lock; whoever came before is seen.
        await _must_be_free(self._storage, run.operation.target.name, self._backing)

    async def _take(self, _run: Run) -> None:
        if self._backing is not None:
            await self._world.engine.remove_volume(self._backing.engine_volume)

    async def _destroy(self, _run: Run) -> None:
        if self._backing is not None:
            await self._storage.backend(self._backing.kind).destroy(self._backing)

    @override
    async def commit(self, run: Run, view: VolumeView) -> Outcome:
        volume = view.volume
        return Outcome([DeleteVolume(volume.name, volume.uid, expect=view.version)], volume)

    @override
    async def abandon(self, run: Run, view: VolumeView) -> Sequence[Change]:
        whole = await self._is_whole(run.operation)
        state = VolumeState.READY if whole else VolumeState.DELETING
        return [PutVolume(view.volume.changed(state=state), expect=view.version)]

    async def _is_whole(self, operation: Operation) -> bool:
        if self._backing is None:
            return False
        begun = {stage.name for stage in operation.stages if stage.state is not StageState.PENDING}
        kept = await self._world.engine.inspect_volume(self._backing.engine_volume)
        return _DESTROY_STAGE not in begun and kept is not None
