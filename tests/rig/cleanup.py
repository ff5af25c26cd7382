"""Finds and removes everything of a rig: processes, mounts, loop devices, control groups and files.

All of it is found by the rig's id. The folder of the rig is `<base>/<id>`. In every control group hierarchy the rig has
a group `gpudock-rig-<id>` with all its processes: the engine, containerd, shims, etcd, the daemons, and, in subgroups
that the engine makes, the containers. The id has the process id and the start time of its owner, so that every process
can tell whether the owner has ended. A rig is removed when it closes, by its guardian process when its owner is killed,
or by the sweep at the start of the next rig.

This file uses the standard library alone and imports nothing of the package: the guardian runs it as a script.
"""

import contextlib
import itertools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BASE = Path(os.environ.get("GPUDOCK_RIG_BASE", "/var/tmp/gpudock-rigs"))
GROUP_PREFIX = "gpudock-rig-"
_POLL_S = 0.005
_REMOVAL_SECONDS = 20.0


@dataclass(frozen=True)
class RigId:
    """The id of a rig: process id and start time (clock ticks since boot) of its owner, and a serial number."""

    owner_pid: int
    owner_start: int
    serial: int

    def __str__(self) -> str:
        return f"{self.owner_pid}-{self.owner_start}-{self.serial}"

    @classmethod
    def parse(cls, text: str) -> "RigId | None":
        """The id in the name of a folder or control group; None if the name is not that of a rig."""
        parts = text.split("-")
        if len(parts) != 3 or not all(part.isdecimal() for part in parts):
            return None
        return cls(*map(int, parts))

    @classmethod
    def create(cls) -> "RigId":
        """Make a new id for this process, and its folder with mode 0711."""
        BASE.mkdir(parents=True, exist_ok=True)
        pid = os.getpid()
        for serial in itertools.count(1):
            rig = cls(pid, start_ticks(pid) or 0, serial)
            with contextlib.suppress(FileExistsError):
                rig.folder.mkdir(mode=0o711)
                return rig
        raise AssertionError("unreachable")

    @property
    def folder(self) -> Path:
        """The folder of all files of the rig."""
        return BASE / str(self)

    @property
    def group(self) -> str:
        """The name of the control group, directly below the root of each hierarchy."""
        return GROUP_PREFIX + str(self)

    def owner_is_gone(self) -> bool:
        """Whether the process that made this rig has ended; its process id may have been reused."""
        return start_ticks(self.owner_pid) != self.owner_start


def start_ticks(pid: int) -> int | None:
    """The start time of a process in clock ticks since boot; None if it does not exist or is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def hierarchies() -> list[Path]:
    """The mount points of all control group hierarchies: several with cgroup v1, one with v2."""
    mounts = (line.split() for line in Path("/proc/self/mounts").read_text().splitlines())
    return [Path(fields[1]) for fields in mounts if fields[2] in {"cgroup", "cgroup2"}]


def tracking_hierarchy() -> Path:
    """The hierarchy in which the processes of a rig are found."""
    found = hierarchies()
    by_name = {path.name: path for path in found}
    for name in ("freezer", "pids", "unified"):
        if name in by_name:
            return by_name[name]
    return found[0]


def groups_of(rig: RigId) -> list[Path]:
    """The control groups of a rig in all hierarchies, the innermost first."""
    roots = [top / rig.group for top in hierarchies()]
    return [Path(path) for root in roots if root.is_dir() for path, _, _ in os.walk(root, topdown=False)]


def processes_of(rig: RigId) -> set[int]:
    """The process ids of all processes of a rig."""
    pids: set[int] = set()
    for group in groups_of(rig):
        with contextlib.suppress(OSError):
            pids.update(map(int, (group / "cgroup.procs").read_text().split()))
    return pids - {0}


def mounts_of(rig: RigId) -> list[str]:
    """The mount points below the rig's folder in the mount namespace of this process, the innermost first."""
    points = (line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines())
    return [point for point in points if point.startswith(f"{rig.folder}/")][::-1]


def loops_of(rig: RigId) -> list[str]:
    """The loop devices with an image in the rig's folder."""
    found = []
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if backing.read_text().startswith(f"{rig.folder}/"):
                found.append(f"/dev/{backing.parts[3]}")
    return found


def leftovers(rig: RigId) -> list[str]:
    """What of the rig still exists, such as `process 17`; empty once all is removed."""
    items = [f"process {pid}" for pid in sorted(processes_of(rig))]
    items += [f"mount {point}" for point in mounts_of(rig)]
    items += [f"loop device {loop}" for loop in loops_of(rig)]
    items += [f"control group {group}" for group in groups_of(rig)]
    return items + [f"folder {rig.folder}"] * rig.folder.exists()


def destroy(rig: RigId) -> list[str]:
    """Kill the processes of a rig, then remove its mounts, loop devices, control groups and files; idempotent.

    Returns what could not be removed within 20 s, one description for each, like `leftovers`.
    """
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while _kill(rig) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    for point in mounts_of(rig):
        subprocess.run(["umount", "--lazy", point], check=False, capture_output=True)
    for loop in loops_of(rig):
        subprocess.run(["losetup", "--detach", loop], check=False, capture_output=True)
    while not _remove_groups(rig) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    while rig.folder.exists() and time.monotonic() < deadline:
        # One file system: files of a mount that could not be removed do not belong to the rig.
        subprocess.run(["rm", "-rf", "--one-file-system", rig.folder], check=False, capture_output=True)
    return leftovers(rig)


def _kill(rig: RigId) -> bool:
    """Send SIGKILL to all processes of the rig; False if there are none."""
    pids = processes_of(rig)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for group in groups_of(rig) if pids else []:
        # A paused container is frozen, and with cgroup v1 a frozen process does not end on SIGKILL.
        with contextlib.suppress(OSError):
            (group / "freezer.state").write_text("THAWED")
    return bool(pids)


def _remove_groups(rig: RigId) -> bool:
    for group in groups_of(rig):
        with contextlib.suppress(OSError):
            group.rmdir()
    return not groups_of(rig)


def known_rigs() -> Iterator[RigId]:
    """Every rig that has a folder or a control group on this machine, with or without an owner."""
    names = {path.name for path in BASE.glob("*-*-*")}
    for top in hierarchies():
        names.update(path.name.removeprefix(GROUP_PREFIX) for path in top.glob(f"{GROUP_PREFIX}*"))
    yield from filter(None, map(RigId.parse, sorted(names)))


def sweep() -> list[str]:
    """Destroy every rig whose owner has ended; returns what could not be removed."""
    return [item for rig in known_rigs() if rig.owner_is_gone() for item in destroy(rig)]


def guard(rig: RigId) -> None:
    """Block until the owner of a rig has ended, then destroy the rig."""
    with contextlib.suppress(ProcessLookupError):
        owner = os.pidfd_open(rig.owner_pid)
        while not rig.owner_is_gone():
            select.select([owner], [], [])
    destroy(rig)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    guarded = RigId.parse(sys.argv[1])
    if guarded is not None:
        guard(guarded)
