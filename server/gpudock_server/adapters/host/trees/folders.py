"""Open the folders of a tree by descriptors, one name at a time, so that no symbolic link is followed.

A running container can replace a folder by a link at any time; a path that the kernel resolves as a whole would then
lead root to files of the host. Folders are identified by numbers: the memory for the paths of all folders would grow
with the square of the depth.
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
# Maximum number of open folders, for trees of any depth.
_OPEN_FOLDERS = 64
_SHOWN_CHARACTERS = 200
# Maximum number of names of subfolders that a removal holds for each level of the tree.
_BATCH = 1000

# Errors of opening a folder that was removed or replaced meanwhile.
GONE_ERRNOS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE})


@dataclass
class FolderTree:
    """The folders of a tree by number. 0 is the root; all others have greater numbers than their parents.

    Names are decoded with os.fsdecode: bytes that are not UTF-8 become surrogates, so nothing is lost.
    """

    parents: list[int] = field(default_factory=lambda: [ROOT])
    names: list[str] = field(default_factory=lambda: [""])
    depths: list[int] = field(default_factory=lambda: [0])

    def __len__(self) -> int:
        return len(self.parents)

    def add(self, parent: int, name: str) -> int:
        """Add a folder and return its number."""
        self.parents.append(parent)
        self.names.append(name)
        self.depths.append(self.depths[parent] + 1)
        return len(self.parents) - 1

    def drop_last(self) -> None:
        """Remove the folder that was added last."""
        del self.parents[-1], self.names[-1], self.depths[-1]

    def shown(self, folder: int, name: str = "") -> str:
        """Return the path of a folder, or of `name` in it, for messages: escaped, and shortened at the front."""
        parts, length = [name] if name else [], len(name)
        while folder != ROOT and length < _SHOWN_CHARACTERS:
            parts.append(self.names[folder])
            length += len(parts[-1]) + 1
            folder = self.parents[folder]
        path = "/".join([*(["..."] if folder != ROOT else []), *reversed(parts)])
        return repr(f"/{path}")[1:-1]


class OpenFolders:
    """The open folders between the root of a tree and the current folder."""

    def __init__(self, root: int, tree: FolderTree) -> None:
        self._root = root
        self._tree = tree
        # Number -> descriptor; each folder is a descendant of the one before.
        self._opened: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all folders except the root."""
        while self._opened:
            os.close(self._opened.popitem()[1])

    def enter(self, folder: int) -> int:
        """Return a descriptor of `folder`, valid until the next call. Raises OSError; ELOOP or ENOTDIR for a link."""
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
    """Remove `name` from the folder `parent`, with everything below it; do nothing if it does not exist."""
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
    """Remove everything below the folder `root`, at any depth, with memory in proportion to the depth."""
    tree = FolderTree()
    with OpenFolders(root, tree) as open_folders:
        here = ROOT
        waiting = [_remove_files(root, interrupt)]
        while True:
            interrupt.check()
            names, partly = waiting[-1]
            if names:
                here = tree.add(here, names.pop())
                waiting.append(_remove_files(open_folders.enter(here), interrupt))
            elif partly:
                waiting[-1] = _remove_files(open_folders.enter(here), interrupt)
            elif here == ROOT:
                return
            else:
                waiting.pop()
                name, here = tree.names[here], tree.parents[here]
                tree.drop_last()
                os.rmdir(name, dir_fd=open_folders.enter(here))


def _remove_files(folder: int, interrupt: Interrupt) -> tuple[list[str], bool]:
    """Remove all files from an open folder; returns names of its subfolders, and whether there may be more."""
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
