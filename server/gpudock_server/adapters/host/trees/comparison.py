"""Compare two trees in everything except the bytes in their files.

File contents are not read again: the copy reports every failed read and write. Compared is what a copy can lose without
an error: opaque directories, whiteouts, hard links, owners, holes. Both trees are walked side by side, so that memory
is bounded by the widest directory and the number of hard-linked files.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice

from gpudock_server.adapters.host.filesystem import open_directory
from gpudock_server.adapters.host.trees.folders import ROOT, FolderTree, OpenFolders
from gpudock_server.adapters.host.trees.interrupt import Interrupt
from gpudock_server.adapters.host.trees.xattrs import read_xattrs

# Filesystems round and preallocate differently; a filled hole smaller than this does not count.
_BLOCK_BYTES = 512
_HOLE_TOLERANCE_BYTES = 1 << 20


def differences(old: str, new: str, interrupt: Interrupt, limit: int = 5) -> list[str]:
    """Return the first differences between two trees, each as a path and what differs; empty if the trees are equal.

    Compares names, type, mode, owner, group, modification time (ns), device number, target of symbolic links, size,
    extended attributes (including trusted.*), which names share an inode, and holes; also of the roots. Raises OSError,
    Interrupted.
    """
    with open_directory(old) as old_root, open_directory(new) as new_root:
        return list(islice(_Comparison(old_root, new_root, interrupt).run(), limit))


@dataclass
class _Comparison:
    """A comparison; `old` and `new` are the open roots."""

    old: int
    new: int
    interrupt: Interrupt
    folder_tree: FolderTree = field(default_factory=FolderTree)
    numbers: Iterator[int] = field(default_factory=count)
    # Inode -> number of the first entry with it. Both trees are walked in the same order, so the numbers must be equal.
    old_links: dict[int, int] = field(default_factory=dict)
    new_links: dict[int, int] = field(default_factory=dict)

    def run(self) -> Iterator[str]:
        with OpenFolders(self.old, self.folder_tree) as old, OpenFolders(self.new, self.folder_tree) as new:
            what = self._roots()
            if what:
                yield f"/ differs in {', '.join(what)}"
            waiting: list[tuple[int, str]] = [(ROOT, "")]
            while waiting:
                parent, name = waiting.pop()
                folder = self.folder_tree.add(parent, name) if name else ROOT
                here, there = old.enter(folder), new.enter(folder)
                for found, is_folder in self._folder(folder, here, there):
                    if is_folder:
                        waiting.append((folder, found))
                    else:
                        yield found

    def _folder(self, folder: int, here: int, there: int) -> Iterator[tuple[str, bool]]:
        """Iterate over the differences in a folder, with False, and the names of common subfolders, with True."""
        before, after = _names(here), _names(there)
        for name in sorted(before | after):
            self.interrupt.check()
            if name not in after:
                yield f"{self.folder_tree.shown(folder, name)} is missing", False
            elif name not in before:
                yield f"{self.folder_tree.shown(folder, name)} is unexpected", False
            else:
                old = os.stat(name, dir_fd=here, follow_symlinks=False)
                new = os.stat(name, dir_fd=there, follow_symlinks=False)
                what = self._entry(name, (here, old), (there, new))
                if what:
                    yield f"{self.folder_tree.shown(folder, name)} differs in {', '.join(what)}", False
                if stat.S_ISDIR(old.st_mode) and stat.S_ISDIR(new.st_mode):
                    yield name, True

    def _roots(self) -> list[str]:
        old, new = os.fstat(self.old), os.fstat(self.new)
        what = [fact for fact, one, other in _attributes(old, new) if one != other]
        if _xattrs(self.old, ".") != _xattrs(self.new, "."):
            what.append("extended attributes")
        return what

    def _entry(self, name: str, one: tuple[int, os.stat_result], other: tuple[int, os.stat_result]) -> list[str]:
        """Return what differs in an entry, given its open folder and its status in each tree."""
        here, old = one
        there, new = other
        what = [fact for fact, before, after in _attributes(old, new) if before != after]
        if _lost_holes(old, new):
            what.append("holes")
        both_links = stat.S_ISLNK(old.st_mode) and stat.S_ISLNK(new.st_mode)
        if both_links and os.readlink(name, dir_fd=here) != os.readlink(name, dir_fd=there):
            what.append("target")
        if _xattrs(here, name) != _xattrs(there, name):
            what.append("extended attributes")
        if not self._same_links(old, new):
            what.append("hard links")
        return what

    def _same_links(self, old: os.stat_result, new: os.stat_result) -> bool:
        # Since 5.8 the kernel may hard-link whiteouts to each other; that does not change their meaning.
        if stat.S_ISDIR(old.st_mode) or stat.S_ISCHR(old.st_mode) or max(old.st_nlink, new.st_nlink) == 1:
            return True
        number = next(self.numbers)
        return self.old_links.setdefault(old.st_ino, number) == self.new_links.setdefault(new.st_ino, number)


def _names(folder: int) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}


def _attributes(old: os.stat_result, new: os.stat_result) -> Iterator[tuple[str, int, int]]:
    yield "type", stat.S_IFMT(old.st_mode), stat.S_IFMT(new.st_mode)
    yield "mode", stat.S_IMODE(old.st_mode), stat.S_IMODE(new.st_mode)
    yield "owner", old.st_uid, new.st_uid
    yield "group", old.st_gid, new.st_gid
    yield "time of modification", old.st_mtime_ns, new.st_mtime_ns
    yield "device number", old.st_rdev, new.st_rdev
    if not stat.S_ISDIR(old.st_mode):  # the size of a directory depends on its history
        yield "size", old.st_size, new.st_size


def _lost_holes(old: os.stat_result, new: os.stat_result) -> bool:
    if not stat.S_ISREG(old.st_mode):
        return False
    before, after = old.st_blocks * _BLOCK_BYTES, new.st_blocks * _BLOCK_BYTES
    return before < old.st_size and after > 2 * before + _HOLE_TOLERANCE_BYTES


def _xattrs(folder: int, name: str) -> dict[str, bytes]:
    return read_xattrs(f"/proc/self/fd/{folder}/{name}", follow=False)
