"""The packages of an installation, downloaded once per machine; only the download needs a package index."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.rig.builds import cache_folder
from tests.rig.rig import REPOSITORY

_DEADLINE_S = 900.0
BASE_PYTHON = str(Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}")
"""The interpreter from which the virtual environment of the tests was created."""


def environment() -> dict[str, str]:
    """Return variables with which pip uses only the wheelhouse, and `make install` this interpreter."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE", "MFLAGS"))}
    return inherited | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheelhouse()), "PYTHON": BASE_PYTHON}


def wheelhouse() -> Path:
    """Return the folder with the pinned packages of the daemon and of the build; download them if it is missing."""
    pinned = [REPOSITORY / "deploy" / name for name in ("constraints.txt", "build-constraints.txt")]
    texts = b"".join(path.read_bytes() for path in pinned)
    key = hashlib.sha256(texts + repr(sys.version_info[:2]).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{key}-wheels"
    # Several workers can call this at the same time.
    with (cache_folder() / "wheels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            for path in pinned:
                _fetch(partial, path)
            partial.rename(folder)
    return folder


def _fetch(folder: Path, pinned: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--require-hashes"]
    subprocess.run([*pip, "--dest", folder, "--requirement", pinned], check=True, timeout=_DEADLINE_S)
