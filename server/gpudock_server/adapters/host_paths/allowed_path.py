"""Opening a host path below the allow-list, without following any symbolic link."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class PathNotAllowed(Exception):
    """A host path may not be mounted; the text says why."""


def not_allowed_reason(path: str, allowed: Sequence[str]) -> str:
    """Why a path, as it is written, is none of the allowed folders and does not lie below one; empty if it does."""
    if not path.startswith("/"):
        return "it is not absolute"
    # normpath leaves two slashes at the front.
    plain = os.path.normpath(path.replace("//", "/", 1) if path.startswith("//") else path)
    if plain != path:
        # With `..` in it, what it comes to depends on what lies there, so it is not named.
        instead = "" if ".." in path.split("/") else f"; write {plain}"
        return f"its spelling is not plain: no `//`, `.`, `..` or `/` at the end{instead}"
    return "" if _is_allowed(path, allowed) else "it does not lie below allowed_host_paths"


def is_allowed(path: str, allowed: Sequence[str]) -> bool:
    """Whether a path, as it is written, is one of the allowed folders or lies below one."""
    return not not_allowed_reason(path, allowed)


def _is_allowed(path: str, allowed: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in allowed)


@contextmanager
def open_allowed(path: str, allowed: Sequence[str]) -> Iterator[int]:
    """A descriptor (O_PATH) of an allowed path, for as long as the context lasts. Raises PathNotAllowed.

    Every part is opened relative to the one before and must not be a symbolic link, as openat2(2) does with
    RESOLVE_NO_SYMLINKS, on kernels before 5.6 as well. What the descriptor refers to stays the same file or folder
    whatever is renamed afterwards.
    """
    if why := not_allowed_reason(path, allowed):
        raise PathNotAllowed(why)
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open("/", flags | os.O_DIRECTORY)
    try:
        so_far = ""
        for part in filter(None, path.split("/")):
            so_far += f"/{part}"
            try:
                following = os.open(part, flags, dir_fd=descriptor)
            except OSError as error:
                raise PathNotAllowed(f"{so_far}: {error.strerror}") from error
            os.close(descriptor)
            descriptor = following
            if stat.S_ISLNK(os.fstat(descriptor).st_mode):
                raise PathNotAllowed(f"{so_far} is a symbolic link")
        yield descriptor
    finally:
        os.close(descriptor)
