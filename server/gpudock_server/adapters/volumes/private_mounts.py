"""Looking into a device's filesystem, whether the engine has it mounted or not, without leaving a mount behind.

A child process with a mount namespace of its own mounts the device there. Another mount of the same device is the same
filesystem, so what is read, written and resized through it is what a container sees. The mount is gone with the child,
and the child with the daemon: its standard input ends.
"""

from __future__ import annotations

import asyncio
import re
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from gpudock_server.adapters.host.subprocesses import ProgramFailed, environment, run, with_parent_death_signal
from gpudock_server.adapters.host.trees.worker import kill_and_wait
from gpudock_server.model.volume import VolumeBackendKind, VolumeBacking

_MOUNTS: Final = Path("/proc/self/mounts")
_MOUNT_SECONDS: Final = 60.0
_END_SECONDS: Final = 10.0
# Mount points to let go of, a dot, then fours of type, options, device and mount point.
_MOUNT_SCRIPT: Final = """
while [ "$1" != . ]; do
    umount --lazy -- "$1"
    shift
done
shift
while [ $# -gt 0 ]; do
    mount -t "$1" -o "$2" -- "$3" "$4" || exit 1
    shift 4
done
echo mounted
exec cat
"""


@dataclass(frozen=True, slots=True)
class DeviceMount:
    """A device, and the folder where it is to be mounted."""

    filesystem: str
    options: str
    device: str
    point: Path


@dataclass(frozen=True, slots=True)
class FilesLocation:
    """Where a store's files are once `mount`, if it takes one, is made."""

    path: Path
    mount: DeviceMount | None = None


class MountableBackend(Protocol):
    """A backend whose stores can be mounted together with those of others."""

    @property
    def kind(self) -> VolumeBackendKind:
        """Which one it is."""
        ...

    async def files_location(self, backing: VolumeBacking) -> FilesLocation:
        """How to get at a store's files. Raises VolumeFailed."""
        ...


@dataclass(frozen=True, slots=True)
class MountedView:
    """A namespace that sees what we see, and some mounts more."""

    pid: int

    def path(self, inside: Path) -> str:
        """A path in the namespace as it leads there from our own.

        For system calls, and programs that make nothing but system calls of it. One that asks where it is (df)
        gets an answer that means something else here, and follows it: those are for `run`.
        """
        return f"/proc/{self.pid}/root{inside}"

    def nsenter_command(self, *command: str) -> list[str]:
        """The command, to run in the namespace; its paths are those there."""
        return ["nsenter", "--target", str(self.pid), "--mount", "--", *command]

    async def run(self, *command: str, seconds: float = 600.0) -> str:
        """Run a program there. Raises ProgramFailed."""
        return await run(*self.nsenter_command(*command), seconds=seconds)


@asynccontextmanager
async def mount_privately(mounts: Sequence[DeviceMount]) -> AsyncIterator[MountedView]:
    """Mount devices for as long as the context lasts. Raises ProgramFailed."""
    words = await asyncio.to_thread(_other_volumes, [one.point for one in mounts])
    words += [".", *(str(word) for one in mounts for word in (one.filesystem, one.options, one.device, one.point))]
    # Slave: what others unmount meanwhile is unmounted here too, and what is mounted here is seen by nobody.
    unshare = ["unshare", "--mount", "--propagation", "slave", "--"]
    process = await asyncio.create_subprocess_exec(
        *with_parent_death_signal([*unshare, "/bin/sh", "-c", _MOUNT_SCRIPT, "sh", *words]),
        stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True, env=environment(),
    )  # fmt: skip
    try:
        await _wait_until_mounted(process)
        yield MountedView(pid=process.pid)
    finally:
        await _stop_child(process)


def _other_volumes(points: Sequence[Path]) -> list[str]:
    """Where else loop devices are mounted that nothing here needs.

    A namespace begins with copies of all mounts. Where the originals are private, their unmounting is not seen in it,
    and a volume that nobody uses any more would be in use for as long as another one is looked into.
    """
    mounts = [line.split(" ") for line in _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()]
    where = [Path(_unescape(point)) for source, point, *_ in mounts if source.startswith("/dev/loop")]
    return [str(path) for path in where if not any(point.is_relative_to(path) for point in points)]


def _unescape(text: str) -> str:
    """The text that proc(5) shows with octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


async def _wait_until_mounted(process: Process) -> None:
    assert process.stdout is not None  # noqa: S101 - asked for above
    assert process.stderr is not None  # noqa: S101 - likewise
    try:
        async with asyncio.timeout(_MOUNT_SECONDS):
            if await process.stdout.readline() != b"mounted\n":
                complaint = (await process.stderr.read()).decode(errors="replace")
                raise ProgramFailed(complaint.strip().split("\n")[0] or "mount failed")
    except TimeoutError as error:
        raise ProgramFailed(f"mount had not ended after {_MOUNT_SECONDS:.0f} s") from error


async def _stop_child(process: Process) -> None:
    """End the child in order, so that the mount is gone when this returns."""
    try:
        if process.stdin is not None:
            process.stdin.close()
        async with asyncio.timeout(_END_SECONDS):
            await process.wait()
    except TimeoutError:
        pass
    finally:
        await kill_and_wait(process)
