"""What the sagas of volumes share: the revision and the backing of a volume, and the copy of its files."""

from gpudock_server.errors import VolumeFailed, VolumeInUse
from gpudock_server.model.record import now
from gpudock_server.model.store_changes import PutVolumeRevision
from gpudock_server.model.volume import TreeSummary, Volume, VolumeBacking, VolumeCause, VolumeRevision
from gpudock_server.ports import Progress, VolumeCopier


def revision_of(volume: Volume, cause: VolumeCause, operation_id: str) -> PutVolumeRevision:
    """The revision that records a volume's current state."""
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
    """The backing of a volume. Raises VolumeInUse while the volume is being created."""
    if volume.backing is None:
        raise VolumeInUse(volume=volume.name, holders=("the operation that creates it",))
    return volume.backing


async def copy_and_verify(
    copier: VolumeCopier, source: VolumeBacking, target: VolumeBacking, progress: Progress
) -> TreeSummary:
    """Copy the differences, then read and compare both sides in full. Raises VolumeFailed if they still differ."""
    await copier.copy(source, target, progress, final=True)
    try:
        return await copier.verify(source, target)
    except VolumeFailed:
        # An earlier copy missed a change. Copy once more, from the beginning.
        await copier.copy(source, target, progress, final=True)
        return await copier.verify(source, target)
