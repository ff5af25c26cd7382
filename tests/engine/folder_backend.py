"""A volume backend whose volumes are plain folders, for tests of the volume copier."""

from __future__ import annotations

import uuid
from pathlib import Path

from gpudock_server.adapters.volumes.private_mounts import FilesLocation
from gpudock_server.model.volume import VolumeBackendKind, VolumeBacking


class FolderBackend:
    """Locates the files of a volume in a folder of its name below `root`."""

    kind = VolumeBackendKind.LOOP

    def __init__(self, root: Path) -> None:
        self._root = root

    async def files_location(self, backing: VolumeBacking) -> FilesLocation:
        """The folder with the files of a volume."""
        return FilesLocation(path=self._root / backing.name)

    def create(self, name: str) -> VolumeBacking:
        """Create an empty volume."""
        (self._root / name).mkdir()
        return VolumeBacking(kind=self.kind, uid=str(uuid.uuid4()), name=name, size_bytes=0, engine_volume=name)
