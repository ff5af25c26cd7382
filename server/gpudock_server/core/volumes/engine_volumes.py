"""Engine volumes behind volumes: their labels, and checks that they have the files that the records mean.

The engine silently creates an empty volume when it has to mount one that does not exist. gpudock therefore never mounts
a volume by name alone.
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
        """Create the engine volume of a backing, or find the one that was created before.

        The labels mark it as gpudock's; from them reconcile restores the record of the volume if the store loses it.
        """
        labels = {LABEL_UID: backing.uid, LABEL_NAME: backing.name, LABEL_NODE: self.node}
        if identity is not None:
            labels[LABEL_VOLUME] = identity.model_dump_json()
        return await self.engine.create_volume(
            backing.engine_volume, labels=labels, driver_options=backing.driver_options
        )

    async def ensure(self, volume: Volume) -> str:
        """The name of the engine volume that has a volume's files.

        An engine volume that was removed outside gpudock is created again if the files are in a backing of gpudock's.
        Raises VolumeFailed if they were in the engine volume itself.
        """
        backing = volume.backing
        if backing is None:
            raise VolumeFailed(volume=volume.name, call="mount", detail=f"it is {volume.state}; it must be READY")
        found = await self.engine.inspect_volume(backing.engine_volume)
        if found is not None:
            _require_no_hazard(volume, found)
            return backing.engine_volume
        if backing.kind is VolumeBackendKind.PLAIN:
            detail = (
                f"engine volume {backing.engine_volume} and its files were removed outside gpudock;"
                f" delete volume {volume.name} with force"
            )
            raise VolumeFailed(volume=volume.name, call="mount", detail=detail)
        await self.create(backing, volume.identity)
        return backing.engine_volume

    async def require_no_hazards(self, volumes: Iterable[Volume]) -> None:
        """Raise VolumeFailed if an engine volume is part of the host: older versions allowed to adopt these."""
        for volume in volumes:
            if volume.backing is not None and volume.backing.kind is VolumeBackendKind.PLAIN:
                found = await self.engine.inspect_volume(volume.backing.engine_volume)
                if found is not None:
                    _require_no_hazard(volume, found)


def identity_of(volume: EngineVolume) -> VolumeIdentity | None:
    """The identity in LABEL_VOLUME; None if an older version created the volume, or if it cannot be read."""
    try:
        return VolumeIdentity.model_validate_json(volume.labels.get(LABEL_VOLUME, ""))
    except ValidationError:
        return None


def _require_no_hazard(volume: Volume, found: EngineVolume) -> None:
    # For the other kinds, gpudock itself sets the options.
    if found.hazard and volume.backing is not None and volume.backing.kind is VolumeBackendKind.PLAIN:
        detail = f"engine volume {found.name}: {found.hazard}; mount it as a host path below allowed_host_paths"
        raise VolumeFailed(volume=volume.name, call="mount", detail=detail)


def require_same_engine_volumes(
    container: str,
    engine_container: EngineContainer,
    before: Sequence[Mount],
    after: Sequence[Mount],
    volumes: Iterable[Volume],
) -> None:
    """Raise VolumeDiffers if a volume that stays mounted would become another engine volume than it is now."""
    by_name = {volume.name: volume.backing.engine_volume for volume in volumes if volume.backing}
    mounted_after = {mount.volume for mount in after if mount.volume}
    for name, engine_volume in mounted_engine_volumes(engine_container, before).items():
        recorded = by_name.get(name, engine_volume)
        if name in mounted_after and recorded != engine_volume:
            raise VolumeDiffers(
                container=container, volume=name, engine_volume=engine_volume, recorded_engine_volume=recorded
            )


def mounted_engine_volumes(engine_container: EngineContainer, mounts: Sequence[Mount]) -> Mapping[str, str]:
    """Map each volume to the engine volume that an engine container mounts for it."""
    return {
        mount.volume: engine_container.volumes[mount.target]
        for mount in mounts
        if mount.volume and mount.target in engine_container.volumes
    }
