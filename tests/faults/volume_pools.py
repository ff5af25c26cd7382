"""Volumes with files in them, and the filesystem that they share: what tests of several backends have in common."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from gpudock.v1 import container_pb2

from tests.calls import Caller
from tests.engine.loop_devices import detach_loop_devices
from tests.rig import Rig

_MIB = 1 << 20
WRITE_FILES = (
    "dd if=/dev/urandom of=/data/blob bs=64k count=256 conv=fsync 2>/dev/null && ln /data/blob /data/link &&"
    " chmod 4751 /data/blob && sync"
)
SHOW_FILES = "cd /data && sha256sum blob link && stat -c '%a %h %u %Y' blob"


def mount_of(name: str) -> container_pb2.Mount:
    """A volume at /data."""
    return container_pb2.Mount(volume=name, target="/data")


async def filesystem_size(caller: Caller, container: str) -> int:
    """What `df` inside says."""
    return int((await caller.shell(container, "df -P -k /data")).splitlines()[1].split()[1]) << 10


async def container_has_files(caller: Caller, container: str, files: str) -> bool:
    """Whether it runs, as the engine and not an older record has it, with these files."""
    try:
        looked = await caller.run(container, "sh", "-c", SHOW_FILES)
    except grpc.aio.AioRpcError:
        # One that was killed ends what ran, and does not always start it again; its record says so.
        if (await caller.get(container)).status.state == container_pb2.CONTAINER_STATE_EXITED:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await caller.start(container)
        return False
    if looked.code != 0:  # it was ended under the look
        return False
    assert looked.stdout.decode() == files
    return True


@dataclass(frozen=True)
class Pool:
    """A filesystem of its own for volumes, seen by the daemon and the engine, which others can fill."""

    rig: Rig
    path: Path

    def inside(self, *words: object) -> str:
        """Run a program where it is mounted."""
        command = [*self.rig.namespaces.enter(), *map(str, words)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    @property
    def free_bytes(self) -> int:
        """What can still be written."""
        return int(self.inside("stat", "--file-system", "--format", "%a", self.path)) * 4096

    def fill(self, leaving: int = 0) -> None:
        """Somebody else takes all the room but some."""
        # Were it not mounted, this would fill the host's disk.
        self.inside("mountpoint", "--quiet", self.path)
        # What is left beside that is for the ballast's own blocks of extents.
        self.inside("fallocate", "--length", self.free_bytes - leaving - 2 * _MIB, self.path / "ballast")
        if not leaving:
            words = ("dd", "if=/dev/zero", f"of={self.path}/crumbs", "bs=4k", "conv=fsync")
            filled = subprocess.run([*self.rig.namespaces.enter(), *words], check=False, capture_output=True, text=True)
            assert "No space left" in filled.stderr, filled.stderr

    def empty(self) -> None:
        """And gives it back."""
        self.inside("rm", "--force", self.path / "ballast", self.path / "crumbs")


@contextmanager
def mounted_pool(
    rig: Rig, path: Path, *, image: Path, size: int, make: Sequence[str], options: str = "loop"
) -> Iterator[Pool]:
    """An image of this many bytes with a filesystem that `make` makes, mounted; what is made in it goes with it."""
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run([*make, image], check=True)
    pool = Pool(rig, path)
    pool.inside("mount", "-o", options, image, path)
    try:
        yield pool
    finally:
        pool.empty()
        rig.engine.remove_all()
        detach_loop_devices(path)
        pool.inside("umount", "--lazy", path)
