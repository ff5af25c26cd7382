"""Backends that hold the files of volumes, and copies between them."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from gpudock_server.model.volume import (
    BackingOnDisk,
    PoolUsage,
    TreeSummary,
    VolumeBackendKind,
    VolumeBacking,
    VolumeIdentity,
    VolumeUsage,
)
from gpudock_server.ports.progress import Progress


class ShrinkNeedsCopy(Exception):
    """The backing cannot shrink in place: its files must be copied to a smaller one. Nothing was changed."""


class VolumeBackend(Protocol):
    """A kind of volume backing on this host. Raises VolumeFailed, DiskFull, and the errors that the methods name.

    Every method is idempotent, also if the first call was interrupted by `kill -9`. Calls that change the same volume
    must not overlap; `usage`, `open_files` and `pool` may be called at any time.
    """

    @property
    def kind(self) -> VolumeBackendKind:
        """Return the kind of the backend."""
        ...

    async def unavailable_reason(self) -> str:
        """Return why this host does not support the backend; empty if it does."""
        ...

    async def create(
        self, uid: str, name: str, size_bytes: int, identity: VolumeIdentity | None = None
    ) -> VolumeBacking:
        """Create an empty backing, ready for the engine. Raises SizeNotSupported.

        `identity` is stored with it. The caller creates the engine volume from the backing's `engine_volume` and
        `driver_options`.
        """
        ...

    async def backings_on_disk(self) -> tuple[BackingOnDisk, ...]:
        """Return all backings of this kind on the disk of this host, including damaged ones."""
        ...

    async def attach(self, backing: VolumeBacking) -> None:
        """Make a backing ready for the engine again, for example after a reboot."""
        ...

    async def grow(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        """Grow a backing in place, also while it is in use; returns the changed backing. Raises SizeNotSupported."""
        ...

    async def shrink(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        """Shrink a backing in place, also while it is in use; returns the changed backing.

        Raises VolumeTooSmallForData or ShrinkNeedsCopy, with nothing changed.
        """
        ...

    def needs_copy(self, backing: VolumeBacking, size_bytes: int) -> bool:
        """Whether `shrink` to that size would raise ShrinkNeedsCopy; `replacement` is supported then."""
        ...

    async def replacement(self, backing: VolumeBacking, uid: str, size_bytes: int) -> VolumeBacking:
        """Create an empty backing of another size, with which `exchange` can replace this one. Raises SizeNotSupported.

        `destroy` of the replacement needs only its `kind` and `uid`.
        """
        ...

    async def content(self, backing: VolumeBacking) -> str:
        """Return an id of the content of a backing, which stays the same when `exchange` moves the content."""
        ...

    async def exchange(self, holder: VolumeBacking, other: VolumeBacking, content: str) -> None:
        """Exchange the contents of two backings, unless `holder` already holds `content`.

        Both are passed as they have to be afterwards, with the sizes of their new contents. The engine volumes do not
        change; they show the new content from their next mount on. Raises VolumeInUse, with nothing changed, while
        either is mounted.
        """
        ...

    async def usage(self, backing: VolumeBacking) -> VolumeUsage:
        """Return the usage of a backing, mounted or not."""
        ...

    def open_files(self, backing: VolumeBacking) -> AbstractAsyncContextManager[str]:
        """Open a folder in which the daemon sees the files of the volume, mounted by the engine or not.

        Only the daemon may use the path: another program may resolve it to a different folder. While the context is
        open, `destroy` raises VolumeInUse.
        """
        ...

    async def destroy(self, backing: VolumeBacking) -> None:
        """Delete a backing with its files. Raises VolumeInUse while it is mounted."""
        ...

    async def pool(self) -> PoolUsage:
        """Return the usage of the filesystem that holds the backings."""
        ...


class VolumeCopier(Protocol):
    """Copies the files of a volume to another backing. Raises VolumeFailed, DiskFull."""

    async def copy(self, source: VolumeBacking, target: VolumeBacking, progress: Progress, *, final: bool) -> None:
        """Make the target's files equal to the source's; copies only what has changed since the last copy.

        The source may be in use, except during the `final` copy. The target also holds an index of the copied files,
        which the final copy removes: a copy after it starts from the beginning. `progress` counts the bytes on disk of
        the source's files.
        """
        ...

    async def verify(self, source: VolumeBacking, target: VolumeBacking) -> TreeSummary:
        """Read both in full while neither is in use; returns a summary. Raises VolumeFailed if they differ."""
        ...
