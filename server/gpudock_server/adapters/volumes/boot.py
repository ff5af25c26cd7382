"""Making volumes ready after a reboot, before any container starts: no engine and no etcd has to answer for it."""

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
    """A store that could not be made ready, and why. What mounts it will not start."""

    uid: str
    detail: str


async def attach_all_volumes(root: Path) -> tuple[AttachFailure, ...]:
    """Attach every volume of `root`; what is attached stays as it is. One that fails does not keep others from it."""
    folders = await run_to_end(lambda: tuple(backing_folders(root)))
    # All the links first: one that is still of the last boot may lead to what is about to be another store's device.
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
