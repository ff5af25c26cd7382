"""Reads the names of users and groups of an image of the overlay2 driver from its layers on this host."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from gpudock_server.adapters.layers.overlay2 import LayerRefusedError, open_layer
from gpudock_server.model.engine import ImageAccounts

_MAX_BYTES: Final = 1 << 20
_OPAQUE: Final = "trusted.overlay.opaque"
# Set on a folder or a file of a writable layer whose content is in a layer below, perhaps at another path.
_ELSEWHERE: Final = ("trusted.overlay.redirect", "trusted.overlay.metacopy")
# The device number of the character device that marks a deleted file (kernel documentation of overlayfs).
_WHITEOUT: Final = os.makedev(0, 0)


class _UnknownError(Exception):
    """The layers contain something that only the kernel resolves, such as a symbolic link."""


def read_accounts(engine_root: str, layers: Sequence[str]) -> ImageAccounts | None:
    """The names in /etc/passwd and /etc/group of an image whose layers are at these paths, highest first.

    None if they are unknown: a layer cannot be read, or one of the files is not a regular file, or /etc not a folder.
    """
    if not layers:
        return None
    try:
        return ImageAccounts(
            users=_names(engine_root, layers, "passwd"),
            groups=_names(engine_root, layers, "group"),
        )
    except (OSError, LayerRefusedError, _UnknownError):
        return None


def _names(engine_root: str, layers: Sequence[str], name: str) -> frozenset[str]:
    """The first field of each line of /etc/`name`; empty if the image has no such file."""
    for layer in layers:
        with open_layer(engine_root, layer) as root, _entry(root, "etc") as etc:
            if etc is None:
                continue
            if etc < 0:
                break
            with _entry(etc, name) as file:
                if file is None:
                    if _is_opaque(etc):
                        break
                    continue
                return frozenset() if file < 0 else _first_fields(file)
    return frozenset()


@contextmanager
def _entry(folder: int, name: str) -> Iterator[int | None]:
    """A descriptor of an entry, a folder or a regular file; None if there is none, -1 if this layer deletes it."""
    try:
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        yield None
        return
    if stat.S_ISCHR(found.st_mode) and found.st_rdev == _WHITEOUT:
        yield -1
        return
    if not (stat.S_ISDIR(found.st_mode) if name == "etc" else stat.S_ISREG(found.st_mode)):
        raise _UnknownError
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        if any(_attribute(descriptor, name) is not None for name in _ELSEWHERE):
            raise _UnknownError
        yield descriptor
    finally:
        os.close(descriptor)


def _is_opaque(folder: int) -> bool:
    """Whether a folder hides what the layers below have in it."""
    return _attribute(folder, _OPAQUE) == b"y"


def _attribute(descriptor: int, name: str) -> bytes | None:
    try:
        return os.getxattr(descriptor, name)
    except OSError:
        return None


def _first_fields(file: int) -> frozenset[str]:
    content = b""
    while chunk := os.read(file, _MAX_BYTES + 1 - len(content)):
        content += chunk
    if len(content) > _MAX_BYTES:
        raise _UnknownError
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    return frozenset(line.strip().partition(":")[0] for line in lines if line.strip())
