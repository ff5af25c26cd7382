"""System calls on filesystems and directories. The tree worker loads this module, so it must import quickly."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_RENAME_EXCHANGE = 2
# EXDEV: project quotas differ. EINVAL, ENOSYS, EOPNOTSUPP: not supported by the filesystem or the kernel. None of them
# changes anything.
_CANNOT_EXCHANGE = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def sync_filesystem(descriptor: int) -> None:
    """Write all cached data of the filesystem of `descriptor` to disk: syncfs(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(descriptor) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@contextmanager
def open_directory(path: str | os.PathLike[str], *, follow: bool = False) -> Iterator[int]:
    """Open a directory; without `follow`, a symbolic link raises OSError."""
    descriptor = os.open(path, _DIRECTORY_FLAGS | (0 if follow else os.O_NOFOLLOW))
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Write the names in a directory to disk, so that a new or renamed entry survives a power failure."""
    with open_directory(path, follow=True) as descriptor:
        os.fsync(descriptor)


def rename_exchange(folder: int, other: int, name: bytes) -> bool:
    """Exchange the entries `name` of two open folders: renameat2(2) with RENAME_EXCHANGE (Linux 3.15).

    False, with nothing changed, if the kernel or the filesystem cannot. Raises OSError.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        renameat2 = libc.renameat2
    except AttributeError:  # a C library from before 2018
        return False
    if renameat2(folder, name, other, name, ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code))
