"""Plain engine volumes: the engine chooses their place, and they have no size."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from gpudock_server.adapters.host.disk_usage import tree_bytes
from gpudock_server.adapters.host.threads import run_to_end
from gpudock_server.adapters.volumes.backing_folder import BackingDamaged, BackingFolder
from gpudock_server.adapters.volumes.failures import volume_errors
from gpudock_server.adapters.volumes.in_place import InPlaceBackend
from gpudock_server.adapters.volumes.pool import pool_usage
from gpudock_server.adapters.volumes.private_mounts import FilesLocation
from gpudock_server.errors import SizeNotSupported
from gpudock_server.model.volume import (
    BackingOnDisk,
    PoolUsage,
    VolumeBackendKind,
    VolumeBacking,
    VolumeIdentity,
    VolumeUsage,
)

_MEASURE_SECONDS: Final = 300.0


class PlainBackend(InPlaceBackend):
    """Implements ports.VolumeBackend, for any engine, also one on another host.

    The engine keeps the files and deletes them with its volume. `folder` of a new backing is empty; the caller sets it
    to the mount point of the engine volume. `engine_root` is the engine's data folder.
    """

    def __init__(self, engine_root: Path) -> None:
        self._root = engine_root

    @property
    def kind(self) -> VolumeBackendKind:
        """See the protocol."""
        return VolumeBackendKind.PLAIN

    async def unavailable_reason(self) -> str:
        """See the protocol."""
        return ""

    async def create(
        self,
        uid: str,
        name: str,
        size_bytes: int,
        identity: VolumeIdentity | None = None,  # noqa: ARG002 - required by the protocol
    ) -> VolumeBacking:
        """See the protocol. The identity is stored on the engine volume only."""
        if size_bytes:
            raise _no_size(name, size_bytes)
        with volume_errors("create", name, self._root):
            BackingFolder(self._root, uid)
        return VolumeBacking(kind=self.kind, uid=uid, name=name, engine_volume=f"gpudock-{uid}")

    async def backings_on_disk(self) -> tuple[BackingOnDisk, ...]:
        """See the protocol: always empty, the engine lists its volumes."""
        return ()

    async def attach(self, backing: VolumeBacking) -> None:
        """See the protocol: nothing to do."""

    async def grow(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        """See the protocol. Raises SizeNotSupported."""
        raise _no_size(backing.name, size_bytes)

    async def shrink(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        """See the protocol. Raises SizeNotSupported."""
        raise _no_size(backing.name, size_bytes)

    async def usage(self, backing: VolumeBacking) -> VolumeUsage:
        """See the protocol. Measured with du, which takes time in proportion to the number of files."""
        async with self.open_files(backing) as folder:
            with volume_errors("inspect", backing.name, self._root):
                try:
                    used = await tree_bytes(folder, apparent=False, timeout_seconds=_MEASURE_SECONDS)
                except TimeoutError as error:
                    raise BackingDamaged("measuring the volume timed out") from error
        return VolumeUsage(used_bytes=used, size_bytes=0, minimum_bytes=used)

    @asynccontextmanager
    async def open_files(self, backing: VolumeBacking) -> AsyncIterator[str]:
        """See the protocol."""
        with volume_errors("inspect", backing.name, self._root):
            folder = Path(backing.folder)
            if not folder.is_absolute() or not await run_to_end(folder.is_dir):
                raise BackingDamaged(f"volume folder {backing.folder!r} is not accessible from this host")
        yield backing.folder

    async def files_location(self, backing: VolumeBacking) -> FilesLocation:
        """See private_mounts.MountableBackend."""
        async with self.open_files(backing) as folder:
            return FilesLocation(path=Path(folder))

    async def destroy(self, backing: VolumeBacking) -> None:
        """See the protocol: nothing to do, the engine deletes the files with its volume."""

    async def pool(self) -> PoolUsage:
        """See the protocol. Plain volumes have no promised size."""
        return await pool_usage(self._root)


def _no_size(name: str, size_bytes: int) -> SizeNotSupported:
    return SizeNotSupported(volume=name, size_bytes=size_bytes, detail="PLAIN volumes have no size")
