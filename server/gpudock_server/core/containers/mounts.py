"""What a container's spec mounts: volumes that must exist and stay, and host paths that must be allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from gpudock_server.core.containers.engine_volumes import (
    ensure_engine_volume,
    mounted_engine_volumes,
    require_no_hazards,
)
from gpudock_server.core.containers.world import World
from gpudock_server.core.listings import read_all_pages
from gpudock_server.errors import (
    MountedVolumeNotFound,
    VolumeBusy,
    VolumeFailed,
    VolumeNotAdopted,
    VolumeNotFound,
    VolumeOnOtherNode,
)
from gpudock_server.model.engine import LABEL_NAME, LABEL_NODE
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.spec import Mount
from gpudock_server.model.store_changes import RequireUnlocked, RequireVolumeVersion, StoreChange
from gpudock_server.model.volume import Volume, VolumeState
from gpudock_server.ports import ContainerView, Store, VolumeView

# How many names an error lists of what there is instead.
_MAX_SUGGESTIONS = 10


def closest_names(name: str, names: Sequence[str]) -> tuple[str, ...]:
    """Those of `names` that someone who wrote `name` may have meant, the likeliest first; at most _MAX_SUGGESTIONS."""
    return tuple(difflib.get_close_matches(name, names, n=_MAX_SUGGESTIONS, cutoff=0.0))


async def check_mounts(world: World, mounts: Sequence[Mount], *, had: Sequence[Mount] = ()) -> tuple[VolumeView, ...]:
    """The volumes that are mounted, each once.

    Every volume must exist on this node, and every host path below the allow-list, without a symbolic link in it. No
    operation may be at work on a volume, but for those that were mounted before (`had`), which nobody can delete.
    """
    before = _volumes_of(had)
    await world.host_paths.check([mount.host_path for mount in mounts if mount.host_path])
    views = tuple([await _find_mountable(world, name, busy=name in before) for name in _volumes_of(mounts)])
    await require_no_hazards(world, [view.volume for view in views])
    return views


def require_unchanged(views: Iterable[VolumeView]) -> list[StoreChange]:
    """Conditions of a transaction: these volumes are as they were seen, and nobody is about to delete them."""
    return [
        change
        for view in views
        for change in (
            RequireUnlocked(ResourceKind.VOLUME, view.volume.name),
            RequireVolumeVersion(view.volume.name, view.version),
        )
    ]


async def ensure_engine_volumes(world: World, mounts: Sequence[Mount]) -> dict[str, str]:
    """Volume -> what it is called by the engine, which has it by then. Raises VolumeNotFound, VolumeFailed."""
    found = {name: await _find_mountable(world, name, busy=True, held=True) for name in _volumes_of(mounts)}
    return {name: await ensure_engine_volume(world, view.volume) for name, view in found.items()}


async def check_before_start(world: World, mounts: Sequence[Mount]) -> None:
    """What an engine container that exists mounts is still what may be mounted, as far as the engine resolves it anew.

    Raises HostPathForbidden, HostPathFailed, VolumeFailed.
    """
    await world.host_paths.check([mount.host_path for mount in mounts if mount.host_path])
    views = [await world.store.volume(name) for name in _volumes_of(mounts)]
    await require_no_hazards(world, [view.volume for view in views if view is not None])


def _volumes_of(mounts: Sequence[Mount]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(mount.volume for mount in mounts if mount.volume))


async def _find_mountable(world: World, name: str, *, busy: bool, held: bool = False) -> VolumeView:
    """A volume of this node that can be mounted. `held`: a spec on record names it already."""
    view = await world.store.volume(name)
    if view is None:
        raise await volume_not_found(world, name, MountedVolumeNotFound)
    volume = view.volume
    if volume.node != world.node:
        raise VolumeOnOtherNode(volume=name, node=volume.node, address=await node_address(world, volume.node))
    if view.operation_id and not busy:
        raise VolumeBusy(volume=name, operation_id=view.operation_id)
    # A deletion that began behind such a spec was recorded sees it, and gives up before it has done anything.
    gives_up = held and volume.state is VolumeState.DELETING and view.operation_id
    if volume.state is not VolumeState.READY and not gives_up:
        detail = f"it is {volume.state}; one that is DELETING can only be deleted"
        raise VolumeFailed(volume=name, call="mount", detail=detail)
    return view


async def node_address(world: World, node: str) -> str:
    """Where a node's daemon is reached; empty where none is alive."""
    return next((one.address for one in await world.store.nodes() if one.node == node), "")


async def volume_not_found(world: World, name: str, kind: type[VolumeNotFound] = VolumeNotFound) -> VolumeNotFound:
    """The error that names the likeliest of the volumes that there are, and says what can be done."""
    known = closest_names(name, [volume.name for volume in await all_volumes(world.store)])
    found = await world.engine.inspect_volume(name)
    if found is not None and world.adoption.allow(found) and not (found.anonymous or found.hazard):
        kind = VolumeNotAdopted
    return kind(volume=name, available=known)


async def all_volumes(store: Store) -> tuple[Volume, ...]:
    """Every volume of every node."""
    return tuple(view.volume for view in (await read_all_pages(store.volumes)).items)


async def engine_volume_without_record(world: World, name: str) -> str:
    """An engine volume that has the files of a volume of this name, which no record has; empty where there is none."""
    labelled = await world.engine.find_volumes({LABEL_NAME: name, LABEL_NODE: world.node})
    if labelled:
        return labelled[0].name
    for view in await containers_mounting(world.store, name):
        container = view.container
        if container.node == world.node and container.engine is not None:
            seen = await world.engine.inspect(container.engine.engine_id)
            if seen is not None and (used := mounted_engine_volumes(seen, container.spec.mounts).get(name)):
                return used
    return ""


async def all_containers(store: Store) -> tuple[ContainerView, ...]:
    """Every container of every node."""
    return (await read_all_pages(store.containers)).items


async def containers_mounting(store: Store, volume: str) -> tuple[ContainerView, ...]:
    """The containers whose specs mount a volume, by name: the one truth of what is attached."""
    return tuple(view for view in await all_containers(store) if mounts_volume(view, volume))


def mounts_volume(view: ContainerView, volume: str) -> bool:
    """Whether a container's spec mounts a volume."""
    return any(mount.volume == volume for mount in view.container.spec.mounts)
