"""Project quotas, set with the distribution's own tools, which know XFS and ext4 alike."""

import subprocess
from pathlib import Path

KIB = 1 << 10
MIB = 1 << 20


def give_project(folder: Path, project: int) -> None:
    """Make all of a folder, and what comes into it later, count for a project."""
    subprocess.run(["chattr", "-R", "-p", str(project), "+P", folder], check=True)


def limit(mount_point: Path, project: int, size: int) -> None:
    """Let a project have this many bytes on a filesystem; soft and hard, since `df` shows the soft one."""
    blocks = str(size // KIB)
    subprocess.run(["setquota", "-P", str(project), blocks, blocks, "0", "0", mount_point], check=True)
