"""The volume as a Resource of operations."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from typing_extensions import override

from gpudock_server.core.listings import all_volumes
from gpudock_server.core.operations.resource import Resource
from gpudock_server.core.volumes.adoption_rules import AdoptionRules
from gpudock_server.errors import (
    StaleVolumeEtag,
    VolumeBusy,
    VolumeExists,
    VolumeNotAdopted,
    VolumeNotFound,
    VolumeOnOtherNode,
)
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.volume import Volume
from gpudock_server.ports import Engine, Store, VolumeView

# The maximum number of similar names that an error lists.
_MAX_SUGGESTIONS = 10


class VolumeResource(Resource[VolumeView]):
    """Reads the records of volumes and builds the errors that name them; see Resource."""

    kind = ResourceKind.VOLUME

    def __init__(self, store: Store, node: str, engine: Engine, adoption: AdoptionRules) -> None:
        """`adoption`: which engine volumes the error for an unknown volume may mention."""
        super().__init__(store, node)
        self._engine = engine
        self._adoption = adoption

    @override
    async def view(self, name: str) -> VolumeView | None:
        return await self._store.volume(name)

    @override
    def record(self, view: VolumeView) -> Volume:
        return view.volume

    @override
    async def not_found_error(self, name: str, kind: type[VolumeNotFound] = VolumeNotFound) -> VolumeNotFound:
        """The error for an unknown volume, with similar names; VolumeNotAdopted if an engine volume has the name."""
        names = [volume.name for volume in await all_volumes(self._store)]
        volume = await self._engine.inspect_volume(name)
        if volume is not None and self._adoption.allow(volume) and not (volume.anonymous or volume.hazard):
            kind = VolumeNotAdopted
        return kind(volume=name, available=closest_names(name, names))

    @override
    def exists_error(self, name: str) -> VolumeExists:
        return VolumeExists(volume=name)

    @override
    def busy_error(self, name: str, operation_id: str) -> VolumeBusy:
        return VolumeBusy(volume=name, operation_id=operation_id)

    @override
    def stale_etag_error(self, name: str, etag: str, current: str) -> StaleVolumeEtag:
        return StaleVolumeEtag(volume=name, etag=etag, current_etag=current)

    @override
    def wrong_node_error(self, name: str, node: str, address: str) -> VolumeOnOtherNode:
        return VolumeOnOtherNode(volume=name, node=node, address=address)


def closest_names(name: str, names: Sequence[str]) -> tuple[str, ...]:
    """The entries of `names` that are most similar to `name`, best first; at most _MAX_SUGGESTIONS."""
    return tuple(difflib.get_close_matches(name, names, n=_MAX_SUGGESTIONS, cutoff=0.0))
