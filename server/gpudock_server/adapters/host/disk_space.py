"""Room on a filesystem."""

from __future__ import annotations

import os

from gpudock_server.errors import DiskFull

# Kept free beside the layer itself: directories grow, and the engine and its logs go on writing.
_MARGIN_BYTES = 16 << 20
_MARGIN_SHARE = 0.01


def available(path: str) -> int:
    """Bytes that are free on the filesystem of `path`, without those kept back for root."""
    filesystem = os.statvfs(path)
    return filesystem.f_bavail * filesystem.f_frsize


def require_disk_space(path: str, needed: int) -> int:
    """The bytes that are free at `path`. Raises DiskFull where `needed` and a margin are not."""
    free = available(path)
    if needed + max(_MARGIN_BYTES, int(needed * _MARGIN_SHARE)) > free:
        raise DiskFull(path=path, needed_bytes=needed, available_bytes=free)
    return free
