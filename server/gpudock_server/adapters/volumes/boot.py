"""Attach volumes after a reboot, before any container starts; needs neither the engine nor etcd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gpudock_server.adapters.host.threads import run_to_end
from gpudock_server.adapters.volumes.backing_folder import BackingDamaged, BackingFolder, backing_folders
from gpudock_server.adapters.volumes.loop import LoopBackend, remove_stale_links
from gpudock_server.adapters.volumes.quota import ProjectQuotaBackend
from gpudock_server.errors import DiskFull, VolumeFailed
from gpudock_server.model.volume import VolumeBackendKind
from gpudock_server.ports import VolumeBackend


@dataclass(frozen=True, slots=True)
class AttachFailure:
    """A volume that could not be attached, and why; containers that mount it will not start."""

    uid: str
    detail: str


async def attach_all_volumes(root: Path) -> tuple[AttachFailure, ...]:
    """Attach all volumes of `root`; returns the failures. Attached volumes are left as they are."""
    folders = await run_to_end(lambda: tuple(backing_folders(root)))
    # All links first: a link of the last boot may lead to a device that another volume gets now.
    await run_to_end(remove_stale_links, folders)
    sized: Mapping[VolumeBackendKind, VolumeBackend] = {
        VolumeBackendKind.LOOP: LoopBackend(root, local=True),
        VolumeBackendKind.PROJECT_QUOTA: ProjectQuotaBackend(root, local=True),
    }
    problems = [(folder.uid, await _attach(folder, sized)) for folder in folders]
    return tuple(AttachFailure(uid=uid, detail=detail) for uid, detail in problems if detail)


async def _attach(folder: BackingFolder, sized: Mapping[VolumeBackendKind, VolumeBackend]) -> str:
    try:
        backing = await run_to_end(folder.read)
        if backing is not None and backing.kind in sized:
            await sized[backing.kind].attach(backing)
    except (BackingDamaged, VolumeFailed, DiskFull) as error:
        return str(error)
    return ""
