"""Having what was written on the disk."""

from __future__ import annotations

import ctypes
import os


def sync_filesystem(descriptor: int) -> None:
    """Have everything written that the filesystem of `descriptor` holds in memory (syncfs(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(descriptor) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
