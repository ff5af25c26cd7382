"""The engine volumes behind volumes: their labels, and that the files in them are the ones that a record means.

An engine that is asked to mount a volume which it does not have makes an empty one without a word. Nothing is
therefore mounted by name alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from gpudock_server.errors import VolumeDiffers, VolumeFailed
from gpudock_server.model.engine import (
    LABEL_NAME,
    LABEL_NODE,
    LABEL_UID,
    LABEL_VOLUME,
    EngineContainer,
    EngineVolume,
)
from gpudock_server.model.spec import Mount
from gpudock_server.model.volume import Volume, VolumeBackendKind, VolumeBacking, VolumeIdentity
from gpudock_server.ports import Engine


@dataclass(frozen=True, slots=True)
class EngineVolumes:
    """Creates, finds and checks the engine volumes of a node."""

    engine: Engine
    node: str

    async def create(self, backing: VolumeBacking, identity: VolumeIdentity | None) -> EngineVolume:
        """Create the engine volume of a backing, or find the one that was created for it.

        Its labels mark it as gpudock's, and the record of the volume is made up from them if the store loses it.
        """
        labels = {LABEL_UID: backing.uid, LABEL_NAME: backing.name, LABEL_NODE: self.node}
        if identity is not None:
            labels[LABEL_VOLUME] = identity.model_dump_json()
        return await self.engine.create_volume(
            backing.engine_volume, labels=labels, driver_options=backing.driver_options
        )

    async def ensure(self, volume: Volume) -> str:
        """The name of the engine volume that leads to a volume's files.

        One that was removed outside gpudock is made again where the files are in a store of gpudock's. Raises
        VolumeFailed where they were in the engine volume itself.
        """
        backing = volume.backing
        if backing is None:
            raise VolumeFailed(volume=volume.name, call="mount", detail=f"it is {volume.state}")
        found = await self.engine.inspect_volume(backing.engine_volume)
        if found is not None:
            _require_no_hazard(volume, found)
            return backing.engine_volume
        if backing.kind is VolumeBackendKind.PLAIN:
            detail = (
                f"engine volume {backing.engine_volume} was removed outside gpudock, and its files with it;"
                f" delete volume {volume.name} with force to go on without it"
            )
            raise VolumeFailed(volume=volume.name, call="mount", detail=detail)
        await self.create(backing, volume.identity)
        return backing.engine_volume

    async def require_no_hazards(self, volumes: Iterable[Volume]) -> None:
        """Raises VolumeFailed where one of them is a part of the host: an older version let such be adopted."""
        for volume in volumes:
            if volume.backing is not None and volume.backing.kind is VolumeBackendKind.PLAIN:
                found = await self.engine.inspect_volume(volume.backing.engine_volume)
                if found is not None:
                    _require_no_hazard(volume, found)


def identity_of(found: EngineVolume) -> VolumeIdentity | None:
    """What LABEL_VOLUME says; None where an older version made it, or it cannot be read."""
    try:
        return VolumeIdentity.model_validate_json(found.labels.get(LABEL_VOLUME, ""))
    except ValidationError:
        return None


def _require_no_hazard(volume: Volume, found: EngineVolume) -> None:
    # Of the other kinds the options are gpudock's own.
    if found.hazard and volume.backing is not None and volume.backing.kind is VolumeBackendKind.PLAIN:
        detail = f"engine volume {found.name}: {found.hazard}; mount it as a host path below allowed_host_paths"
        raise VolumeFailed(volume=volume.name, call="mount", detail=detail)


def require_same_engine_volumes(
    container: str, seen: EngineContainer, had: Sequence[Mount], wanted: Sequence[Mount], volumes: Iterable[Volume]
) -> None:
    """Raises VolumeDiffers where a volume that stays mounted would be another engine volume than it is now."""
    by_name = {volume.name: volume.backing.engine_volume for volume in volumes if volume.backing}
    staying = {mount.volume for mount in wanted if mount.volume}
    for name, engine_volume in mounted_engine_volumes(seen, had).items():
        recorded = by_name.get(name, engine_volume)
        if name in staying and recorded != engine_volume:
            raise VolumeDiffers(
                container=container, volume=name, engine_volume=engine_volume, recorded_engine_volume=recorded
            )


def mounted_engine_volumes(seen: EngineContainer, mounts: Sequence[Mount]) -> Mapping[str, str]:
    """Volume -> the engine volume that an engine container has mounted for it."""
    return {
        mount.volume: seen.volumes[mount.target] for mount in mounts if mount.volume and mount.target in seen.volumes
    }
