"""The kernel's table of project quotas, through xfs_quota (package xfsprogs), which supports XFS and ext4."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpudock_server.adapters.host.subprocesses import run

# Limits are multiples of this size.
BLOCK_BYTES: Final = 4096
_REPORTED: Final = re.compile(r"^#(\d+)\s+(\d+)\s", re.MULTILINE)
_REPORTED_UNIT: Final = 1024


@dataclass(frozen=True, slots=True)
class MountedFilesystem:
    """A mounted filesystem."""

    point: str
    filesystem: str
    options: frozenset[str]


async def filesystem_of(root: Path) -> MountedFilesystem:
    """Return the filesystem of `root`, which need not exist yet. Raises ProgramFailed."""
    existing = next(path for path in (root, *root.parents) if path.exists())
    found = await run("findmnt", "--json", "--output", "TARGET,FSTYPE,OPTIONS", "--target", str(existing))
    shown = json.loads(found)["filesystems"][-1]
    return MountedFilesystem(
        point=shown["target"], filesystem=shown["fstype"], options=frozenset(shown["options"].split(","))
    )


async def is_enforced(mount: MountedFilesystem) -> bool:
    """Whether project quotas are enforced on a filesystem. Raises ProgramFailed."""
    return "Enforcement: ON" in await _ask(mount, "state -p")


async def project_usage(mount: MountedFilesystem) -> dict[int, int]:
    """Return the used bytes of each project id in the table. Raises ProgramFailed."""
    report = await _ask(mount, "report -p -n -N -b")
    return {int(number): int(used) * _REPORTED_UNIT for number, used in _REPORTED.findall(report)}


async def set_limit(mount: MountedFilesystem, project_id: int, size_bytes: int) -> None:
    """Set the soft limit, which statfs reports, and the hard limit, which is enforced. Raises ProgramFailed."""
    limit = round_up(size_bytes)
    await _ask(mount, f"limit -p bsoft={limit} bhard={limit} {project_id}")


def round_up(size_bytes: int) -> int:
    """Round a size up to a valid limit."""
    return -(-size_bytes // BLOCK_BYTES) * BLOCK_BYTES


async def _ask(mount: MountedFilesystem, command: str) -> str:
    foreign = [] if mount.filesystem == "xfs" else ["-f"]
    # Ignore /etc/projects and /etc/projid: project ids are passed as numbers.
    files = ["-D", "/dev/null", "-P", "/dev/null"]
    return await run("xfs_quota", "-x", *foreign, *files, "-c", command, mount.point)
