"""Swapping two folders in one step of the filesystem: renameat2(2) with RENAME_EXCHANGE (Linux 3.15)."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

from gpudock_server.adapters.host.filesystem import open_directory, rename_exchange
from gpudock_server.adapters.layers.overlay2 import LayerRefusedError, find_layer
from gpudock_server.ports import LayerPair

_LAYER_NAME = b"diff"


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
    with open_directory(Path(pair.old_path).parent) as old, open_directory(Path(pair.new_path).parent) as new:
        if standing is not wanted and not rename_exchange(old, new, _LAYER_NAME):
            return False
        # Also where it stood so already: the daemon that swapped may have died before it came to this.
        os.fsync(old)
        os.fsync(new)
    return True
