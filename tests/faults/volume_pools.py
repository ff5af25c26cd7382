"""Files in volumes, and a filesystem as the pool of volumes, for tests of several backends."""

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
    """The mount of a volume at /data."""
    return container_pb2.Mount(volume=name, target="/data")


async def filesystem_size(caller: Caller, container: str) -> int:
    """The size in bytes that `df` shows for /data in a container."""
    return int((await caller.shell(container, "df -P -k /data")).splitlines()[1].split()[1]) << 10


async def container_has_files(caller: Caller, container: str, files: str) -> bool:
    """Whether a command can run in the container; asserts that it sees these files.

    A container that the engine has not started again after a kill is started.
    """
    try:
        result = await caller.run(container, "sh", "-c", SHOW_FILES)
    except grpc.aio.AioRpcError:
        # A killed engine does not start every container again; the record is EXITED then.
        if (await caller.get(container)).status.state == container_pb2.CONTAINER_STATE_EXITED:
            with contextlib.suppress(grpc.aio.AioRpcError):
                await caller.start(container)
        return False
    if result.code != 0:  # the container was ended meanwhile
        return False
    assert result.stdout.decode() == files
    return True


@dataclass(frozen=True)
class Pool:
    """A filesystem for volumes, mounted for daemon and engine, which tests can fill."""

    rig: Rig
    path: Path

    def inside(self, *words: object) -> str:
        """Run a program in the mount namespace of the engine; returns its stdout."""
        command = [*self.rig.namespaces.enter(), *map(str, words)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    @property
    def free_bytes(self) -> int:
        """The free space in bytes."""
        return int(self.inside("stat", "--file-system", "--format", "%a", self.path)) * 4096

    def fill(self, leaving: int = 0) -> None:
        """Fill the pool with a file, but for `leaving` bytes."""
        # If the pool is not mounted, this would fill the host's disk.
        self.inside("mountpoint", "--quiet", self.path)
        # 2 MiB are left for the extent blocks of the file.
        self.inside("fallocate", "--length", self.free_bytes - leaving - 2 * _MIB, self.path / "filler")
        if not leaving:
            words = ("dd", "if=/dev/zero", f"of={self.path}/rest", "bs=4k", "conv=fsync")
            filled = subprocess.run([*self.rig.namespaces.enter(), *words], check=False, capture_output=True, text=True)
            assert "No space left" in filled.stderr, filled.stderr

    def empty(self) -> None:
        """Remove the files of `fill`."""
        self.inside("rm", "--force", self.path / "filler", self.path / "rest")


@contextmanager
def mounted_pool(
    rig: Rig, path: Path, *, image: Path, size: int, make: Sequence[str], options: str = "loop"
) -> Iterator[Pool]:
    """A mounted image of `size` bytes with the filesystem that the command `make` makes; unmounted after the block."""
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
