"""Free space of a filesystem."""

from __future__ import annotations

import os

from gpudock_server.errors import DiskFull

# Reserve on top of the needed bytes: directories grow, and the engine and its logs continue to write.
_MARGIN_BYTES = 16 << 20
_MARGIN_SHARE = 0.01


def available(path: str) -> int:
    """Return the free bytes on the filesystem of `path`, without those reserved for root."""
    filesystem = os.statvfs(path)
    return filesystem.f_bavail * filesystem.f_frsize


def require_disk_space(path: str, needed: int) -> int:
    """Return the free bytes at `path`. Raises DiskFull if there are fewer than `needed` and a margin."""
    free = available(path)
    if needed + max(_MARGIN_BYTES, int(needed * _MARGIN_SHARE)) > free:
        raise DiskFull(path=path, needed_bytes=needed, available_bytes=free)
    return free
