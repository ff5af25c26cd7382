"""What the sagas of volumes have in common: how they read their volume, what they record of it, and its copy."""

from typing_extensions import override

from gpudock_server.core.operations.saga import OperationRun, Saga
from gpudock_server.core.volumes.resource import VolumeResource
from gpudock_server.errors import VolumeFailed, VolumeInUse
from gpudock_server.model.record import now
from gpudock_server.model.store_changes import PutVolumeRevision
from gpudock_server.model.volume import TreeSummary, Volume, VolumeBacking, VolumeCause, VolumeRevision
from gpudock_server.ports import Progress, VolumeCopier, VolumeView


class VolumeSaga(Saga[VolumeView]):
    """A saga whose target is a volume."""

    def __init__(self, volumes: VolumeResource) -> None:
        self._volumes = volumes

    @override
    async def read_target(self, run: OperationRun) -> VolumeView | None:
        return await self._volumes.view_of(run.operation.target)


def revision_of(volume: Volume, cause: VolumeCause, operation_id: str) -> PutVolumeRevision:
    """The revision that a volume has come to."""
    return PutVolumeRevision(
        VolumeRevision(
            volume=volume.name,
            uid=volume.uid,
            revision=volume.revision,
            size_bytes=volume.size_bytes,
            cause=cause,
            create_time=now(),
            operation_id=operation_id,
        )
    )


def backing_of(volume: Volume) -> VolumeBacking:
    """What it was made of. Raises VolumeInUse while it is still being made."""
    if volume.backing is None:
        raise VolumeInUse(volume=volume.name, holders=("the operation that makes it",))
    return volume.backing


async def copy_and_verify(
    copier: VolumeCopier, source: VolumeBacking, target: VolumeBacking, progress: Progress
) -> TreeSummary:
    """Copy what differs, and read both sides in full: what they hold. Raises VolumeFailed where they stay different."""
    await copier.copy(source, target, progress, final=True)
    try:
        return await copier.verify(source, target)
    except VolumeFailed:
        # The copies before missed a change, for whatever reason. Copy once more, from the beginning.
        await copier.copy(source, target, progress, final=True)
        return await copier.verify(source, target)
