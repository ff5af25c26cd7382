"""Checks of a spec's mounts: volumes must exist and stay, host paths must be allowed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpudock_server.core.volumes.engine_volumes import EngineVolumes
from gpudock_server.core.volumes.resource import VolumeResource
from gpudock_server.errors import MountedVolumeNotFound, VolumeFailed
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.spec import Mount
from gpudock_server.model.store_changes import RequireUnlocked, RequireVolumeVersion, StoreChange
from gpudock_server.model.volume import VolumeState
from gpudock_server.ports import HostPaths, VolumeView


@dataclass(frozen=True, slots=True)
class Mounts:
    """Checks the mounts of specs on this node."""

    volumes: VolumeResource
    engine_volumes: EngineVolumes
    host_paths: HostPaths

    async def check(self, mounts: Sequence[Mount], *, previous: Sequence[Mount] = ()) -> tuple[VolumeView, ...]:
        """Check mounts; returns the mounted volumes, each once.

        Every volume must exist on this node. Every host path must be allowed and have no symbolic link in it. No
        operation may hold the lock of a volume, except of those in `previous`: a mounted volume cannot be deleted.
        """
        before = _volumes_of(previous)
        await self.host_paths.check([mount.host_path for mount in mounts if mount.host_path])
        views = tuple([await self._find_mountable(name, busy=name in before) for name in _volumes_of(mounts)])
        await self.engine_volumes.require_no_hazards([view.volume for view in views])
        return views

    async def ensure_engine_volumes(self, mounts: Sequence[Mount]) -> dict[str, str]:
        """Map each volume to its engine volume, created if necessary. Raises VolumeNotFound, VolumeFailed."""
        found = {name: await self._find_mountable(name, busy=True, held=True) for name in _volumes_of(mounts)}
        return {name: await self.engine_volumes.ensure(view.volume) for name, view in found.items()}

    async def check_before_start(self, mounts: Sequence[Mount]) -> None:
        """Check that mounts which the engine resolves again at every start are still allowed.

        Raises HostPathForbidden, HostPathFailed, VolumeFailed.
        """
        await self.host_paths.check([mount.host_path for mount in mounts if mount.host_path])
        views = [await self.volumes.view(name) for name in _volumes_of(mounts)]
        await self.engine_volumes.require_no_hazards([view.volume for view in views if view is not None])

    async def _find_mountable(self, name: str, *, busy: bool, held: bool = False) -> VolumeView:
        """A volume of this node that can be mounted.

        `busy`: an operation may hold its lock. `held`: a recorded spec mounts it already.
        """
        view = await self.volumes.view(name)
        if view is None:
            raise await self.volumes.not_found_error(name, MountedVolumeNotFound)
        volume = view.volume
        await self.volumes.require_this_node(volume)
        if view.operation_id and not busy:
            raise self.volumes.busy_error(name, view.operation_id)
        # A deletion that begins after the spec was recorded finds that mount and fails before it removes anything.
        deletion_will_fail = held and volume.state is VolumeState.DELETING and view.operation_id
        if volume.state is not VolumeState.READY and not deletion_will_fail:
            detail = f"it is {volume.state}; it must be READY"
            raise VolumeFailed(volume=name, call="mount", detail=detail)
        return view


def require_unchanged(views: Iterable[VolumeView]) -> list[StoreChange]:
    """Conditions of a transaction: these volumes are unchanged and unlocked."""
    return [
        change
        for view in views
        for change in (
            RequireUnlocked(ResourceKind.VOLUME, view.volume.name),
            RequireVolumeVersion(view.volume.name, view.version),
        )
    ]


def _volumes_of(mounts: Sequence[Mount]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(mount.volume for mount in mounts if mount.volume))
