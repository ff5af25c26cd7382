"""Loop volumes: each is a sparse image with its own filesystem, on a loop device that the engine mounts."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from gpudock_server.adapters.host.filesystem import open_directory, rename_exchange, sync_directory
from gpudock_server.adapters.host.subprocesses import ProgramFailed, missing_programs
from gpudock_server.adapters.host.threads import run_to_end
from gpudock_server.adapters.volumes import loop_device
from gpudock_server.adapters.volumes.backing_folder import (
    BackingDamaged,
    BackingFolder,
    backing_folders,
    backings_on_disk,
)
from gpudock_server.adapters.volumes.failures import require_fitting, volume_errors
from gpudock_server.adapters.volumes.filesystems import FILESYSTEMS, Filesystem
from gpudock_server.adapters.volumes.pool import pool_usage
from gpudock_server.adapters.volumes.private_mounts import DeviceMount, FilesLocation, MountedView, mount_privately
from gpudock_server.errors import SizeNotSupported, VolumeInUse
from gpudock_server.model.volume import (
    BackingOnDisk,
    PoolUsage,
    VolumeBackendKind,
    VolumeBacking,
    VolumeIdentity,
    VolumeUsage,
)
from gpudock_server.ports import VolumeBackend
from gpudock_server.sizes import size_text

_CONTROL: Final = Path("/dev/loop-control")


class LoopBackend(VolumeBackend):
    """Implements ports.VolumeBackend.

    `root` is the folder of all backings; `local`: the engine runs on this host, so that it can mount the devices.
    `filesystem` is that of new volumes; empty: the best that the host supports. The engine gets the path of a symbolic
    link, because the options of its volumes never change, but the numbers of loop devices do.
    """

    def __init__(self, root: Path, *, local: bool, filesystem: str = "") -> None:
        self._root = root
        self._local = local
        self._offered = tuple(one for one in FILESYSTEMS if filesystem in ("", one.name))
        # Serializes attaching a device and writing its link.
        self._attach_lock = asyncio.Lock()

    @property
    def kind(self) -> VolumeBackendKind:
        """See the protocol."""
        return VolumeBackendKind.LOOP

    async def unavailable_reason(self) -> str:
        """See the protocol."""
        if not self._local:
            return "the engine runs on another host"
        if os.geteuid() != 0:
            return "the daemon does not run as root"
        if not _CONTROL.exists():
            return "the kernel has no loop device support"
        if lacking := missing_programs("losetup", "mount", "unshare", "nsenter"):
            return lacking
        _, reasons = await self._usable()
        return "" if len(reasons) < len(self._offered) else "; ".join(reasons)

    async def create(
        self, uid: str, name: str, size_bytes: int, identity: VolumeIdentity | None = None
    ) -> VolumeBacking:
        """See the protocol. The image is sparse, so the space is not allocated."""
        folder = self._folder_of(uid, name)
        with volume_errors("create", name, self._root, size_bytes):
            backing = await run_to_end(folder.read_own, self.kind)
            if backing is None:
                filesystem = await self._filesystem_for(name, size_bytes)
                backing = await _record_new(folder, filesystem, name, size_bytes, identity)
            await self._finish_create(folder, backing)
        return backing

    async def backings_on_disk(self) -> tuple[BackingOnDisk, ...]:
        """See the protocol."""
        with volume_errors("list", "", self._root):
            return await run_to_end(backings_on_disk, self._root, self.kind) if self._local else ()

    async def _finish_create(self, folder: BackingFolder, backing: VolumeBacking) -> None:
        filesystem = _filesystem(backing)
        if not await run_to_end(folder.image.exists):
            await _make_image(folder, filesystem, filesystem.image_bytes(backing.size_bytes))
        await self._ensure_attached(folder)
        async with self._view(folder, filesystem) as (view, mount):
            await run_to_end(filesystem.tidy, view.path(mount.point))

    async def attach(self, backing: VolumeBacking) -> None:
        """See the protocol."""
        with volume_errors("attach", backing.name, self._root):
            await self._ensure_attached(self._folder(backing))

    async def grow(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        """See the protocol. Grows the image first, then the device, then the filesystem."""
        folder, filesystem = self._folder(backing), _filesystem(backing)
        with volume_errors("grow", backing.name, self._root, size_bytes - backing.size_bytes):
            await run_to_end(_extend_image, folder.image, filesystem.image_bytes(size_bytes))
            await self._ensure_attached(folder)
            async with self._view(folder, filesystem) as (view, mount):
                await filesystem.grow(view, mount)
            return await folder.record_size(backing, size_bytes)

    async def shrink(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        """See the protocol. The image is truncated only after the filesystem has shrunk."""
        folder, filesystem = self._folder(backing), _filesystem(backing)
        require_fitting(backing, await self.usage(backing), size_bytes)
        length = filesystem.image_bytes(size_bytes)
        with volume_errors("shrink", backing.name, self._root):
            async with self._view(folder, filesystem) as (view, mount):
                await filesystem.shrink(view, mount, length)
                left = (await run_to_end(filesystem.usage, view.path(mount.point))).size_bytes
            if left > length:
                raise ProgramFailed(f"{filesystem.name} still uses {left} bytes; the image was not truncated")
            await run_to_end(os.truncate, folder.image, length)
            await self._ensure_attached(folder)
            return await folder.record_size(backing, size_bytes)

    def needs_copy(self, backing: VolumeBacking, size_bytes: int) -> bool:
        """See the protocol."""
        filesystem = _filesystem(backing)
        return not filesystem.shrinks or size_bytes < filesystem.smallest_bytes

    async def replacement(self, backing: VolumeBacking, uid: str, size_bytes: int) -> VolumeBacking:
        """See the protocol. It has the same filesystem, which the options of the engine volume fix."""
        folder, filesystem = self._folder_of(uid, backing.name), _filesystem(backing)
        if size_bytes < filesystem.smallest_bytes:
            detail = f"{filesystem.name} needs at least {size_text(filesystem.smallest_bytes)}"
            raise SizeNotSupported(volume=backing.name, size_bytes=size_bytes, detail=detail)
        with volume_errors("create", backing.name, self._root, size_bytes):
            made = await run_to_end(folder.read_own, self.kind)
            if made is None:
                made = await _record_new(folder, filesystem, backing.name, size_bytes)
            await self._finish_create(folder, made)
        return made

    async def content(self, backing: VolumeBacking) -> str:
        """See the protocol: the inode number of the image, which a rename does not change."""
        with volume_errors("inspect", backing.name, self._root):
            return str((await run_to_end(self._folder(backing).image.stat)).st_ino)

    async def exchange(self, holder: VolumeBacking, other: VolumeBacking, content: str) -> None:
        """See the protocol. The images are exchanged with one rename, while no device uses them."""
        holder_folder, other_folder = self._folder(holder), self._folder(other)
        with volume_errors("exchange", holder.name, self._root):
            current = await self.content(holder)
            if current != content:
                if await self.content(other) != content:
                    raise BackingDamaged(f"neither {holder_folder.image} nor {other_folder.image} has inode {content}")
                await self._detach_all(holder.name, holder_folder, other_folder)
                await run_to_end(_exchange_images, holder_folder, other_folder)
            for folder, backing in ((holder_folder, holder), (other_folder, other)):
                await self._ensure_attached(folder)
                await run_to_end(folder.write, backing)

    async def _detach_all(self, name: str, *folders: BackingFolder) -> None:
        """Detach all devices or none. Raises VolumeInUse."""
        for folder in folders:
            if device := await loop_device.device_of(folder.image):
                # Without the link nothing can mount the device.
                await run_to_end(_unlink, folder.device)
                if not await loop_device.detach(device):
                    for each in folders:
                        await self._ensure_attached(each)
                    raise VolumeInUse(volume=name, holders=(f"a process or container that mounts {device}",))

    async def usage(self, backing: VolumeBacking) -> VolumeUsage:
        """See the protocol."""
        filesystem = _filesystem(backing)
        with volume_errors("inspect", backing.name, self._root):
            async with self._view(self._folder(backing), filesystem) as (view, mount):
                return await run_to_end(filesystem.usage, view.path(mount.point))

    @asynccontextmanager
    async def open_files(self, backing: VolumeBacking) -> AsyncIterator[str]:
        """See the protocol."""
        async with AsyncExitStack() as stack:
            # Errors in the body of the context belong to the caller and are not converted.
            with volume_errors("inspect", backing.name, self._root):
                entering = self._view(self._folder(backing), _filesystem(backing))
                view, mount = await stack.enter_async_context(entering)
            yield view.path(mount.point)

    async def files_location(self, backing: VolumeBacking) -> FilesLocation:
        """See private_mounts.MountableBackend."""
        with volume_errors("inspect", backing.name, self._root):
            mount = await self._mount(self._folder(backing), _filesystem(backing))
        return FilesLocation(path=mount.point, mount=mount)

    async def destroy(self, backing: VolumeBacking) -> None:
        """See the protocol."""
        folder = self._folder(backing)
        with volume_errors("delete", backing.name, self._root):
            if device := await loop_device.device_of(folder.image):
                # Without the link nothing can mount the device.
                await run_to_end(_unlink, folder.device)
                if not await loop_device.detach(device):
                    await run_to_end(_link, folder, device)
                    raise VolumeInUse(volume=backing.name, holders=(f"a process or container that mounts {device}",))
            await folder.remove()

    async def pool(self) -> PoolUsage:
        """See the protocol."""
        return await pool_usage(self._root)

    def _folder(self, backing: VolumeBacking) -> BackingFolder:
        return self._folder_of(backing.uid, backing.name)

    def _folder_of(self, uid: str, name: str) -> BackingFolder:
        with volume_errors("find", name, self._root):
            return BackingFolder(self._root, uid)

    async def _usable(self) -> tuple[list[Filesystem], list[str]]:
        """Return the filesystems that the host supports, and why it does not support the others."""
        reasons = [(one, await one.unavailable_reason()) for one in self._offered]
        usable = [one for one, reason in reasons if not reason]
        return usable, [f"{one.name}: {reason}" for one, reason in reasons if reason]

    async def _filesystem_for(self, name: str, size_bytes: int) -> Filesystem:
        usable, reasons = await self._usable()
        for one in usable:
            if size_bytes >= one.smallest_bytes:
                return one
        reasons += [f"{one.name} needs at least {size_text(one.smallest_bytes)}" for one in usable]
        raise SizeNotSupported(volume=name, size_bytes=size_bytes, detail="; ".join(reasons))

    async def _ensure_attached(self, folder: BackingFolder) -> str:
        """Attach the image and update the capacity and the link of its device; returns the device."""
        if not await run_to_end(folder.image.exists):
            raise BackingDamaged(f"{folder.image} does not exist")
        async with self._attach_lock:
            device = await loop_device.attach(folder.image)
            await loop_device.resize(device)
            await run_to_end(_remove_other_links, folder, device)
            await run_to_end(_link, folder, device)
        return device

    @asynccontextmanager
    async def _view(
        self, folder: BackingFolder, filesystem: Filesystem
    ) -> AsyncIterator[tuple[MountedView, DeviceMount]]:
        """Mount the filesystem of a backing in a private namespace."""
        mount = await self._mount(folder, filesystem)
        async with mount_privately([mount]) as view:
            yield view, mount

    async def _mount(self, folder: BackingFolder, filesystem: Filesystem) -> DeviceMount:
        """Return what must be mounted; the image is attached if it is not."""
        device = await loop_device.device_of(folder.image) or await self._ensure_attached(folder)
        await run_to_end(_mount_point, folder.mount)
        return DeviceMount(filesystem=filesystem.name, options=filesystem.options, device=device, point=folder.mount)


def remove_stale_links(folders: Sequence[BackingFolder]) -> None:
    """Remove links to devices of other images: after a reboot a device may belong to another volume."""
    for folder in folders:
        with suppress(FileNotFoundError):
            if not loop_device.is_backed_by(folder.image, str(folder.device.readlink())):
                _unlink(folder.device)


def _filesystem(backing: VolumeBacking) -> Filesystem:
    return next(one for one in FILESYSTEMS if one.name == backing.filesystem)


def _exchange_images(one: BackingFolder, other: BackingFolder) -> None:
    with open_directory(one.path, follow=True) as here, open_directory(other.path, follow=True) as there:
        if not rename_exchange(here, there, os.fsencode(one.image.name)):
            raise ProgramFailed("the host's kernel or filesystem cannot exchange two files")
        os.fsync(here)
        os.fsync(there)


async def _record_new(
    folder: BackingFolder,
    filesystem: Filesystem,
    name: str,
    size_bytes: int,
    identity: VolumeIdentity | None = None,
) -> VolumeBacking:
    """Record a backing before it is made."""
    backing = VolumeBacking(
        kind=VolumeBackendKind.LOOP,
        uid=folder.uid,
        name=name,
        engine_volume=f"gpudock-{folder.uid}",
        size_bytes=size_bytes,
        filesystem=filesystem.name,
        folder=str(folder.path),
        driver_options={"type": filesystem.name, "device": str(folder.device), "o": filesystem.options},
    )
    await run_to_end(folder.write, backing, identity)
    return backing


async def _make_image(folder: BackingFolder, filesystem: Filesystem, length: int) -> None:
    """Create the image under a temporary name, so that an image is complete or does not exist."""
    await run_to_end(_sparse_file, folder.unfinished, length)
    await filesystem.make(folder.unfinished, length)
    await run_to_end(_finish, folder)


def _sparse_file(path: Path, length: int) -> None:
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.truncate(length)


def _finish(folder: BackingFolder) -> None:
    with folder.unfinished.open("rb") as file:
        os.fsync(file.fileno())
    folder.unfinished.rename(folder.image)
    sync_directory(folder.path)


def _extend_image(image: Path, length: int) -> None:
    if image.stat().st_size < length:
        os.truncate(image, length)


def _mount_point(path: Path) -> None:
    # Mode 0: files that are written while nothing is mounted would be hidden by the mount.
    path.mkdir(mode=0, exist_ok=True)


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)


def _remove_other_links(folder: BackingFolder, device: str) -> None:
    """Remove the links of other backings to this device: the engine would mount this backing for them."""
    for other in backing_folders(folder.root):
        with suppress(FileNotFoundError):
            if other.uid != folder.uid and str(other.device.readlink()) == device:
                _unlink(other.device)


def _link(folder: BackingFolder, device: str) -> None:
    with suppress(FileNotFoundError):
        if str(folder.device.readlink()) == device:
            return
    new = folder.device.with_name("device.new")
    _unlink(new)
    new.symlink_to(device)
    new.rename(folder.device)
    sync_directory(folder.path)
