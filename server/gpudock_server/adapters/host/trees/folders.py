"""Folders of a tree by descriptors, one name at a time, so that no symbolic link is ever followed.

A container that runs can put a link where a folder was a moment ago; a path that the kernel resolves in one go would
then lead root to the host's own files. Folders are known by numbers, not by paths: with the paths of all folders,
memory would grow with the square of the depth.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from gpudock_server.adapters.host.trees.interrupt import Interrupt

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
ROOT = 0
# However deep a tree is, no more folders than these are open at a time.
_OPEN_FOLDERS = 64
_SHOWN_CHARACTERS = 200
# Names of subfolders that a removal holds at a time, for each level of the tree.
_BATCH = 1000

# What opening a folder of a tree that changes meanwhile may end with.
GONE_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE})


@dataclass
class FolderTree:
    """The folders of a tree by number. 0 is the root; the number of any other is greater than its parent's.

    Names are text as os.fsdecode gives it: bytes that are no UTF-8 become surrogates and lose nothing.
    """

    parents: list[int] = field(default_factory=lambda: [ROOT])
    names: list[str] = field(default_factory=lambda: [""])
    depths: list[int] = field(default_factory=lambda: [0])

    def __len__(self) -> int:
        return len(self.parents)

    def add(self, parent: int, name: str) -> int:
        """The number of a folder that was not known before."""
        self.parents.append(parent)
        self.names.append(name)
        self.depths.append(self.depths[parent] + 1)
        return len(self.parents) - 1

    def drop_last(self) -> None:
        """Forget the folder that was added last."""
        del self.parents[-1], self.names[-1], self.depths[-1]

    def shown(self, folder: int, name: str = "") -> str:
        """The path of a folder, or of `name` in it, for a message: escaped, and long ones shortened at the front."""
        parts, length = [name] if name else [], len(name)
        while folder != ROOT and length < _SHOWN_CHARACTERS:
            parts.append(self.names[folder])
            length += len(parts[-1]) + 1
            folder = self.parents[folder]
        path = "/".join([*(["..."] if folder != ROOT else []), *reversed(parts)])
        return repr(f"/{path}")[1:-1]


class OpenFolders:
    """The open folders between a tree's root and the folder that is looked at."""

    def __init__(self, root: int, tree: FolderTree) -> None:
        self._root = root
        self._tree = tree
        # Number -> descriptor, each a descendant of the one before.
        self._opened: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every folder but the root."""
        while self._opened:
            os.close(self._opened.popitem()[1])

    def enter(self, folder: int) -> int:
        """A descriptor of `folder`, good until the next call. Raises OSError; ELOOP or ENOTDIR for a link."""
        opened, parents, names = self._opened, self._tree.parents, self._tree.names
        missing: list[int] = []
        while folder != ROOT and folder not in opened:
            missing.append(folder)
            folder = parents[folder]
        while opened and next(reversed(opened)) != folder:
            os.close(opened.popitem()[1])
        current = opened[folder] if opened else self._root
        for each in reversed(missing):
            current = os.open(names[each], FOLDER_FLAGS, dir_fd=current)
            opened[each] = current
            if len(opened) > _OPEN_FOLDERS:
                os.close(opened.pop(next(iter(opened))))
        return current


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
    """Remove everything below the folder `root`, however deep it goes, with memory in proportion to the depth."""
    tree = FolderTree()
    with OpenFolders(root, tree) as open_folders:
        here = ROOT
        waiting = [_emptied_of_files(root, interrupt)]
        while True:
            interrupt.check()
            names, partly = waiting[-1]
            if names:
                here = tree.add(here, names.pop())
                waiting.append(_emptied_of_files(open_folders.enter(here), interrupt))
            elif partly:
                waiting[-1] = _emptied_of_files(open_folders.enter(here), interrupt)
            elif here == ROOT:
                return
            else:
                waiting.pop()
                name, here = tree.names[here], tree.parents[here]
                tree.drop_last()
                os.rmdir(name, dir_fd=open_folders.enter(here))


def _emptied_of_files(folder: int, interrupt: Interrupt) -> tuple[list[str], bool]:
    """Remove all from an open folder but its subfolders; return names of those, and whether there may be more."""
    subfolders: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            interrupt.check()
            if entry.is_dir(follow_symlinks=False):
                subfolders.append(entry.name)
                if len(subfolders) == _BATCH:
                    return subfolders, True
            else:
                os.unlink(entry.name, dir_fd=folder)
    return subfolders, False
