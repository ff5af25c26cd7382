"""Verify that a folder is the writable layer of a container.

The engine reports a path, and the daemon renames or deletes files there as root. So the path is accepted only if the
layout of the overlay2 driver around it matches (moby, daemon/graphdriver/overlay2/overlay.go):

    <root>/overlay2/<id>/diff           the files of the layer; <id> is 64 hex digits
    <root>/overlay2/<id>/link           its short name, 26 characters
    <root>/overlay2/l/<short name>      a symbolic link to ../<id>/diff
    <root>/overlay2/<id>/lower          the short names of the layers below, nearest first
    <root>/overlay2/<id>-init/          the layer directly below that of a container (image layers have none)
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from gpudock_server.model.engine import EngineContainer

_LAYER = re.compile(r"(?P<id>[0-9a-f]{64})/diff")
_SHORT_NAME = re.compile(r"[A-Z0-9]{26}")
# The engine makes at most 125 layers, of 29 characters each.
_SMALL_FILE_BYTES = 8192


class LayerRefusedError(Exception):
    """A layer cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A verified writable layer. `image_layers` are the short names of the layers of the image, nearest first."""

    path: str
    device: int
    inode: int
    image_layers: tuple[str, ...]


def find_layer(engine_root: str, path: str) -> Layer:
    """Verify and return the layer at `path` below the engine's data folder. Raises LayerRefusedError."""
    name = _require_layer_path(engine_root, path)
    try:
        with _open(engine_root) as root, _open("overlay2", root) as overlay, _open(name, overlay) as folder:
            return _verify_layout(path, name, overlay, folder)
    except OSError as error:
        raise LayerRefusedError(f"{path}: {error.strerror} ({error.filename})") from error


def layer_of(engine_root: str, container: EngineContainer, *, local: bool) -> Layer | str:
    """Return a container's writable layer, or why it is not accessible. `local`: the engine runs on this host."""
    if not local:
        return "the engine runs on another host"
    if container.storage_driver != "overlay2":
        return f"the engine's storage driver is {container.storage_driver or 'unknown'}, not overlay2"
    if not container.upper_dir:
        return "the engine does not report the path of the writable layer"
    try:
        return find_layer(engine_root, container.upper_dir)
    except LayerRefusedError as error:
        return str(error)


def _require_layer_path(engine_root: str, path: str) -> str:
    """Check the text of a layer's path; returns the id of the layer. Raises LayerRefusedError."""
    for description, text in (("the engine's data folder", engine_root), ("the layer's path", path)):
        if not text.startswith("/") or text.startswith("//") or "\0" in text or os.path.normpath(text) != text:
            raise LayerRefusedError(f"{description} must be an absolute, normalized path, got {text!r}")
    if engine_root == "/":
        raise LayerRefusedError("the engine's data folder must not be /")
    # The engine resolves symbolic links in its data folder at its start, so its paths may have either form.
    for root in (engine_root, os.path.realpath(engine_root)):
        found = _LAYER.fullmatch(path.removeprefix(f"{root}/overlay2/"))
        if found and path.startswith(f"{root}/overlay2/"):
            return found["id"]
    raise LayerRefusedError(f"{path!r} is not a container layer below {engine_root}/overlay2")


@contextmanager
def open_layer(engine_root: str, path: str) -> Iterator[int]:
    """A descriptor of the files of a layer, also of an image's, at a path from the engine.

    Raises LayerRefusedError for a path that is not a layer's, and OSError.
    """
    name = _require_layer_path(engine_root, path)
    with (
        _open(engine_root) as root,
        _open("overlay2", root) as overlay,
        _open(name, overlay) as folder,
        _open("diff", folder) as files,
    ):
        yield files


@contextmanager
def _open(name: str, parent: int | None = None) -> Iterator[int]:
    """Open a folder; below the engine's data folder no symbolic link is followed."""
    nofollow = 0 if parent is None else os.O_NOFOLLOW
    descriptor = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | nofollow, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _verify_layout(path: str, name: str, overlay: int, folder: int) -> Layer:
    diff = os.stat("diff", dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISDIR(diff.st_mode):
        raise LayerRefusedError(f"{path} is not a folder")
    link = _short_name(folder, path)
    target = os.readlink(f"l/{link}", dir_fd=overlay)
    linked = os.stat(f"l/{link}", dir_fd=overlay)
    if target != f"../{name}/diff" or (linked.st_dev, linked.st_ino) != (diff.st_dev, diff.st_ino):
        raise LayerRefusedError(f"{path}: its link l/{link} points to {target}")
    lower = _small_file(folder, "lower").split(":")
    with _open(f"{name}-init", overlay) as init:
        init_link = _short_name(init, f"{name}-init")
    if lower[0] != f"l/{init_link}":
        raise LayerRefusedError(f"{path} is not directly above its init layer, so it is not a container layer")
    return Layer(
        path=path,
        device=diff.st_dev,
        inode=diff.st_ino,
        image_layers=tuple(lower[1:]),
    )


def _short_name(folder: int, path: str) -> str:
    link = _small_file(folder, "link")
    if not _SHORT_NAME.fullmatch(link):
        raise LayerRefusedError(f"{path}: invalid short name {link[:40]!r} in its file link")
    return link


def _small_file(folder: int, name: str) -> str:
    with ExitStack() as stack:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
        stack.callback(os.close, descriptor)
        return os.read(descriptor, _SMALL_FILE_BYTES).decode("ascii", "replace").strip()
