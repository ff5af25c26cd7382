"""Projects, given with a tool of the distribution that knows XFS and ext4 alike."""

import subprocess
from pathlib import Path


def assign_project(folder: Path, project: int) -> None:
    """Make all of a folder, and what comes into it later, count for a project.

    Only folders can hand it on. Devices, such as a layer's whiteouts, and symbolic links have none to be set; they take
    no blocks either.
    """
    has = ["-exec", "chattr", "-p", str(project)]
    folders = ["-type", "d", *has, "+P", "{}", "+"]
    files = ["-type", "f", *has, "{}", "+"]
    subprocess.run(["find", folder, *folders, "-o", *files], check=True)
