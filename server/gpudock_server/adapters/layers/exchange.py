"""Exchange the trees of two layers atomically, and find out whether they are exchanged."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path

from gpudock_server.adapters.host.filesystem import open_directory, rename_exchange
from gpudock_server.adapters.layers.overlay2 import LayerRefusedError, find_layer
from gpudock_server.ports import LayerPair

_LAYER_NAME = b"diff"


class LayerOrder(Enum):
    """Whether the two trees of a pair are exchanged."""

    STRAIGHT = "straight"
    EXCHANGED = "exchanged"


def layer_order(engine_root: str, pair: LayerPair) -> LayerOrder:
    """Return the current order of the trees. Raises LayerRefusedError if the inode numbers match neither order."""
    if pair.old_path == pair.new_path or pair.old_inode == pair.new_inode:
        raise LayerRefusedError(f"{pair.old_path} and {pair.new_path} are the same layer")
    old = find_layer(engine_root, pair.old_path)
    new = find_layer(engine_root, pair.new_path)
    if old.device != new.device:
        raise LayerRefusedError(f"{pair.old_path} and {pair.new_path} are on different filesystems")
    if (old.inode, new.inode) == (pair.old_inode, pair.new_inode):
        return LayerOrder.STRAIGHT
    if (old.inode, new.inode) == (pair.new_inode, pair.old_inode):
        return LayerOrder.EXCHANGED
    raise LayerRefusedError(
        f"{pair.old_path} has inode {old.inode} and {pair.new_path} has {new.inode};"
        f" expected {pair.old_inode} and {pair.new_inode}"
    )


def ensure_order(engine_root: str, pair: LayerPair, desired: LayerOrder) -> bool:
    """Exchange the trees unless they are in the order `desired`; False, with nothing changed, if the kernel cannot.

    Raises LayerRefusedError if the pair is not what was recorded, OSError if the exchange fails otherwise.
    """
    current = layer_order(engine_root, pair)
    with open_directory(Path(pair.old_path).parent) as old, open_directory(Path(pair.new_path).parent) as new:
        if current is not desired and not rename_exchange(old, new, _LAYER_NAME):
            return False
        # Also without an exchange: the daemon that made it may have died before this sync.
        os.fsync(old)
        os.fsync(new)
    return True
