"""A volume's files on their way to another store, while nothing uses either."""

from __future__ import annotations

from gpudock_server.errors import VolumeFailed
from gpudock_server.model.record import JsonObject
from gpudock_server.model.volume import VolumeBacking
from gpudock_server.ports import Progress, VolumeCopier


async def carry(copier: VolumeCopier, source: VolumeBacking, target: VolumeBacking, progress: Progress) -> JsonObject:
    """Copy what differs, and read both sides in full: what they hold. Raises VolumeFailed where they stay different."""
    await copier.copy(source, target, progress, final=True)
    try:
        summary = await copier.verify(source, target)
    except VolumeFailed:
        # The copies before missed a change, for whatever reason. Copy once more, from the beginning.
        await copier.copy(source, target, progress, final=True)
        summary = await copier.verify(source, target)
    return summary.model_dump(mode="json")
