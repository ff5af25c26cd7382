"""Usage of the filesystem that holds all volume backings, of any kind."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from gpudock_server.adapters.host.subprocesses import ProgramFailed
from gpudock_server.adapters.host.threads import run_to_end
from gpudock_server.adapters.volumes import quota_table
from gpudock_server.adapters.volumes.backing_folder import BackingFolder, recorded_backings
from gpudock_server.model.volume import PoolUsage, VolumeBackendKind, VolumeBacking

_BLOCK_BYTES: Final = 512


async def pool_usage(root: Path) -> PoolUsage:
    """Return the usage of the pool below `root`, which need not exist yet."""
    project_usage: dict[int, int] = {}
    # A host without quotas has no backings with a project id, and need not have xfs_quota.
    if any(await run_to_end(recorded_ids, root)):
        with suppress(ProgramFailed, OSError):
            project_usage = await quota_table.project_usage(await quota_table.filesystem_of(root))
    return await run_to_end(_usage, root, project_usage)


def recorded_ids(root: Path) -> set[int]:
    """Return the project ids of all backings; 0 for kinds without one."""
    return {backing.project_id for backing in recorded_backings(root)}


def _usage(root: Path, project_usage: Mapping[int, int]) -> PoolUsage:
    existing = next(path for path in (root, *root.parents) if path.exists())
    filesystem = os.statvfs(existing)
    promised = allocated = 0
    for backing in recorded_backings(root):
        promised += backing.size_bytes
        # In the quota table id 0 is the sum of everything without a project.
        taken = project_usage.get(backing.project_id) if backing.project_id else None
        allocated += _allocated(BackingFolder(root, backing.uid), backing) if taken is None else taken
    return PoolUsage(
        total_bytes=filesystem.f_blocks * filesystem.f_frsize,
        free_bytes=filesystem.f_bfree * filesystem.f_frsize,
        promised_bytes=promised,
        allocated_bytes=allocated,
    )


def _allocated(folder: BackingFolder, backing: VolumeBacking) -> int:
    with suppress(FileNotFoundError):
        if backing.kind is VolumeBackendKind.LOOP:
            return folder.image.stat().st_blocks * _BLOCK_BYTES
        # Wrong for a folder with a quota in a nearly full pool: newer kernels report the free space of the pool.
        inside = os.statvfs(folder.data)
        return (inside.f_blocks - inside.f_bfree) * inside.f_frsize
    return 0
