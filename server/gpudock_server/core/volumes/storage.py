"""What the use cases of volumes reach: the world, and the backends that keep volumes on this host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpudock_server.core.containers.mounts import all_volumes, node_address, volume_not_found
from gpudock_server.core.containers.world import World
from gpudock_server.errors import PoolFull, SizeNotSupported, StaleVolumeEtag, VolumeOnOtherNode
from gpudock_server.model.volume import PoolUsage, VolumeBackendKind
from gpudock_server.ports import VolumeBackend, VolumeCopier, VolumeView


@dataclass(frozen=True, slots=True)
class Storage:
    """Handed to every use case and every saga of volumes.

    `backends` has the best first. `forced` is the one for all new volumes with a size, None for whichever can.
    `overcommit` is how often the pool may be promised. `path` names the pool to people.
    """

    world: World
    backends: Sequence[VolumeBackend]
    copier: VolumeCopier
    path: str
    forced: VolumeBackendKind | None = None
    overcommit: float = 1.0

    def backend(self, kind: VolumeBackendKind) -> VolumeBackend:
        """The backend that a volume was made on."""
        return next(one for one in self.backends if one.kind is kind)

    async def lookup(self, name: str, etag: str = "") -> VolumeView:
        """A volume of this node as the caller has seen it.

        Raises VolumeNotFound, VolumeOnOtherNode, StaleVolumeEtag.
        """
        view = await self.world.store.volume(name)
        if view is None:
            raise await volume_not_found(self.world, name)
        volume = view.volume
        if volume.node != self.world.node:
            address = await node_address(self.world, volume.node)
            raise VolumeOnOtherNode(volume=name, node=volume.node, address=address)
        if etag and etag != volume.etag:
            raise StaleVolumeEtag(volume=name, etag=etag, current_etag=volume.etag)
        return view

    async def pool(self) -> PoolUsage | None:
        """The filesystem of the volumes with a size; None where this host can have none."""
        for backend in self.backends:
            if backend.kind is not VolumeBackendKind.PLAIN and not await backend.unavailable_reason():
                return await backend.pool()
        return None

    async def require_pool_space(self, kind: VolumeBackendKind, uid: str, size_bytes: int) -> None:
        """Raises PoolFull where the pool cannot be promised that size beside what others were promised.

        What all are promised must stay below what they have already and what is free, times the over-commitment.
        Asked before an operation begins and again once it is recorded: two that begin at once see each other then.
        """
        if kind is VolumeBackendKind.PLAIN:
            return
        pool = await self.backend(kind).pool()
        others = sum(
            [
                volume.reserved_bytes
                for volume in await all_volumes(self.world.store)
                if volume.node == self.world.node and volume.uid != uid
            ]
        )
        room = int((pool.free_bytes + pool.allocated_bytes) * self.overcommit) - others
        if size_bytes > room:
            raise PoolFull(path=self.path, needed_bytes=size_bytes, available_bytes=max(room, 0))

    def require_sizes(self, kind: VolumeBackendKind, name: str, size_bytes: int) -> VolumeBackend:
        """The backend, unless it knows no sizes. Raises SizeNotSupported."""
        if kind is VolumeBackendKind.PLAIN:
            detail = "it is PLAIN, which has no size: make one with a size, or adopt it into one"
            raise SizeNotSupported(volume=name, size_bytes=size_bytes, detail=detail)
        return self.backend(kind)
