"""Which backend a new volume is made on."""

from __future__ import annotations

from collections.abc import Sequence

from gpudock_server.errors import SizeNotSupported
from gpudock_server.model.volume import VolumeBackendKind
from gpudock_server.ports import VolumeBackend


async def choose_backend(
    backends: Sequence[VolumeBackend], *, name: str, size_bytes: int, forced: VolumeBackendKind | None = None
) -> VolumeBackend:
    """The forced backend, else the first of `backends` (the best first) that this host has and that fits the size.

    A volume without a size is PLAIN, and only such a one is. Raises SizeNotSupported with what each backend lacks.
    """
    lacking = []
    for backend in backends:
        reason = await _unfit(backend, sized=size_bytes > 0)
        if not reason and forced in (None, backend.kind):
            return backend
        lacking.append(f"{backend.kind}: {reason or 'can, but another one was asked for'}")
    raise SizeNotSupported(volume=name, size_bytes=size_bytes, detail="; ".join(lacking))


async def _unfit(backend: VolumeBackend, *, sized: bool) -> str:
    match backend.kind is VolumeBackendKind.PLAIN, sized:
        case True, True:
            return "has no size"
        case False, False:
            return "needs a size"
        case _:
            return await backend.unavailable_reason()
