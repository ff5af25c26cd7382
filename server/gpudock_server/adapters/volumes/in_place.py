"""The base of backends that never replace a backing by another."""

from __future__ import annotations

from gpudock_server.errors import VolumeFailed
from gpudock_server.model.volume import VolumeBacking
from gpudock_server.ports import VolumeBackend


class InPlaceBackend(VolumeBackend):
    """Implements the part of ports.VolumeBackend about replacements, which it does not support."""

    def needs_copy(self, backing: VolumeBacking, size_bytes: int) -> bool:  # noqa: ARG002 - required by the protocol
        """See the protocol: never."""
        return False

    async def replacement(self, backing: VolumeBacking, uid: str, size_bytes: int) -> VolumeBacking:  # noqa: ARG002 - required by the protocol
        """See the protocol: not supported."""
        raise self._no_replacement(backing)

    async def content(self, backing: VolumeBacking) -> str:
        """See the protocol: not supported."""
        raise self._no_replacement(backing)

    async def exchange(self, holder: VolumeBacking, other: VolumeBacking, content: str) -> None:  # noqa: ARG002 - required by the protocol
        """See the protocol: not supported."""
        raise self._no_replacement(holder)

    def _no_replacement(self, backing: VolumeBacking) -> VolumeFailed:
        return VolumeFailed(volume=backing.name, call="replace", detail=f"{self.kind} volumes are never replaced")
