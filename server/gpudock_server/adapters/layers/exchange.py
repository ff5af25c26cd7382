"""Swapping two folders in one step of the filesystem: renameat2(2) with RENAME_EXCHANGE (Linux 3.15)."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from gpudock_server.adapters.layers.overlay2 import LayerRefusedError, find_layer
from gpudock_server.ports import LayerPair

_RENAME_EXCHANGE = 2
_LAYER_NAME = b"diff"
# EXDEV: project quotas differ. EINVAL, ENOSYS, EOPNOTSUPP: this filesystem or kernel cannot. None changes anything.
_CANNOT = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


class LayerOrder(Enum):
    """Which of a pair's trees stands where."""

    STRAIGHT = "straight"
    EXCHANGED = "exchanged"


def layer_order(engine_root: str, pair: LayerPair) -> LayerOrder:
    """How the two trees stand now. Raises LayerRefusedError when the inode numbers fit neither arrangement."""
    if pair.old_path == pair.new_path or pair.old_inode == pair.new_inode:
        raise LayerRefusedError(f"{pair.old_path} and {pair.new_path} are one and the same layer")
    old = find_layer(engine_root, pair.old_path)
    new = find_layer(engine_root, pair.new_path)
    if old.device != new.device:
        raise LayerRefusedError(f"{pair.old_path} and {pair.new_path} lie on different filesystems")
    if (old.inode, new.inode) == (pair.old_inode, pair.new_inode):
        return LayerOrder.STRAIGHT
    if (old.inode, new.inode) == (pair.new_inode, pair.old_inode):
        return LayerOrder.EXCHANGED
    raise LayerRefusedError(
        f"{pair.old_path} has inode {old.inode} and {pair.new_path} has {new.inode};"
        f" {pair.old_inode} and {pair.new_inode} were recorded"
    )


def ensure_order(engine_root: str, pair: LayerPair, wanted: LayerOrder) -> bool:
    """Let the trees stand as `wanted`; False, with nothing changed, where the kernel cannot swap them.

    Raises LayerRefusedError when the pair is not what was recorded, OSError when the swap fails otherwise.
    """
    standing = layer_order(engine_root, pair)
    with _opened_parent(pair.old_path) as old, _opened_parent(pair.new_path) as new:
        if standing is not wanted and not rename_exchange(old, new, _LAYER_NAME):
            return False
        # Also where it stood so already: the daemon that swapped may have died before it came to this.
        os.fsync(old)
        os.fsync(new)
    return True


@contextmanager
def _opened_parent(layer_path: str) -> Iterator[int]:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(Path(layer_path).parent, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def rename_exchange(folder: int, other: int, name: bytes) -> bool:
    """Let what two open folders have under one name change places. False, with nothing changed, where it cannot be."""
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        renameat2 = libc.renameat2
    except AttributeError:  # a C library from before 2018
        return False
    if renameat2(folder, name, other, name, ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code))
