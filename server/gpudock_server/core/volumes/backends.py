"""The backends that keep volumes on this host, and the pool of space that volumes with a size share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpudock_server.core.listings import all_volumes
from gpudock_server.errors import PoolFull, SizeNotSupported
from gpudock_server.model.volume import PoolUsage, VolumeBackendKind
from gpudock_server.ports import Store, VolumeBackend


@dataclass(frozen=True, slots=True)
class VolumeBackends:
    """The backends of a node.

    `backends` has the best first. `forced` is the one for all new volumes with a size, None for whichever can.
    `overcommit` is how often the pool may be promised. `path` names the pool to people.
    """

    store: Store
    node: str
    backends: Sequence[VolumeBackend]
    path: str
    forced: VolumeBackendKind | None = None
    overcommit: float = 1.0

    def of_kind(self, kind: VolumeBackendKind) -> VolumeBackend:
        """The backend that a volume was made on."""
        return next(one for one in self.backends if one.kind is kind)

    async def for_new_volume(self, name: str, size_bytes: int, asked: VolumeBackendKind | None) -> VolumeBackend:
        """The caller's backend, else the settings', else the best. Raises SizeNotSupported."""
        forced = asked or (self.forced if size_bytes else None)
        return await choose_backend(self.backends, name=name, size_bytes=size_bytes, forced=forced)

    async def pool_usage(self) -> PoolUsage | None:
        """The filesystem of the volumes with a size; None where this host can have none."""
        for backend in self.backends:
            if backend.kind is not VolumeBackendKind.PLAIN and not await backend.unavailable_reason():
                return await backend.pool()
        return None

    async def require_space(self, kind: VolumeBackendKind, uid: str, size_bytes: int) -> None:
        """Raises PoolFull where the pool cannot be promised that size beside what others were promised.

        What all are promised must stay below what they have already and what is free, times the over-commitment.
        Asked before an operation begins and again once it is recorded: two that begin at once see each other then.
        """
        if kind is VolumeBackendKind.PLAIN:
            return
        pool = await self.of_kind(kind).pool()
        others = sum(
            [
                volume.reserved_bytes
                for volume in await all_volumes(self.store)
                if volume.node == self.node and volume.uid != uid
            ]
        )
        room = int((pool.free_bytes + pool.allocated_bytes) * self.overcommit) - others
        if size_bytes > room:
            raise PoolFull(path=self.path, needed_bytes=size_bytes, available_bytes=max(room, 0))

    def for_resize(self, kind: VolumeBackendKind, name: str, size_bytes: int) -> VolumeBackend:
        """The backend of a volume that is to have another size. Raises SizeNotSupported where it knows no sizes."""
        if kind is VolumeBackendKind.PLAIN:
            detail = "it is PLAIN, which has no size: make one with a size, or adopt it into one"
            raise SizeNotSupported(volume=name, size_bytes=size_bytes, detail=detail)
        return self.of_kind(kind)


async def choose_backend(
    backends: Sequence[VolumeBackend], *, name: str, size_bytes: int, forced: VolumeBackendKind | None = None
) -> VolumeBackend:
    """The forced backend, else the first of `backends` (the best first) that this host has and that fits the size.

    A volume without a size is PLAIN, and only such a one is. Raises SizeNotSupported with what each backend lacks.
    """
    lacking = []
    for backend in backends:
        reason = await _unfit_reason(backend, sized=size_bytes > 0)
        if not reason and forced in (None, backend.kind):
            return backend
        lacking.append(f"{backend.kind}: {reason or 'can, but another one was asked for'}")
    raise SizeNotSupported(volume=name, size_bytes=size_bytes, detail="; ".join(lacking))


async def _unfit_reason(backend: VolumeBackend, *, sized: bool) -> str:
    match backend.kind is VolumeBackendKind.PLAIN, sized:
        case True, True:
            return "has no size"
        case False, False:
            return "needs a size"
        case _:
            return await backend.unavailable_reason()
