"""Containers of the rig's engine that mount a volume, and programs run inside them."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tests.rig import BUSYBOX, Rig
from tests.rig.patience import limit

TARGET = "/data"


@dataclass(frozen=True)
class VolumeContainer:
    """A container with an engine volume at TARGET."""

    rig: Rig
    id: str

    def start(self) -> None:
        """Start the container, which mounts the volume."""
        self.rig.engine.call("POST", f"/containers/{self.id}/start")

    def stop(self) -> None:
        """Kill the container, which unmounts the volume unless another container mounts it."""
        self.rig.engine.call("POST", f"/containers/{self.id}/stop", query={"t": "0"})

    @property
    def pid(self) -> int:
        """The pid of the container's main process; 0 when it does not run."""
        return int(self.rig.engine.call("GET", f"/containers/{self.id}/json")["State"]["Pid"])

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program of the image in the container's mount namespace, without CAP_SYS_RESOURCE.

        On ext4, quotas do not limit a process with this capability. Root on the host has it, root in a container not.
        """
        without_capability = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource", "--"]
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--root", "--wdns=/", "--"]
        command = [*without_capability, *enter, *argv]
        return subprocess.run(command, check=check, capture_output=True, text=True, timeout=limit(120))

    def df(self) -> tuple[int, int]:
        """Size and used bytes, as df shows them."""
        fields = self.run("df", "-P", "-k", TARGET).stdout.splitlines()[1].split()
        return int(fields[1]) << 10, int(fields[2]) << 10

    def fill(self) -> str:
        """Write until the volume is full; returns the error output of dd."""
        return self.run("dd", "if=/dev/zero", f"of={TARGET}/fill", "bs=64k", check=False).stderr


@contextmanager
def volume_container(rig: Rig, volume: str, *command: str, read_only: bool = False) -> Iterator[VolumeContainer]:
    """Start a container with the volume at TARGET; remove it at the end."""
    request = {
        "Image": BUSYBOX,
        "Cmd": list(command or ("sleep", "1000")),
        "HostConfig": {"Binds": [f"{volume}:{TARGET}{':ro' if read_only else ''}"]},
    }
    container = VolumeContainer(rig, rig.engine.call("POST", "/containers/create", send=request)["Id"])
    try:
        container.start()
        yield container
    finally:
        rig.engine.call("DELETE", f"/containers/{container.id}", query={"force": "1"})
