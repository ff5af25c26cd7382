"""Folders of a tree by descriptors, one name at a time, so that no symbolic link is ever followed.

A container that runs can put a link where a folder was a moment ago; a path that the kernel resolves in one go would
then lead root to the host's own files.
"""

from __future__ import annotations

import os
from types import TracebackType
from typing import Self

from gpudock_server.adapters.layers.threads import Interrupt

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# However deep a tree is, no more folders than these are open at a time.
_OPEN_FOLDERS = 64


class Trail:
    """The way from a tree's root to the folder that is looked at; paths are relative, and "" is the root.

    Names are text as os.fsdecode gives it: bytes that are no UTF-8 become surrogates and lose nothing.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._opened: list[tuple[str, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()

    def leave(self) -> None:
        """Close every folder but the root."""
        while self._opened:
            os.close(self._opened.pop()[1])

    def enter(self, folder: str) -> int:
        """A descriptor of `folder`, good until the next call. Raises OSError; ELOOP or ENOTDIR for a link."""
        while self._opened and not _leads_to(self._opened[-1][0], folder):
            os.close(self._opened.pop()[1])
        passed, current = self._opened[-1] if self._opened else ("", self._root)
        rest = folder[len(passed) :].strip("/")
        for name in rest.split("/") if rest else ():
            current = os.open(name, FOLDER_FLAGS, dir_fd=current)
            passed = f"{passed}/{name}" if passed else name
            self._opened.append((passed, current))
            if len(self._opened) > _OPEN_FOLDERS:
                os.close(self._opened.pop(0)[1])
        return current


def _leads_to(passed: str, folder: str) -> bool:
    return folder == passed or folder.startswith(f"{passed}/")


def below(folder: str, name: str) -> str:
    """The path of `name` in `folder`."""
    return f"{folder}/{name}" if folder else name


def remove_entry(parent: int, name: str, interrupt: Interrupt) -> None:
    """Remove `name` from the folder `parent`, with all that is below it; nothing there is no error."""
    try:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return
    except IsADirectoryError:
        folder = os.open(name, FOLDER_FLAGS, dir_fd=parent)
        try:
            empty_folder(folder, interrupt)
        finally:
            os.close(folder)
        os.rmdir(name, dir_fd=parent)


def empty_folder(root: int, interrupt: Interrupt) -> None:
    """Remove everything below the folder `root`, however deep it goes."""
    found = [""]
    waiting = [""]
    with Trail(root) as trail:
        while waiting:
            folder = waiting.pop()
            here = trail.enter(folder)
            with os.scandir(here) as entries:
                for entry in entries:
                    interrupt.check()
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(below(folder, entry.name))
                        found.append(waiting[-1])
                    else:
                        os.unlink(entry.name, dir_fd=here)
        # Parents were found before their children.
        for folder in reversed(found[1:]):
            interrupt.check()
            parent, _, name = folder.rpartition("/")
            os.rmdir(name, dir_fd=trail.enter(parent))
