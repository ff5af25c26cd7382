"""The volume backends of this node, and the pool of disk space that volumes with a size share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpudock_server.core.listings import all_volumes
from gpudock_server.errors import PoolFull, SizeNotSupported
from gpudock_server.model.volume import PoolUsage, VolumeBackendKind
from gpudock_server.ports import Store, VolumeBackend


@dataclass(frozen=True, slots=True)
class VolumeBackends:
    """The volume backends of a node.

    `backends`: best first. `forced`: the backend of all new volumes with a size; None chooses the best that works.
    `overcommit`: the ratio of reserved bytes to the pool's size. `path`: the name of the pool in error messages.
    """

    store: Store
    node: str
    backends: Sequence[VolumeBackend]
    path: str
    forced: VolumeBackendKind | None = None
    overcommit: float = 1.0

    def of_kind(self, kind: VolumeBackendKind) -> VolumeBackend:
        """The backend of a kind."""
        return next(backend for backend in self.backends if backend.kind is kind)

    async def for_new_volume(self, name: str, size_bytes: int, requested: VolumeBackendKind | None) -> VolumeBackend:
        """The requested backend, else that of the settings, else the best. Raises SizeNotSupported."""
        forced = requested or (self.forced if size_bytes else None)
        return await choose_backend(self.backends, name=name, size_bytes=size_bytes, forced=forced)

    async def pool_usage(self) -> PoolUsage | None:
        """Usage of the filesystem for volumes with a size; None if this host has no backend for them."""
        for backend in self.backends:
            if backend.kind is not VolumeBackendKind.PLAIN and not await backend.unavailable_reason():
                return await backend.pool()
        return None

    async def require_space(self, kind: VolumeBackendKind, uid: str, size_bytes: int) -> None:
        """Raise PoolFull if the pool cannot reserve that size in addition to the reservations of other volumes.

        All reservations must stay below (free bytes + allocated bytes) * overcommit. Checked before an operation
        begins and again after it is recorded, so that two operations which begin at once see each other.
        """
        if kind is VolumeBackendKind.PLAIN:
            return
        pool = await self.of_kind(kind).pool()
        reserved = sum(
            [
                volume.reserved_bytes
                for volume in await all_volumes(self.store)
                if volume.node == self.node and volume.uid != uid
            ]
        )
        available = int((pool.free_bytes + pool.allocated_bytes) * self.overcommit) - reserved
        if size_bytes > available:
            raise PoolFull(path=self.path, needed_bytes=size_bytes, available_bytes=max(available, 0))

    def for_resize(self, kind: VolumeBackendKind, name: str, size_bytes: int) -> VolumeBackend:
        """The backend of a volume to be resized. Raises SizeNotSupported for PLAIN."""
        if kind is VolumeBackendKind.PLAIN:
            detail = "PLAIN volumes have no size; create a volume with a size, or adopt this one into it"
            raise SizeNotSupported(volume=name, size_bytes=size_bytes, detail=detail)
        return self.of_kind(kind)


async def choose_backend(
    backends: Sequence[VolumeBackend], *, name: str, size_bytes: int, forced: VolumeBackendKind | None = None
) -> VolumeBackend:
    """The forced backend, else the first of `backends` (best first) that is available and supports the size.

    A volume is PLAIN if and only if it has no size. Raises SizeNotSupported with the reason of each backend.
    """
    reasons = []
    for backend in backends:
        reason = await _unfit_reason(backend, sized=size_bytes > 0)
        if not reason and forced in (None, backend.kind):
            return backend
        reasons.append(f"{backend.kind}: {reason or 'available, but not requested'}")
    raise SizeNotSupported(volume=name, size_bytes=size_bytes, detail="; ".join(reasons))


async def _unfit_reason(backend: VolumeBackend, *, sized: bool) -> str:
    match backend.kind is VolumeBackendKind.PLAIN, sized:
        case True, True:
            return "does not support a size"
        case False, False:
            return "requires a size"
        case _:
            return await backend.unavailable_reason()
