"""Calls about engine volumes."""

from __future__ import annotations

import json
from collections.abc import Mapping

from gpudock_server.adapters.docker import translate
from gpudock_server.adapters.docker.connection import Connection, path_segment
from gpudock_server.adapters.docker.failures import NOT_FOUND, engine_errors, is_name_conflict
from gpudock_server.adapters.docker.translate import Json
from gpudock_server.errors import EngineRejected, VolumeExists
from gpudock_server.model.engine import LABEL_UID, EngineVolume


class VolumeCalls:
    """The part of DockerEngine that is about engine volumes."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def volume_names(self) -> tuple[str, ...]:
        """The names of all volumes."""
        call = "list volumes"
        answer: Json = await self._connection.call(call, "GET", "volumes")
        with engine_errors(call):
            return tuple(str(volume["Name"]) for volume in answer["Volumes"] or ())

    async def find_volumes(self, labels: Mapping[str, str]) -> tuple[EngineVolume, ...]:
        """The volumes that have all these labels."""
        call = "list volumes"
        filters = {"label": [f"{key}={value}" for key, value in labels.items()]}
        params = {"filters": json.dumps(filters)}
        answer: Json = await self._connection.call(call, "GET", "volumes", params=params)
        with engine_errors(call):
            return tuple(translate.volume(volume) for volume in answer["Volumes"] or ())

    async def create_volume(
        self, name: str, *, labels: Mapping[str, str], driver_options: Mapping[str, str]
    ) -> EngineVolume:
        """Create a volume of the `local` driver, or return the existing one with the same LABEL_UID and options.

        Raises VolumeExists for any other volume of this name: the engine answers a create request for an existing name
        with the existing volume, with any options and labels.
        """
        call = "create a volume"
        body = {"Name": name, "Driver": "local", "DriverOpts": dict(driver_options), "Labels": dict(labels)}
        try:
            answer: Json = await self._connection.call(call, "POST", "volumes/create", body=body)
        except EngineRejected as rejection:
            # A volume of another driver has the name.
            if is_name_conflict(rejection):
                raise VolumeExists(volume=name) from rejection
            raise
        with engine_errors(call):
            volume = translate.volume(answer)
        if volume.labels.get(LABEL_UID, "") != labels[LABEL_UID] or volume.options != dict(driver_options):
            raise VolumeExists(volume=name)
        return volume

    async def inspect_volume(self, name: str) -> EngineVolume | None:
        """One volume; None if the engine has no volume of this name."""
        call = "inspect a volume"
        try:
            answer: Json = await self._connection.call(call, "GET", f"volumes/{path_segment(name)}")
        except EngineRejected as rejection:
            if rejection.status == NOT_FOUND:
                return None
            raise
        with engine_errors(call):
            return translate.volume(answer)

    async def remove_volume(self, name: str) -> None:
        """Remove a volume. A missing volume is no error; a volume in use raises EngineRejected."""
        await self._connection.call_idempotent(
            "remove a volume", "DELETE", f"volumes/{path_segment(name)}", done_statuses=(NOT_FOUND,)
        )
