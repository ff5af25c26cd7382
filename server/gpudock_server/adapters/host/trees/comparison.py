"""Whether two trees are the same in everything but the bytes inside their files.

Contents are not read again: copying reports every read and write that fails. What it can lose without a word is what is
compared: an opaque directory's mark, a whiteout, a hard link, an owner, a hole. The two trees are walked side by
side, so that memory is bounded by the widest directory and the number of hard-linked files, and a difference is
found at its name.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice

from gpudock_server.adapters.host.trees.folders import FOLDER_FLAGS, ROOT, FolderTree, OpenFolders
from gpudock_server.adapters.host.trees.interrupt import Interrupt

# Filesystems round and preallocate differently; a hole of less than this that was filled is no loss.
_BLOCK_BYTES = 512
_HOLE_TOLERANCE_BYTES = 1 << 20
_NO_XATTRS = frozenset({errno.ENOTSUP, errno.ENODATA})


def differences(old: str, new: str, interrupt: Interrupt, limit: int = 5) -> list[str]:
    """The first few differences between two trees, each as a path and what differs there; empty when equal.

    Compared are: the names; type, mode, owner and group, times of modification (ns), device numbers, the targets of
    symbolic links, sizes, extended attributes (the trusted ones too), which names share an inode, and whether sparse
    files still are. The roots themselves are compared too. Raises OSError, Interrupted.
    """
    with _opened(old) as one, _opened(new) as other:
        return list(islice(_Comparison(one, other, interrupt).run(), limit))


@contextmanager
def _opened(root: str) -> Iterator[int]:
    descriptor = os.open(root, FOLDER_FLAGS)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@dataclass
class _Comparison:
    """`old` and `new` are the open roots."""

    old: int
    new: int
    interrupt: Interrupt
    folder_tree: FolderTree = field(default_factory=FolderTree)
    numbers: Iterator[int] = field(default_factory=count)
    # Inode -> which of all entries had it first, in either tree; the trees are walked in one order, so they must agree.
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
        """Each difference in a folder with False, and each name of a folder that both have with True."""
        before, after = _names(here), _names(there)
        for name in sorted(before | after):
            self.interrupt.check()
            if name not in after:
                yield f"{self.folder_tree.shown(folder, name)} is missing", False
            elif name not in before:
                yield f"{self.folder_tree.shown(folder, name)} is there for no reason", False
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
        if _xattrs(f"/proc/self/fd/{self.old}/.") != _xattrs(f"/proc/self/fd/{self.new}/."):
            what.append("extended attributes")
        return what

    def _entry(self, name: str, one: tuple[int, os.stat_result], other: tuple[int, os.stat_result]) -> list[str]:
        """In what an entry differs; of each tree the open folder that it is in, and its status."""
        here, old = one
        there, new = other
        what = [fact for fact, before, after in _attributes(old, new) if before != after]
        if _lost_holes(old, new):
            what.append("holes")
        both_links = stat.S_ISLNK(old.st_mode) and stat.S_ISLNK(new.st_mode)
        if both_links and os.readlink(name, dir_fd=here) != os.readlink(name, dir_fd=there):
            what.append("target")
        if _xattrs(f"/proc/self/fd/{here}/{name}") != _xattrs(f"/proc/self/fd/{there}/{name}"):
            what.append("extended attributes")
        if not self._same_links(old, new):
            what.append("hard links")
        return what

    def _same_links(self, old: os.stat_result, new: os.stat_result) -> bool:
        # The kernel hard-links whiteouts to each other as it likes (since 5.8); they mean the same either way.
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
    if not stat.S_ISDIR(old.st_mode):  # a directory's size is its history
        yield "size", old.st_size, new.st_size


def _lost_holes(old: os.stat_result, new: os.stat_result) -> bool:
    if not stat.S_ISREG(old.st_mode):
        return False
    before, after = old.st_blocks * _BLOCK_BYTES, new.st_blocks * _BLOCK_BYTES
    return before < old.st_size and after > 2 * before + _HOLE_TOLERANCE_BYTES


def _xattrs(path: str) -> dict[str, bytes]:
    """The attributes of an entry, by a path through an open folder's descriptor; a link at its end is not followed."""
    try:
        return {
            name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
        }
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return {}
        raise
