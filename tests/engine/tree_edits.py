"""Random edits of a tree, of all the kinds that a container can make to its layer, and some that only root can."""

# Its names are bytes, because not every one is text; its modes are odd on purpose.
# An edit's name says what it does.
# ruff: noqa: D102, PTH101, PTH102, PTH104, PTH108, PTH112, PTH114, PTH116, PTH123, PTH208, PTH211
from __future__ import annotations

import mmap
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress

_NAMES = (b"a", b"b", b"c\xff\n", b"d")
_MOST_DEPTH = 4


class EditedTree:
    """A folder that is edited at random. Memory that is mapped from its files stays mapped until `close`."""

    def __init__(self, root: str) -> None:
        self._root = os.fsencode(root)
        self._mapped: list[tuple[mmap.mmap, int]] = []
        self._count = 0

    def close(self) -> None:
        """Unmap everything."""
        for memory, file in self._mapped:
            memory.close()
            os.close(file)
        self._mapped.clear()

    def edit(self, kind: int, one: int, other: int) -> None:
        """One edit; what cannot be done where the numbers point is left undone."""
        self._count += 1
        with suppress(FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError):
            EDITS[kind % len(EDITS)](self, one, other)

    def _all(self) -> list[bytes]:
        found = [self._root]
        for folder in found:
            if os.path.isdir(folder) and not os.path.islink(folder):
                found += [folder + b"/" + name for name in sorted(os.listdir(folder))]
        return found

    def _folder(self, number: int) -> bytes:
        folders = [path for path in self._all() if stat.S_ISDIR(os.lstat(path).st_mode)]
        folders = [path for path in folders if path[len(self._root) :].count(b"/") < _MOST_DEPTH]
        return folders[number % len(folders)]

    def _some(self, number: int, *, files: bool = False) -> bytes:
        paths = self._all()[1:]
        if files:
            paths = [path for path in paths if stat.S_ISREG(os.lstat(path).st_mode)]
        if not paths:
            raise FileNotFoundError
        return paths[number % len(paths)]

    def _new(self, one: int, other: int) -> bytes:
        return self._folder(one) + b"/" + _NAMES[other % len(_NAMES)]

    def _content(self, size: int) -> bytes:
        return (b"%08d" % self._count) * (size // 8 + 1)

    def write(self, one: int, other: int) -> None:
        path = self._new(one, other)
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            return  # a fifo would wait for its reader
        with open(path, "wb") as file:
            file.write(self._content(other % 10_000))

    def rewrite_and_hide(self, one: int, _other: int) -> None:
        """The same size and mtime as before, which a quick check by those does not see."""
        path = self._some(one, files=True)
        before = os.stat(path)
        with open(path, "r+b") as file:
            file.write(self._content(before.st_size)[: before.st_size])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def append(self, one: int, other: int) -> None:
        with open(self._some(one, files=True), "ab") as file:
            file.write(self._content(other % 3000))

    def punch(self, one: int, other: int) -> None:
        with open(self._some(one, files=True), "r+b") as file:
            file.truncate(other % 9 * 100_000)

    def store(self, one: int, other: int) -> None:
        """Through memory that is mapped already, if there is any, as often as not."""
        if not self._mapped or other % 2:
            file = os.open(self._some(one, files=True), os.O_RDWR)
            if os.fstat(file).st_size == 0:
                os.close(file)
                return
            self._mapped.append((mmap.mmap(file, 0), file))
        memory, file = self._mapped[other % len(self._mapped)]
        if os.fstat(file).st_size >= len(memory):  # beyond the end of a file that was cut lies a SIGBUS
            memory[:8] = self._content(8)[: min(8, len(memory))].ljust(8)[: len(memory[:8])]

    def remove(self, one: int, _other: int) -> None:
        path = self._some(one)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)

    def make_folder(self, one: int, other: int) -> None:
        os.mkdir(self._new(one, other), 0o750)

    def link(self, one: int, other: int) -> None:
        path = self._some(other)
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.link(path, self._new(one, one + other), follow_symlinks=False)

    def rename(self, one: int, other: int) -> None:
        self._move(self._some(one), self._new(other, one))

    def swap(self, one: int, other: int) -> None:
        """Two entries, folders with all that is in them too, change places: no ctime below them changes."""
        first, second = self._some(one), self._some(other)
        if first + b"/" in second + b"/" or second + b"/" in first + b"/":
            return
        os.rename(first, self._root + b"/swapped")
        os.rename(second, first)
        os.rename(self._root + b"/swapped", second)

    def attribute(self, one: int, other: int) -> None:
        path = self._some(one)
        status = os.lstat(path)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
            return  # a whiteout: it says that there is nothing, and the kernel gives it no attributes
        name = "trusted.overlay.opaque" if other % 2 else "trusted.other"
        if other % 3:
            os.setxattr(path, name, b"%d" % other, follow_symlinks=False)
        elif name in os.listxattr(path, follow_symlinks=False):
            os.removexattr(path, name, follow_symlinks=False)

    def mode(self, one: int, other: int) -> None:
        path = self._some(one)
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            os.chmod(path, (0o755, 0o4711, 0o000, 0o1777, 0o2750)[other % 5])

    def owner(self, one: int, other: int) -> None:
        os.chown(self._some(one), other % 70_000, one % 70_000, follow_symlinks=False)

    def age(self, one: int, other: int) -> None:
        os.utime(self._some(one), ns=(other, other * 1_000_003), follow_symlinks=False)

    def symlink(self, one: int, other: int) -> None:
        os.symlink(self._content(other % 200), self._new(one, other))

    def special(self, one: int, other: int) -> None:
        kind = (stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR)[other % 4]
        os.mknod(self._new(one, one), kind | 0o640, os.makedev(1, 3) if other % 4 == 3 else 0)

    def become_other(self, one: int, other: int) -> None:
        """A folder becomes a file, and a file a folder."""
        path = self._some(one)
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
            with open(path, "wb") as file:
                file.write(self._content(other % 100))
        else:
            os.unlink(path)
            os.mkdir(path)
            os.mkdir(path + b"/a")

    def _move(self, path: bytes, to: bytes) -> None:
        if not (to + b"/").startswith(path + b"/"):
            with suppress(OSError):  # onto a folder that is not empty
                os.rename(path, to)


EDITS: tuple[Callable[[EditedTree, int, int], None], ...] = (
    EditedTree.write,
    EditedTree.write,
    EditedTree.make_folder,
    EditedTree.rewrite_and_hide,
    EditedTree.append,
    EditedTree.punch,
    EditedTree.store,
    EditedTree.remove,
    EditedTree.link,
    EditedTree.rename,
    EditedTree.swap,
    EditedTree.attribute,
    EditedTree.mode,
    EditedTree.owner,
    EditedTree.age,
    EditedTree.symlink,
    EditedTree.special,
    EditedTree.become_other,
)
