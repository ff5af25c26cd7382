"""Whether two trees are the same in everything but the bytes inside their files.

Contents are not read again: cp reports every read and write that fails. What it can lose without a word is what is
compared: an opaque directory's mark, a whiteout, a hard link, an owner, a hole. The two trees are walked side by
side, so that memory is bounded by the widest directory and the number of hard-linked files, and a difference is
found at its name.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from gpudock_server.adapters.layers.threads import Interrupt

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
    return list(islice(_Comparison(os.fsencode(old), os.fsencode(new), interrupt).run(), limit))


@dataclass
class _Comparison:
    old: bytes
    new: bytes
    interrupt: Interrupt
    # Inode -> the first name found for it, in either tree; the trees are walked in one order, so they must agree.
    old_links: dict[int, bytes] = field(default_factory=dict)
    new_links: dict[int, bytes] = field(default_factory=dict)

    def run(self) -> Iterator[str]:
        yield from self._entry(b"")
        folders = [b""]
        while folders:
            folder = folders.pop()
            here, there = self._names(self.old, folder), self._names(self.new, folder)
            for name in sorted(here | there):
                self.interrupt.check()
                path = folder + b"/" + name
                if name not in there:
                    yield f"{_shown(path)} is missing"
                elif name not in here:
                    yield f"{_shown(path)} is there for no reason"
                else:
                    yield from self._entry(path)
                    if stat.S_ISDIR(os.lstat(self.old + path).st_mode) and stat.S_ISDIR(
                        os.lstat(self.new + path).st_mode
                    ):
                        folders.append(path)

    def _names(self, root: bytes, folder: bytes) -> set[bytes]:
        with os.scandir(root + folder) as entries:
            return {entry.name for entry in entries}

    def _entry(self, path: bytes) -> Iterator[str]:
        old, new = os.lstat(self.old + path), os.lstat(self.new + path)
        what = [name for name, one, other in _facts(old, new) if one != other]
        if _filled(old, new):
            what.append("holes")
        if stat.S_ISLNK(old.st_mode) and _target(self.old + path) != _target(self.new + path):
            what.append("target")
        if _xattrs(self.old + path) != _xattrs(self.new + path):
            what.append("extended attributes")
        if not self._same_links(path, old, new):
            what.append("hard links")
        if what:
            yield f"{_shown(path)} differs in {', '.join(what)}"

    def _same_links(self, path: bytes, old: os.stat_result, new: os.stat_result) -> bool:
        # The kernel hard-links whiteouts to each other as it likes (since 5.8); they mean the same either way.
        if stat.S_ISDIR(old.st_mode) or stat.S_ISCHR(old.st_mode) or max(old.st_nlink, new.st_nlink) == 1:
            return True
        return self.old_links.setdefault(old.st_ino, path) == self.new_links.setdefault(new.st_ino, path)


def _facts(old: os.stat_result, new: os.stat_result) -> Iterator[tuple[str, int, int]]:
    yield "type", stat.S_IFMT(old.st_mode), stat.S_IFMT(new.st_mode)
    yield "mode", stat.S_IMODE(old.st_mode), stat.S_IMODE(new.st_mode)
    yield "owner", old.st_uid, new.st_uid
    yield "group", old.st_gid, new.st_gid
    yield "time of modification", old.st_mtime_ns, new.st_mtime_ns
    yield "device number", old.st_rdev, new.st_rdev
    if not stat.S_ISDIR(old.st_mode):  # a directory's size is its history
        yield "size", old.st_size, new.st_size


def _filled(old: os.stat_result, new: os.stat_result) -> bool:
    if not stat.S_ISREG(old.st_mode):
        return False
    before, after = old.st_blocks * _BLOCK_BYTES, new.st_blocks * _BLOCK_BYTES
    return before < old.st_size and after > 2 * before + _HOLE_TOLERANCE_BYTES


def _target(path: bytes) -> bytes:
    return os.readlink(path)  # noqa: PTH115 - names are bytes here: not every one is text


def _xattrs(path: bytes) -> dict[str, bytes]:
    try:
        return {
            name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
        }
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return {}
        raise


def _shown(path: bytes) -> str:
    """A name as it can stand in a message: control characters and bytes that are no UTF-8 are escaped."""
    return repr(os.fsdecode(path) or "/")[1:-1]
