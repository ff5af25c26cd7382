"""Project quota volumes: folders with a limit on XFS or ext4, which can grow and shrink in place.

The limits are set with xfs_quota and xfs_io (package xfsprogs), which support both filesystems. A project id belongs to
one backing; it is recorded before it is used, and free again after its limits are removed from the quota table.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from gpudock_server.adapters.host.subprocesses import ProgramFailed, missing_programs, run
from gpudock_server.adapters.host.threads import run_to_end
from gpudock_server.adapters.volumes.backing_folder import BackingDamaged, BackingFolder, backings_on_disk
from gpudock_server.adapters.volumes.failures import require_fitting, volume_errors
from gpudock_server.adapters.volumes.in_place import InPlaceBackend
from gpudock_server.adapters.volumes.pool import pool_usage, recorded_ids
from gpudock_server.adapters.volumes.private_mounts import FilesLocation
from gpudock_server.adapters.volumes.quota_table import (
    BLOCK_BYTES,
    MountedFilesystem,
    filesystem_of,
    is_enforced,
    project_usage,
    round_up,
    set_limit,
)
from gpudock_server.errors import SizeNotSupported
from gpudock_server.model.volume import (
    BackingOnDisk,
    PoolUsage,
    VolumeBackendKind,
    VolumeBacking,
    VolumeIdentity,
    VolumeUsage,
)

# Far from ids that people choose, and from those of dockerd, which counts up from the id of its data folder.
PROJECT_IDS: Final = range(0x6770_0000, 0x6778_0000)
_FILESYSTEMS: Final = ("xfs", "ext4")
_OPTIONS: Final = frozenset({"pquota", "prjquota"})
_ENABLE_ADVICE: Final = (
    "mount it with prjquota (XFS on /: kernel parameter rootflags=prjquota; ext4: first `tune2fs -O quota,project -Q"
    " prjquota` while it is unmounted), on a kernel with quota support"
)


class ProjectQuotaBackend(InPlaceBackend):
    """Implements ports.VolumeBackend.

    `root` is the folder of all backings, on a filesystem mounted with project quotas; `local`: the engine runs on this
    host; `project_ids` are the ids that may be assigned.
    """

    def __init__(self, root: Path, *, local: bool, project_ids: range = PROJECT_IDS) -> None:
        self._root = root
        self._local = local
        self._project_ids = project_ids
        # Serializes choosing and recording an id, and releasing one.
        self._project_id_lock = asyncio.Lock()

    @property
    def kind(self) -> VolumeBackendKind:
        """See the protocol."""
        return VolumeBackendKind.PROJECT_QUOTA

    async def unavailable_reason(self) -> str:
        """See the protocol."""
        if not self._local:
            return "the engine runs on another host"
        if os.geteuid() != 0:
            return "the daemon does not run as root"
        if lacking := missing_programs("xfs_quota", "xfs_io", "findmnt"):
            return lacking
        try:
            return await self._no_quotas()
        except ProgramFailed as error:
            return str(error)

    async def _no_quotas(self) -> str:
        mount = await self._mount()
        location = f"{self._root} is on {mount.point} ({mount.filesystem})"
        if mount.filesystem not in _FILESYSTEMS:
            return f"{location}; project quotas need xfs or ext4"
        if not mount.options & _OPTIONS:
            return f"{location}, which is mounted without project quotas: {_ENABLE_ADVICE}"
        return "" if await is_enforced(mount) else f"{location}, where project quotas are not enforced"

    async def create(
        self, uid: str, name: str, size_bytes: int, identity: VolumeIdentity | None = None
    ) -> VolumeBacking:
        """See the protocol."""
        folder = self._folder_of(uid, name)
        with volume_errors("create", name, self._root):
            backing = await run_to_end(folder.read_own, self.kind)
            if backing is None:
                if reason := await self.unavailable_reason():
                    raise SizeNotSupported(volume=name, size_bytes=size_bytes, detail=reason)
                async with self._project_id_lock:
                    backing = VolumeBacking(
                        kind=self.kind,
                        uid=uid,
                        name=name,
                        engine_volume=f"gpudock-{uid}",
                        size_bytes=size_bytes,
                        filesystem=(await self._mount()).filesystem,
                        folder=str(folder.path),
                        project_id=await self._free_id(),
                        driver_options={"type": "none", "o": "bind", "device": str(folder.data)},
                    )
                    await run_to_end(folder.write, backing, identity)
            await run_to_end(_make_folder, folder.data)
            await self._mark(folder, backing)
            await self._limit(folder, backing, backing.size_bytes)
        return backing

    async def attach(self, backing: VolumeBacking) -> None:
        """See the protocol. Sets the limit again, because a folder without its limit has no size."""
        folder = self._folder(backing)
        with volume_errors("attach", backing.name, self._root):
            if reason := await self.unavailable_reason():
                raise BackingDamaged(reason)
            if not await run_to_end(folder.data.is_dir):
                raise BackingDamaged(f"{folder.data} does not exist")
            await self._limit(folder, backing, backing.size_bytes)

    async def backings_on_disk(self) -> tuple[BackingOnDisk, ...]:
        """See the protocol."""
        with volume_errors("list", "", self._root):
            return await run_to_end(backings_on_disk, self._root, self.kind) if self._local else ()

    async def grow(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        """See the protocol."""
        folder = self._folder(backing)
        with volume_errors("grow", backing.name, self._root):
            await self._limit(folder, backing, size_bytes)
            return await folder.record_size(backing, size_bytes)

    async def shrink(self, backing: VolumeBacking, size_bytes: int) -> VolumeBacking:
        """See the protocol. If data was written between the check and the new limit, the old limit is restored."""
        folder = self._folder(backing)
        require_fitting(backing, await self.usage(backing), size_bytes)
        with volume_errors("shrink", backing.name, self._root):
            mount = await self._mount()
            await set_limit(mount, backing.project_id, size_bytes)
            usage = await self._usage(folder, backing)
            # statfs reports at most the limit, so a full volume may hold more: restore the old limit to measure it.
            if usage.used_bytes >= round_up(size_bytes):
                await set_limit(mount, backing.project_id, backing.size_bytes)
                require_fitting(backing, await self._usage(folder, backing), size_bytes)
                await set_limit(mount, backing.project_id, size_bytes)
            return await folder.record_size(backing, size_bytes)

    async def usage(self, backing: VolumeBacking) -> VolumeUsage:
        """See the protocol."""
        with volume_errors("inspect", backing.name, self._root):
            return await self._usage(self._folder(backing), backing)

    @asynccontextmanager
    async def open_files(self, backing: VolumeBacking) -> AsyncIterator[str]:
        """See the protocol. Nothing is opened or mounted, so the volume does not become busy."""
        yield str(self._folder(backing).data)

    async def files_location(self, backing: VolumeBacking) -> FilesLocation:
        """See private_mounts.MountableBackend."""
        return FilesLocation(path=self._folder(backing).data)

    async def destroy(self, backing: VolumeBacking) -> None:
        """See the protocol. The caller removes the engine volume first, which fails while a container uses it."""
        folder = self._folder(backing)
        with volume_errors("delete", backing.name, self._root):
            # After an interrupted creation the caller knows only the uid.
            recorded = None if backing.project_id else await run_to_end(folder.read)
            project_id = recorded.project_id if recorded else backing.project_id
            await folder.remove()
            async with self._project_id_lock:
                # When the call is repeated much later, another backing may have the id.
                if project_id and project_id not in await run_to_end(recorded_ids, self._root):
                    await set_limit(await self._mount(), project_id, 0)

    async def pool(self) -> PoolUsage:
        """See the protocol."""
        return await pool_usage(self._root)

    def _folder(self, backing: VolumeBacking) -> BackingFolder:
        return self._folder_of(backing.uid, backing.name)

    def _folder_of(self, uid: str, name: str) -> BackingFolder:
        with volume_errors("find", name, self._root):
            return BackingFolder(self._root, uid)

    async def _mount(self) -> MountedFilesystem:
        return await filesystem_of(self._root)

    async def _free_id(self) -> int:
        """Return an id that neither a backing nor the quota table has. Raises ProgramFailed."""
        taken = set(await project_usage(await self._mount())) | await run_to_end(recorded_ids, self._root)
        for number in self._project_ids:
            if number not in taken:
                return number
        raise ProgramFailed(f"all {len(self._project_ids)} project ids are in use")

    async def _usage(self, folder: BackingFolder, backing: VolumeBacking) -> VolumeUsage:
        """Return the usage from statfs, or from the quota table if statfs reports a nearly full pool instead."""
        shown, pool = await run_to_end(_statvfs_both, folder.data, self._root)
        used = (shown.f_blocks - shown.f_bfree) * shown.f_frsize
        if shown.f_bfree >= pool.f_bfree:
            used = (await project_usage(await self._mount())).get(backing.project_id, 0)
        return VolumeUsage(
            used_bytes=used, size_bytes=shown.f_blocks * shown.f_frsize, minimum_bytes=max(used, BLOCK_BYTES)
        )

    async def _mark(self, folder: BackingFolder, backing: VolumeBacking) -> None:
        """Set the project id of the folder, which new files in it inherit."""
        await run("xfs_io", "-r", "-c", f"chproj {backing.project_id}", "-c", "chattr +P", str(folder.data))
        shown = await run("xfs_io", "-r", "-c", "lsproj", str(folder.data))
        if shown.split() != ["projid", "=", str(backing.project_id)]:
            raise ProgramFailed(f"{folder.data} has project id {shown.strip()!r}, expected {backing.project_id}")

    async def _limit(self, folder: BackingFolder, backing: VolumeBacking, size_bytes: int) -> None:
        await set_limit(await self._mount(), backing.project_id, size_bytes)
        shown = await run_to_end(os.statvfs, folder.data)
        if (shows := shown.f_blocks * shown.f_frsize) != round_up(size_bytes):
            raise ProgramFailed(f"{folder.data} reports {shows} bytes, expected {size_bytes}")


def _statvfs_both(data: Path, root: Path) -> tuple[os.statvfs_result, os.statvfs_result]:
    return os.statvfs(data), os.statvfs(root)


def _make_folder(data: Path) -> None:
    data.mkdir(mode=0o755, exist_ok=True)
    data.chmod(0o755)
