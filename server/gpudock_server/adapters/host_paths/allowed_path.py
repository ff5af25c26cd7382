"""Open an allowed host path without following symbolic links."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class PathNotAllowed(Exception):
    """A host path may not be mounted; the message says why."""


def not_allowed_reason(path: str, allowed: Sequence[str]) -> str:
    """Why the text of a path is not allowed; empty if it is one of the allowed folders, or below one."""
    if not path.startswith("/"):
        return "host path must be absolute"
    # normpath keeps two leading slashes.
    plain = os.path.normpath(path.replace("//", "/", 1) if path.startswith("//") else path)
    if plain != path:
        # With `..` the result depends on symbolic links, so no other path is suggested.
        suggestion = "" if ".." in path.split("/") else f"; use {plain}"
        return f"host path must not contain `//`, `.`, `..` or end in `/`{suggestion}"
    return "" if _is_allowed(path, allowed) else "not below any of allowed_host_paths"


def is_allowed(path: str, allowed: Sequence[str]) -> bool:
    """Whether the text of a path is one of the allowed folders, or below one."""
    return not not_allowed_reason(path, allowed)


def _is_allowed(path: str, allowed: Sequence[str]) -> bool:
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in allowed)


@contextmanager
def open_allowed(path: str, allowed: Sequence[str]) -> Iterator[int]:
    """Open an allowed path (O_PATH). Raises PathNotAllowed.

    Every part is opened relative to the one before and must not be a symbolic link, like openat2(2) with
    RESOLVE_NO_SYMLINKS, but also on kernels before 5.6. The descriptor refers to the same file or folder even if paths
    are renamed afterwards.
    """
    if reason := not_allowed_reason(path, allowed):
        raise PathNotAllowed(reason)
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open("/", flags | os.O_DIRECTORY)
    try:
        opened = ""
        for part in filter(None, path.split("/")):
            opened += f"/{part}"
            try:
                child = os.open(part, flags, dir_fd=descriptor)
            except OSError as error:
                raise PathNotAllowed(f"{opened}: {error.strerror}") from error
            os.close(descriptor)
            descriptor = child
            if stat.S_ISLNK(os.fstat(descriptor).st_mode):
                raise PathNotAllowed(f"{opened} is a symbolic link")
        yield descriptor
    finally:
        os.close(descriptor)
