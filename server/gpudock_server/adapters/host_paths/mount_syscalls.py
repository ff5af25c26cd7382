"""System calls that Python 3.11 does not provide: mount(2), umount2(2), setns(2), unshare(2)."""

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
    """Bind the file or folder of a descriptor at `target`, with all mounts below it. Raises OSError.

    Later mounts and unmounts of the host below it are repeated at `target`, but not the other way round.
    """
    source = f"/proc/self/fd/{descriptor}".encode()
    _mount(source, target, _MS_BIND | _MS_REC)
    try:
        _mount(None, target, _MS_REC | _MS_SLAVE)
    except OSError:
        detach(target)
        raise


def detach(target: Path) -> None:
    """Unmount everything at `target`; do nothing if nothing is mounted there. Raises OSError.

    Containers that have mounted it keep their own mount.
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
    """Move the calling thread, which must not do other work later, into a mount namespace. Raises OSError."""
    # setns(2) refuses threads that share their root and working directory with other threads.
    _call("unshare", _CLONE_FS)
    _call("setns", descriptor, _CLONE_NEWNS)


def _mount(source: bytes | None, target: Path, flags: int) -> None:
    _call("mount", source, os.fsencode(target), None, ctypes.c_ulong(flags), None)


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
