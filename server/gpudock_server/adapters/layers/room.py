"""Room on a filesystem, and having what was written there on the disk."""

from __future__ import annotations

import ctypes
import os

from gpudock_server.errors import DiskFull

# Kept free beside the layer itself: directories grow, and the engine and its logs go on writing.
_MARGIN_BYTES = 16 << 20
_MARGIN_SHARE = 0.01


def available(path: str) -> int:
    """Bytes that are free on the filesystem of `path`, without those kept back for root."""
    filesystem = os.statvfs(path)
    return filesystem.f_bavail * filesystem.f_frsize


def require_room(path: str, needed: int) -> int:
    """The bytes that are free at `path`. Raises DiskFull where `needed` and a margin are not."""
    free = available(path)
    if needed + max(_MARGIN_BYTES, int(needed * _MARGIN_SHARE)) > free:
        raise DiskFull(path=path, needed_bytes=needed, available_bytes=free)
    return free


def write_out(descriptor: int) -> None:
    """Have everything written that the filesystem of `descriptor` holds in memory (syncfs(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(descriptor) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
