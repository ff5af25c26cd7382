"""Opening a host path below the allow-list, without following any symbolic link."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class PathRefused(Exception):
    """A host path may not be mounted; the text says why."""


def below(path: str, allowed: Sequence[str]) -> bool:
    """Whether a path, as it is written, is one of the allowed folders or lies below one."""
    if not path.startswith("/") or path.startswith("//") or os.path.normpath(path) != path:
        return False
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in allowed)


@contextmanager
def opened(path: str, allowed: Sequence[str]) -> Iterator[int]:
    """A descriptor (O_PATH) of an allowed path, for as long as the context lasts. Raises PathRefused.

    Every part is opened relative to the one before and must not be a symbolic link, as openat2(2) does with
    RESOLVE_NO_SYMLINKS, on kernels before 5.6 as well. What the descriptor refers to stays the same file or folder
    whatever is renamed afterwards.
    """
    if not below(path, allowed):
        raise PathRefused("it does not lie below allowed_host_paths")
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open("/", flags | os.O_DIRECTORY)
    try:
        so_far = ""
        for part in filter(None, path.split("/")):
            so_far += f"/{part}"
            try:
                following = os.open(part, flags, dir_fd=descriptor)
            except OSError as error:
                raise PathRefused(f"{so_far}: {error.strerror}") from error
            os.close(descriptor)
            descriptor = following
            if stat.S_ISLNK(os.fstat(descriptor).st_mode):
                raise PathRefused(f"{so_far} is a symbolic link")
        yield descriptor
    finally:
        os.close(descriptor)
