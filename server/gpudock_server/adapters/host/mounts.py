"""Read the mounts of a mount namespace."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final, NamedTuple

# Not /proc/self: a thread may be in another mount namespace than its process.
_MOUNTS: Final = Path("/proc/thread-self/mounts")


class MountEntry(NamedTuple):
    """A mount: its source, such as a device, and its mount point."""

    source: str
    point: Path


def read_mounts() -> list[MountEntry]:
    """Return all mounts in the mount namespace of the calling thread: proc(5)."""
    lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    fields = (line.split(" ") for line in lines)
    return [MountEntry(source, Path(_unescape(point))) for source, point, *_ in fields]


def _unescape(text: str) -> str:
    """Decode the octal escapes of proc(5)."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
