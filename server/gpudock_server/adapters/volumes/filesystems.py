"""The filesystems of loop images: how each is made, grown and shrunk, and its overhead.

All of them can grow while they are mounted; others would need stopped containers. The image is larger than the volume
by the overhead of the filesystem, so that `df` shows the requested size.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import ClassVar, Final

from typing_extensions import override

from gpudock_server.adapters.host.privileges import effective_capabilities
from gpudock_server.adapters.host.subprocesses import ProgramFailed, kernel_lacks, missing_programs, run
from gpudock_server.adapters.volumes.private_mounts import DeviceMount, MountedView
from gpudock_server.model.volume import VolumeUsage
from gpudock_server.ports import ShrinkNeedsCopy

_MIB: Final = 1 << 20
_CAP_SYS_RESOURCE: Final = 24
_BLOCK_BYTES: Final = 64 << 10
# What a smaller filesystem needs on top of the used bytes of the larger one.
_MARGIN_BYTES: Final = 16 * _MIB
_MARGIN_SHARE: Final = 20


class Filesystem(ABC):
    """A kind of filesystem. `smallest_bytes` is the minimum size of a volume."""

    name: ClassVar[str]
    # Options of all mounts, of the engine and the daemon: those of the first mount apply to all. With discard, deleted
    # files return their space to the pool.
    options: ClassVar[str]
    smallest_bytes: ClassVar[int]
    # Whether it can shrink while it is mounted.
    shrinks: ClassVar[bool] = False
    _left_in_root: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    async def unavailable_reason(self) -> str:
        """Why this host does not support the filesystem; empty if it does."""

    @abstractmethod
    def image_bytes(self, size_bytes: int) -> int:
        """Return the length of the image of a volume of that size."""

    @abstractmethod
    async def make(self, image: Path, image_bytes: int) -> None:
        """Make an empty filesystem that fills `image`. Raises ProgramFailed."""

    @abstractmethod
    async def grow(self, view: MountedView, mount: DeviceMount) -> None:
        """Grow the filesystem to the size of its device, unless it has that size. Raises ProgramFailed."""

    async def shrink(self, view: MountedView, mount: DeviceMount, image_bytes: int) -> None:  # noqa: ARG002 - subclasses that can shrink use them
        """Shrink the filesystem to the first `image_bytes` of the device. Raises ShrinkNeedsCopy, ProgramFailed."""
        raise ShrinkNeedsCopy(f"{self.name} cannot shrink")

    def tidy(self, folder: str) -> None:
        """Remove what mkfs creates in the root: the engine fills only empty volumes from the image."""
        for name in self._left_in_root:
            # A folder that is not empty is not the one that mkfs created.
            with suppress(OSError):
                Path(folder, name).rmdir()

    def usage(self, folder: str) -> VolumeUsage:
        """Return the usage as `df` shows it."""
        shown = os.statvfs(folder)
        used = (shown.f_blocks - shown.f_bfree) * shown.f_frsize
        return VolumeUsage(
            used_bytes=used,
            size_bytes=shown.f_blocks * shown.f_frsize,
            minimum_bytes=max(used + max(_MARGIN_BYTES, used // _MARGIN_SHARE), self.smallest_bytes),
        )


class Xfs(Filesystem):
    """XFS: grows while it is mounted, never shrinks.

    mkfs refuses images below 300 MB. `df` does not count the log, which never grows.
    """

    name = "xfs"
    options = "discard"
    _LOG_BYTES: Final = 64 * _MIB
    _SMALLEST_IMAGE: Final = 300 * _MIB
    smallest_bytes = _SMALLEST_IMAGE - _LOG_BYTES
    # A filesystem keeps its first allocation groups and adds more of the same size. Small filesystems start with few
    # large groups, so that one that grows a hundredfold does not have thousands of them.
    _FEW_GROUPS_BELOW: Final = 4096 * _MIB

    @override
    async def unavailable_reason(self) -> str:
        return missing_programs("mkfs.xfs", "xfs_growfs") or await kernel_lacks("xfs")

    @override
    def image_bytes(self, size_bytes: int) -> int:
        return _round_up(size_bytes) + self._LOG_BYTES

    @override
    async def make(self, image: Path, image_bytes: int) -> None:
        groups = ["-d", "agcount=2"] if image_bytes < self._FEW_GROUPS_BELOW else []
        # -K: a sparse file has nothing to discard.
        await run("mkfs.xfs", "-q", "-f", "-K", "-l", f"size={self._LOG_BYTES}", *groups, str(image))

    @override
    async def grow(self, view: MountedView, mount: DeviceMount) -> None:
        await view.run("xfs_growfs", "-d", str(mount.point))


class Btrfs(Filesystem):
    """Btrfs: grows and shrinks while it is mounted."""

    name = "btrfs"
    shrinks = True
    options = "discard=async"
    # fs/btrfs/ioctl.c refuses smaller sizes.
    smallest_bytes = 256 * _MIB

    @override
    async def unavailable_reason(self) -> str:
        return missing_programs("mkfs.btrfs", "btrfs") or await kernel_lacks("btrfs")

    @override
    def image_bytes(self, size_bytes: int) -> int:
        return _round_up(size_bytes)

    @override
    async def make(self, image: Path, image_bytes: int) -> None:
        # A second copy of the metadata in the same image protects from nothing.
        profiles = ["--metadata", "single", "--data", "single"]
        await run("mkfs.btrfs", "--quiet", "--force", "--nodiscard", *profiles, str(image))

    @override
    async def grow(self, view: MountedView, mount: DeviceMount) -> None:
        await view.run("btrfs", "filesystem", "resize", "max", str(mount.point))

    @override
    async def shrink(self, view: MountedView, mount: DeviceMount, image_bytes: int) -> None:
        if image_bytes < self.smallest_bytes:
            raise ShrinkNeedsCopy(f"btrfs cannot be smaller than {self.smallest_bytes} bytes")
        try:
            await view.run("btrfs", "filesystem", "resize", str(image_bytes), str(mount.point))
        except ProgramFailed as error:
            if error.no_space:
                raise ShrinkNeedsCopy("btrfs has no space to move the data beyond the new size") from error
            raise


class Ext4(Filesystem):
    """ext4: grows while it is mounted, with CAP_SYS_RESOURCE; shrinks only unmounted.

    `df` does not count inode tables, group descriptors and the journal: the image is larger by a bit more than those.
    """

    name = "ext4"
    options = "discard"
    smallest_bytes = 16 * _MIB
    _JOURNAL_MIB: Final = 8
    _FIXED_BYTES: Final = 10 * _MIB
    _SHARE: Final = 50
    _BYTES_PER_INODE: Final = 16384
    _left_in_root = ("lost+found",)

    @override
    async def unavailable_reason(self) -> str:
        if not effective_capabilities() >> _CAP_SYS_RESOURCE & 1:
            return "growing a mounted ext4 needs CAP_SYS_RESOURCE"
        return missing_programs("mkfs.ext4", "resize2fs") or await kernel_lacks("ext4")

    @override
    def image_bytes(self, size_bytes: int) -> int:
        return _round_up(size_bytes + size_bytes // self._SHARE + self._FIXED_BYTES)

    @override
    async def make(self, image: Path, image_bytes: int) -> None:
        layout = ["-b", "4096", "-I", "256", "-i", str(self._BYTES_PER_INODE), "-J", f"size={self._JOURNAL_MIB}"]
        lazy = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
        await run("mkfs.ext4", "-q", "-F", "-m", "0", *layout, "-E", lazy, str(image))

    @override
    async def grow(self, view: MountedView, mount: DeviceMount) -> None:
        await view.run("resize2fs", mount.device)


# Best first.
FILESYSTEMS: Final[tuple[Filesystem, ...]] = (Xfs(), Btrfs(), Ext4())


def _round_up(size_bytes: int) -> int:
    """Round up to a multiple of the block size of all filesystems."""
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
