"""The compiled doubles of NVML and of the container hook: built by gcc once for each content of their sources."""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import RigError

_SOURCES = Path(__file__).parent / "nvml"
_HEADERS = ["gpu_state.h", "nvml_call.h"]
_FLAGS = ["-O1", "-Wall", "-Wextra", "-Werror"]

NVML_LIBRARY = "libnvidia-ml.so.1"
HOOK = "nvidia-container-runtime-hook"


def cache_folder() -> Path:
    """The folder of files that are slow to make and that rigs share; the name of a file has a hash of its sources."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(root) / "gpudock-rig"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached(name: str, key: bytes, make: Callable[[Path], None]) -> Path:
    """The cached file for `key`; `make(path)` writes it if there is none. Of two concurrent writers the last wins."""
    path = cache_folder() / f"{hashlib.sha256(key).hexdigest()[:16]}-{name}"
    if not path.exists():
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        make(partial)
        partial.replace(path)
    return path


def build_nvml(folder: Path) -> Path:
    """Put the NVML double into `folder`, a folder for LD_LIBRARY_PATH. Returns its path."""
    return _build(folder / NVML_LIBRARY, ["nvml_double.c", "nvml_parts.c", "nvml_events.c"], ["-shared", "-fPIC"])


def build_hook(folder: Path) -> Path:
    """Put the double of the container hook into `folder`, a folder for the PATH of dockerd. Returns its path."""
    return _build(folder / HOOK, ["container_hook.c"], [])


def warm_cache() -> None:
    """Compile the doubles that are not in the cache yet, for rigs on slower machines that share the cache."""
    with tempfile.TemporaryDirectory() as folder:
        build_nvml(Path(folder))
        build_hook(Path(folder))


def _build(target: Path, sources: list[str], flags: list[str]) -> Path:
    key = b"".join((_SOURCES / name).read_bytes() for name in [*sources, *_HEADERS])

    def compile_it(path: Path) -> None:
        if shutil.which("gcc") is None:
            raise RigError("there is no gcc: run scripts/install-prerequisites")
        words = ["gcc", *_FLAGS, *flags, "-o", str(path), *(str(_SOURCES / name) for name in sources)]
        done = subprocess.run(words, check=False, capture_output=True, text=True)
        if done.returncode:
            raise RigError(f"{' '.join(words)}\n{done.stderr}")

    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(cached(target.name, key + repr(flags + _FLAGS).encode(), compile_it), target)
    return target
