"""What a folder must show before it is taken for a container's writable layer.

The engine's answer names a path, and root then renames or deletes what lies there. So the path is believed only when
the layout of the overlay2 driver around it says the same (moby, daemon/graphdriver/overlay2/overlay.go):

    <root>/overlay2/<id>/diff           the layer's own files; <id> is 64 hex digits
    <root>/overlay2/<id>/link           a short name of it, 26 characters
    <root>/overlay2/l/<short name>      a symbolic link to ../<id>/diff
    <root>/overlay2/<id>/lower          the short names of the layers below, the nearest first
    <root>/overlay2/<id>-init/          the layer right below a container's (never below an image's)
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
# 125 layers of 29 characters each are the deepest that the engine makes.
_SMALL_FILE_BYTES = 8192


class LayerRefusedError(Exception):
    """A path is not what a container's writable layer looks like; the text says in what."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A writable layer that passed the checks. `image_layers` are the short names of the image's, nearest first."""

    path: str
    device: int
    inode: int
    image_layers: tuple[str, ...]


def find_layer(engine_root: str, path: str) -> Layer:
    """The layer at `path` below the engine's data folder. Raises LayerRefusedError; changes nothing."""
    name = _require_layer_path(engine_root, path)
    try:
        with _opened(engine_root) as root, _opened("overlay2", root) as overlay, _opened(name, overlay) as folder:
            return _verify_layout(path, name, overlay, folder)
    except OSError as error:
        raise LayerRefusedError(f"{path}: {error.strerror} ({error.filename})") from error


def layer_of(engine_root: str, container: EngineContainer, *, local: bool) -> Layer | str:
    """A container's writable layer, or why it is not to be seen. `local`: the engine's paths are this host's."""
    if not local:
        return "the engine runs on another host"
    if container.storage_driver != "overlay2":
        return f"the engine's storage driver is {container.storage_driver or 'unknown'}, not overlay2"
    if not container.upper_dir:
        return "the engine does not show where the writable layer is"
    try:
        return find_layer(engine_root, container.upper_dir)
    except LayerRefusedError as error:
        return str(error)


def _require_layer_path(engine_root: str, path: str) -> str:
    """The layer's id, when the path's text alone says that it lies where layers lie."""
    for which, text in (("the engine's data folder", engine_root), ("the layer's path", path)):
        if not text.startswith("/") or text.startswith("//") or "\0" in text or os.path.normpath(text) != text:
            raise LayerRefusedError(f"{which} is {text!r}, which is not an absolute, normalized path")
    if engine_root == "/":
        raise LayerRefusedError("the engine's data folder is the root of the filesystem")
    # The engine resolves its data folder's links once, at its start; what it then answers has either form.
    for root in (engine_root, os.path.realpath(engine_root)):
        found = _LAYER.fullmatch(path.removeprefix(f"{root}/overlay2/"))
        if found and path.startswith(f"{root}/overlay2/"):
            return found["id"]
    raise LayerRefusedError(f"{path!r} is not a container's folder below {engine_root}/overlay2")


@contextmanager
def opened_layer(engine_root: str, path: str) -> Iterator[int]:
    """A descriptor of the files of any layer, an image's too, at a path that the engine named.

    Raises LayerRefusedError for a path that is none of a layer, and OSError.
    """
    name = _require_layer_path(engine_root, path)
    with (
        _opened(engine_root) as root,
        _opened("overlay2", root) as overlay,
        _opened(name, overlay) as folder,
        _opened("diff", folder) as files,
    ):
        yield files


@contextmanager
def _opened(name: str, parent: int | None = None) -> Iterator[int]:
    """A folder's descriptor; below the engine's root no symbolic link is followed."""
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
        raise LayerRefusedError(f"{path}: its link l/{link} leads to {target}")
    lower = _small_file(folder, "lower").split(":")
    with _opened(f"{name}-init", overlay) as init:
        init_link = _short_name(init, f"{name}-init")
    if lower[0] != f"l/{init_link}":
        raise LayerRefusedError(f"{path} does not lie on its own init layer, so it is no container's")
    return Layer(
        path=path,
        device=diff.st_dev,
        inode=diff.st_ino,
        image_layers=tuple(lower[1:]),
    )


def _short_name(folder: int, path: str) -> str:
    link = _small_file(folder, "link")
    if not _SHORT_NAME.fullmatch(link):
        raise LayerRefusedError(f"{path}: the link file beside it holds {link[:40]!r}")
    return link


def _small_file(folder: int, name: str) -> str:
    with ExitStack() as stack:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
        stack.callback(os.close, descriptor)
        return os.read(descriptor, _SMALL_FILE_BYTES).decode("ascii", "replace").strip()
