"""Containers of the rig that mount a volume, and programs run inside them."""

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
        """Start it, which mounts the volume."""
        self.rig.engine.call("POST", f"/containers/{self.id}/start")

    def stop(self) -> None:
        """Kill it, which unmounts the volume unless another container has it."""
        self.rig.engine.call("POST", f"/containers/{self.id}/stop", query={"t": "0"})

    @property
    def pid(self) -> int:
        """Of its first process; 0 when it does not run."""
        return int(self.rig.engine.call("GET", f"/containers/{self.id}/json")["State"]["Pid"])

    def run(self, *argv: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program of the image in the container's mount namespace, as one whom its quotas bind.

        Who has CAP_SYS_RESOURCE, as root on the host has and root in a container has not, is not bound on ext4.
        """
        bound = ["setpriv", "--bounding-set=-sys_resource", "--inh-caps=-sys_resource", "--"]
        words = [*bound, "nsenter", f"--target={self.pid}", "--mount", "--pid", "--root", "--wdns=/", "--", *argv]
        return subprocess.run(words, check=check, capture_output=True, text=True, timeout=limit(120))

    def df(self) -> tuple[int, int]:
        """Size and used bytes, as df shows them."""
        fields = self.run("df", "-P", "-k", TARGET).stdout.splitlines()[1].split()
        return int(fields[1]) << 10, int(fields[2]) << 10

    def fill(self) -> str:
        """Write until nothing more fits; what dd said."""
        return self.run("dd", "if=/dev/zero", f"of={TARGET}/fill", "bs=64k", check=False).stderr


@contextmanager
def volume_container(rig: Rig, volume: str, *command: str, read_only: bool = False) -> Iterator[VolumeContainer]:
    """A container, started; removed at the end."""
    request = {
        "Image": BUSYBOX,
        "Cmd": list(command or ("sleep", "1000")),
        "HostConfig": {"Binds": [f"{volume}:{TARGET}{':ro' if read_only else ''}"]},
    }
    made = VolumeContainer(rig, rig.engine.call("POST", "/containers/create", send=request)["Id"])
    try:
        made.start()
        yield made
    finally:
        rig.engine.call("DELETE", f"/containers/{made.id}", query={"force": "1"})
