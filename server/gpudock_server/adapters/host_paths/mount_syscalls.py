"""The system calls that Python 3.11 has no functions for: mount(2), umount2(2), setns(2), unshare(2)."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Final

# sys/mount.h and linux/sched.h; the same on every architecture.
_MS_BIND: Final = 0x1000
_MS_REC: Final = 0x4000
_MS_SLAVE: Final = 1 << 19
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_CLONE_FS: Final = 0x200
_CLONE_NEWNS: Final = 0x20000


def bind(descriptor: int, target: Path) -> None:
    """Mount what an open descriptor refers to at `target`, with all that is mounted below it. Raises OSError.

    Mounts that the host makes or removes below it later appear and disappear here as well, and never the other way.
    """
    source = f"/proc/self/fd/{descriptor}".encode()
    _mount(source, target, _MS_BIND | _MS_REC)
    try:
        _mount(None, target, _MS_REC | _MS_SLAVE)
    except OSError:
        detach(target)
        raise


def detach(target: Path) -> None:
    """Unmount everything that is mounted at `target`; nothing mounted there is no error. Raises OSError.

    Containers that have it mounted keep their own mount.
    """
    while True:
        try:
            _call("umount2", os.fsencode(target), _MNT_DETACH | _UMOUNT_NOFOLLOW)
        except OSError as error:
            # EINVAL: not a mount point.
            if error.errno in (errno.EINVAL, errno.ENOENT):
                return
            raise


def enter_mount_namespace(descriptor: int) -> None:
    """Move the calling thread, which must be about to end after its work, into a mount namespace. Raises OSError."""
    # A thread that shares its root and working folder with others may not change its mount namespace.
    _call("unshare", _CLONE_FS)
    _call("setns", descriptor, _CLONE_NEWNS)


def _mount(source: bytes | None, target: Path, flags: int) -> None:
    _call("mount", source, os.fsencode(target), None, ctypes.c_ulong(flags), None)


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
