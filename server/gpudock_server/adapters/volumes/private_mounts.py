"""Mount devices in a private namespace, whether the engine has mounted them or not, without leaving a mount behind.

A child process with its own mount namespace mounts the devices. A second mount of the same device is the same
filesystem, so reads, writes and resizes through it are those that a container sees. The mount ends with the child, and
the child with the daemon, at the end of its stdin.
"""

from __future__ import annotations

import asyncio
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from gpudock_server.adapters.host.mounts import read_mounts
from gpudock_server.adapters.host.subprocesses import (
    ProgramFailed,
    environment,
    kill_and_wait,
    run,
    with_parent_death_signal,
)
from gpudock_server.model.volume import VolumeBackendKind, VolumeBacking

_MOUNT_SECONDS: Final = 60.0
_END_SECONDS: Final = 10.0
# Arguments: mount points to unmount, a dot, then groups of type, options, device and mount point.
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
    """A device and its mount point."""

    filesystem: str
    options: str
    device: str
    point: Path


@dataclass(frozen=True, slots=True)
class FilesLocation:
    """The folder with the files of a backing, after `mount` (None: no mount is needed)."""

    path: Path
    mount: DeviceMount | None = None


class MountableBackend(Protocol):
    """A backend whose backings can be mounted together with those of other backends."""

    @property
    def kind(self) -> VolumeBackendKind:
        """Return the kind of the backend."""
        ...

    async def files_location(self, backing: VolumeBacking) -> FilesLocation:
        """Return where the files of a backing are. Raises VolumeFailed."""
        ...


@dataclass(frozen=True, slots=True)
class MountedView:
    """A mount namespace with copies of our mounts, and additional mounts."""

    pid: int

    def path(self, inside: Path) -> str:
        """Return a path in the namespace as seen from our own namespace.

        For system calls, and programs that only pass the path to system calls. Programs that look up mount points, such
        as df, must be started with `run`.
        """
        return f"/proc/{self.pid}/root{inside}"

    def nsenter_command(self, *command: str) -> list[str]:
        """Return the command that runs `command` in the namespace; its paths are those of the namespace."""
        return ["nsenter", "--target", str(self.pid), "--mount", "--", *command]

    async def run(self, *command: str, seconds: float = 600.0) -> str:
        """Run a program in the namespace; returns its stdout. Raises ProgramFailed."""
        return await run(*self.nsenter_command(*command), seconds=seconds)


@asynccontextmanager
async def mount_privately(mounts: Sequence[DeviceMount]) -> AsyncIterator[MountedView]:
    """Mount devices while the context is open. Raises ProgramFailed."""
    words = await asyncio.to_thread(_other_volumes, [one.point for one in mounts])
    words += [".", *(str(word) for one in mounts for word in (one.filesystem, one.options, one.device, one.point))]
    # Slave: unmounts of the host are repeated in this namespace, and mounts in this namespace are not visible outside.
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
    """Return the mount points of all other loop devices.

    A new namespace has copies of all mounts. If the originals are private, the copies stay after the originals are
    unmounted, and a volume that is no longer used would be busy while another one is mounted here.
    """
    loop_points = [mount.point for mount in read_mounts() if mount.source.startswith("/dev/loop")]
    return [str(path) for path in loop_points if not any(point.is_relative_to(path) for point in points)]


async def _wait_until_mounted(process: Process) -> None:
    assert process.stdout is not None  # noqa: S101 - the caller requests the pipe
    assert process.stderr is not None  # noqa: S101 - the caller requests the pipe
    try:
        async with asyncio.timeout(_MOUNT_SECONDS):
            if await process.stdout.readline() != b"mounted\n":
                stderr = (await process.stderr.read()).decode(errors="replace")
                raise ProgramFailed(stderr.strip().split("\n")[0] or "mount failed")
    except TimeoutError as error:
        raise ProgramFailed(f"mount timed out after {_MOUNT_SECONDS:.0f} s") from error


async def _stop_child(process: Process) -> None:
    """End the child; its mounts are gone when this returns."""
    try:
        if process.stdin is not None:
            process.stdin.close()
        async with asyncio.timeout(_END_SECONDS):
            await process.wait()
    except TimeoutError:
        pass
    finally:
        await kill_and_wait(process)
