"""The state of a host: files read from the disk, GPUs and mounts from the engine, the rest by the API."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from gpudock.v1 import container_pb2, container_service_pb2, volume_pb2, volume_service_pb2

from tests.calls import Caller
from tests.faults.invariants import gpus_of
from tests.rig import Rig
from tests.stateful.model import GROUP, Files


def files_of(layer: Path) -> Files:
    """The files of the test in a writable layer or a snapshot, and GROUP if it is deleted there."""
    work = layer / "work"
    found = _texts_in(work) if work.is_dir() else {}
    group = layer / GROUP.lstrip("/")
    if group.is_symlink() or group.exists():
        status = group.lstat()
        assert stat.S_ISCHR(status.st_mode), "GROUP is a file of the image, which tests only delete"
        assert status.st_rdev == 0
        found[GROUP] = "deleted"
    return found


def _texts_in(folder: Path) -> Files:
    return {entry.name: Path(entry.path).read_text() for entry in os.scandir(folder)}


def writable_layer(inspected: dict[str, Any]) -> Path:
    """The folder of an engine container's writable layer."""
    return Path(inspected["GraphDriver"]["Data"]["UpperDir"])


@dataclass(frozen=True)
class EngineView:
    """The inspected engine containers of one node, by the name of their container."""

    by_name: dict[str, list[dict[str, Any]]]

    @classmethod
    def read(cls, rig: Rig, node: str) -> EngineView:
        """Read all engine containers of a node."""
        by_name: dict[str, list[dict[str, Any]]] = {}
        query = {"all": "1", "filters": f'{{"label":["gpudock.node={node}"]}}'}
        for listed in rig.engine.call("GET", "/containers/json", query=query):
            inspected = rig.engine.call("GET", f"/containers/{listed['Id']}/json")
            by_name.setdefault(inspected["Config"]["Labels"]["gpudock.name"], []).append(inspected)
        return cls(by_name)

    @property
    def users_of_running_gpus(self) -> dict[str, list[str]]:
        """The names of the running containers with each GPU; more than one is an error."""
        users: dict[str, list[str]] = {}
        for name, containers in self.by_name.items():
            for inspected in containers:
                if inspected["State"]["Running"]:
                    for uuid in gpus_of(inspected):
                        users.setdefault(uuid, []).append(name)
        return users

    def mount_paths(self, mountpoint: str) -> Iterator[Path]:
        """The paths of a volume in running containers, one for each mount."""
        for inspected in (
            container
            for containers in self.by_name.values()
            for container in containers
            if container["State"]["Running"]
        ):
            for mount in inspected["Mounts"]:
                if mount["Source"] == mountpoint:
                    yield Path(f"/proc/{inspected['State']['Pid']}/root{mount['Destination']}")


@dataclass(frozen=True)
class Observation:
    """Containers, volumes and engine containers by name, and the holders of GPUs, at one time."""

    containers: dict[str, container_pb2.Container]
    engine: EngineView
    holders: dict[str, str]
    volumes: dict[str, volume_pb2.Volume]

    @classmethod
    async def read(cls, rig: Rig, node: str, caller: Caller) -> Self:
        """Read the current state."""
        listed, engine, holders, volumes = await asyncio.gather(
            caller.containers.ListContainers(container_service_pb2.ListContainersRequest()),
            asyncio.to_thread(EngineView.read, rig, node),
            caller.holders(),
            volumes_of(caller),
        )
        containers = {container.name: container for container in listed.containers}
        return cls(containers, engine, {uuid: name for uuid, name in holders.items() if name}, volumes)

    @classmethod
    def empty(cls) -> Self:
        """The state of a host without containers and volumes."""
        return cls({}, EngineView({}), {}, {})

    def mounts_of(self, inspected: dict[str, Any]) -> dict[str, str]:
        """The volume by mount target of an engine container; for a mount of no volume, the source of the mount."""
        names = {volume.mountpoint: name for name, volume in self.volumes.items()}
        return {mount["Destination"]: names.get(mount["Source"], mount["Source"]) for mount in inspected["Mounts"]}

    def files_in_volume(self, volume: volume_pb2.Volume, device: Path) -> Files:
        """The files of a volume, which all running containers must see alike.

        `device` is the device that a volume with a size is mounted from.
        """
        views = [_texts_in(mount_path) for mount_path in self.engine.mount_paths(volume.mountpoint)]
        assert all(files == views[0] for files in views), f"different files in {volume.name}: {views}"
        if views:
            return views[0]
        return _texts_on_device(device) if volume.size_bytes else _texts_in(Path(volume.mountpoint))

    def visible_size(self, volume: volume_pb2.Volume) -> int | None:
        """The size in bytes that a running container sees; None if no running container mounts the volume."""
        for mount_path in self.engine.mount_paths(volume.mountpoint):
            status = os.statvfs(mount_path)
            return status.f_blocks * status.f_frsize
        return None


async def volumes_of(caller: Caller) -> dict[str, volume_pb2.Volume]:
    """All volumes, as a watch lists them: unlike ListVolumes, it does not start a process that measures usage."""
    found = {}
    watch = caller.volumes.WatchVolumes(volume_service_pb2.WatchVolumesRequest())
    async for answer in watch:
        if answer.WhichOneof("event") != "added":
            break
        found[answer.added.name] = answer.added
    watch.cancel()
    return found


def _texts_on_device(device: Path) -> Files:
    """The files of a device that is not mounted: mount it in a new mount namespace, and copy them."""
    with tempfile.TemporaryDirectory() as folder:
        mount_path, copies = Path(folder, "mount_path"), Path(folder, "copies")
        mount_path.mkdir()
        script = 'mount -o ro "$1" "$2" && cp -R "$2" "$3"'
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-euc", script, "sh"]
        subprocess.run([*words, str(device.resolve()), str(mount_path), str(copies)], check=True, timeout=60)
        return _texts_in(copies)
