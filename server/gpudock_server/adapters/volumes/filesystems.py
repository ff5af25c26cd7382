"""The filesystems that an image can hold: how each is made, grown and shrunk, and what it takes for itself.

Every one of them grows while it is mounted: one that does not would stop containers, and is not offered. The image is
larger than the volume by what the filesystem keeps back from the start, so that `df` shows the size that was asked for.
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
# What a smaller filesystem needs beside the bytes that are in use in the larger one.
_MARGIN_BYTES: Final = 16 * _MIB
_MARGIN_SHARE: Final = 20


class Filesystem(ABC):
    """One kind of filesystem. `smallest_bytes` is the least size of a volume on it."""

    name: ClassVar[str]
    # For mount(2), the engine's and ours alike: the first mount's are in force for all. Files that are deleted give
    # their room back to the pool.
    options: ClassVar[str]
    smallest_bytes: ClassVar[int]
    # Whether it can become smaller while it is mounted.
    shrinks: ClassVar[bool] = False
    _left_in_root: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    async def unavailable_reason(self) -> str:
        """Why it cannot be used on this host; empty when it can."""

    @abstractmethod
    def image_bytes(self, size_bytes: int) -> int:
        """How long the image of a volume of that size is."""

    @abstractmethod
    async def make(self, image: Path, image_bytes: int) -> None:
        """Make an empty filesystem that fills `image`. Raises ProgramFailed."""

    @abstractmethod
    async def grow(self, view: MountedView, mount: DeviceMount) -> None:
        """Fill the device, which has become larger; one that fills it already is no error. Raises ProgramFailed."""

    async def shrink(self, view: MountedView, mount: DeviceMount, image_bytes: int) -> None:  # noqa: ARG002 - for those that can
        """Leave free all behind the first `image_bytes` of the device. Raises ShrinkNeedsCopy."""
        raise ShrinkNeedsCopy(f"{self.name} does not shrink")

    def tidy(self, folder: str) -> None:
        """Remove what making it has left in its root: the engine fills only empty volumes from the image."""
        for name in self._left_in_root:
            # Empty, or it is not what making it has left.
            with suppress(OSError):
                Path(folder, name).rmdir()

    def usage(self, folder: str) -> VolumeUsage:
        """How full it is, as `df` shows it."""
        shown = os.statvfs(folder)
        used = (shown.f_blocks - shown.f_bfree) * shown.f_frsize
        return VolumeUsage(
            used_bytes=used,
            size_bytes=shown.f_blocks * shown.f_frsize,
            minimum_bytes=max(used + max(_MARGIN_BYTES, used // _MARGIN_SHARE), self.smallest_bytes),
        )


class Xfs(Filesystem):
    """Grows while it is mounted, never shrinks.

    mkfs refuses images below 300 MB. `df` leaves out the log, which never grows.
    """

    name = "xfs"
    options = "discard"
    _LOG_BYTES: Final = 64 * _MIB
    _SMALLEST_IMAGE: Final = 300 * _MIB
    smallest_bytes = _SMALLEST_IMAGE - _LOG_BYTES
    # A filesystem keeps the allocation groups it began with and adds more of their size: small ones begin with few and
    # large groups, so that one which becomes a hundred times as large has not thousands of them.
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
        # -K: there is nothing to discard in a sparse file.
        await run("mkfs.xfs", "-q", "-f", "-K", "-l", f"size={self._LOG_BYTES}", *groups, str(image))

    @override
    async def grow(self, view: MountedView, mount: DeviceMount) -> None:
        await view.run("xfs_growfs", "-d", str(mount.point))


class Btrfs(Filesystem):
    """Grows and shrinks while it is mounted."""

    name = "btrfs"
    shrinks = True
    options = "discard=async"
    # fs/btrfs/ioctl.c refuses to resize to less, in either direction.
    smallest_bytes = 256 * _MIB

    @override
    async def unavailable_reason(self) -> str:
        return missing_programs("mkfs.btrfs", "btrfs") or await kernel_lacks("btrfs")

    @override
    def image_bytes(self, size_bytes: int) -> int:
        return _round_up(size_bytes)

    @override
    async def make(self, image: Path, image_bytes: int) -> None:
        # Two copies of the metadata on one image would protect from nothing that the host's own disk does not.
        profiles = ["--metadata", "single", "--data", "single"]
        await run("mkfs.btrfs", "--quiet", "--force", "--nodiscard", *profiles, str(image))

    @override
    async def grow(self, view: MountedView, mount: DeviceMount) -> None:
        await view.run("btrfs", "filesystem", "resize", "max", str(mount.point))

    @override
    async def shrink(self, view: MountedView, mount: DeviceMount, image_bytes: int) -> None:
        if image_bytes < self.smallest_bytes:
            raise ShrinkNeedsCopy(f"btrfs shrinks to {self.smallest_bytes} bytes at the least")
        try:
            await view.run("btrfs", "filesystem", "resize", str(image_bytes), str(mount.point))
        except ProgramFailed as error:
            if error.no_space:
                raise ShrinkNeedsCopy("btrfs found no room to move what lies beyond that size") from error
            raise


class Ext4(Filesystem):
    """Grows while it is mounted, for who has CAP_SYS_RESOURCE; shrinks only unmounted.

    `df` leaves out inode tables, group descriptors and the journal: the image is larger by a bit more than those.
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
            return "without CAP_SYS_RESOURCE the daemon cannot grow a mounted ext4"
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


# The best first.
FILESYSTEMS: Final[tuple[Filesystem, ...]] = (Xfs(), Btrfs(), Ext4())


def _round_up(size_bytes: int) -> int:
    """The next multiple of what the filesystems count in."""
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
