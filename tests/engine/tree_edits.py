"""Random edits of a tree: every kind that a container can make to its layer, and some that only root can make."""

# Paths are bytes, because not every name is UTF-8. The name of an edit is its documentation.
# ruff: noqa: D102, PTH101, PTH102, PTH104, PTH108, PTH112, PTH114, PTH116, PTH123, PTH208, PTH211
from __future__ import annotations

import mmap
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress

_NAMES = (b"a", b"b", b"c\xff\n", b"d")
_MAX_DEPTH = 4


class EditedTree:
    """A folder that is edited at random. Each edit takes two random numbers, which choose paths and values.

    Memory that is mapped from its files stays mapped until `close`.
    """

    def __init__(self, root: str) -> None:
        self._root = os.fsencode(root)
        self._mapped: list[tuple[mmap.mmap, int]] = []
        self._count = 0

    def close(self) -> None:
        """Unmap all memory."""
        for memory, file in self._mapped:
            memory.close()
            os.close(file)
        self._mapped.clear()

    def edit(self, kind: int, first: int, second: int) -> None:
        """Make one edit, unless it is impossible for the paths that the numbers choose."""
        self._count += 1
        with suppress(FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError):
            EDITS[kind % len(EDITS)](self, first, second)

    def _all_paths(self) -> list[bytes]:
        paths = [self._root]
        for folder in paths:
            if os.path.isdir(folder) and not os.path.islink(folder):
                paths += [folder + b"/" + name for name in sorted(os.listdir(folder))]
        return paths

    def _folder(self, number: int) -> bytes:
        folders = [path for path in self._all_paths() if stat.S_ISDIR(os.lstat(path).st_mode)]
        folders = [path for path in folders if path[len(self._root) :].count(b"/") < _MAX_DEPTH]
        return folders[number % len(folders)]

    def _existing_path(self, number: int, *, files: bool = False) -> bytes:
        paths = self._all_paths()[1:]
        if files:
            paths = [path for path in paths if stat.S_ISREG(os.lstat(path).st_mode)]
        if not paths:
            raise FileNotFoundError
        return paths[number % len(paths)]

    def _new_path(self, first: int, second: int) -> bytes:
        return self._folder(first) + b"/" + _NAMES[second % len(_NAMES)]

    def _content(self, size: int) -> bytes:
        return (b"%08d" % self._count) * (size // 8 + 1)

    def write(self, first: int, second: int) -> None:
        path = self._new_path(first, second)
        if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
            return  # Opening a FIFO waits for a reader.
        with open(path, "wb") as file:
            file.write(self._content(second % 10_000))

    def rewrite_with_old_time(self, first: int, _second: int) -> None:
        """Write other content of the same size, and restore the modification time."""
        path = self._existing_path(first, files=True)
        before = os.stat(path)
        with open(path, "r+b") as file:
            file.write(self._content(before.st_size)[: before.st_size])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    def append(self, first: int, second: int) -> None:
        with open(self._existing_path(first, files=True), "ab") as file:
            file.write(self._content(second % 3000))

    def truncate(self, first: int, second: int) -> None:
        with open(self._existing_path(first, files=True), "r+b") as file:
            file.truncate(second % 9 * 100_000)

    def write_through_mapping(self, first: int, second: int) -> None:
        """Write to the mapped memory of a file: half of the time to memory that an earlier edit mapped, if any."""
        if not self._mapped or second % 2:
            file = os.open(self._existing_path(first, files=True), os.O_RDWR)
            if os.fstat(file).st_size == 0:
                os.close(file)
                return
            self._mapped.append((mmap.mmap(file, 0), file))
        memory, file = self._mapped[second % len(self._mapped)]
        if os.fstat(file).st_size >= len(memory):  # Access beyond the end of the file causes SIGBUS.
            memory[:8] = self._content(8)[: min(8, len(memory))].ljust(8)[: len(memory[:8])]

    def remove(self, first: int, _second: int) -> None:
        path = self._existing_path(first)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)

    def make_folder(self, first: int, second: int) -> None:
        os.mkdir(self._new_path(first, second), 0o750)

    def link(self, first: int, second: int) -> None:
        path = self._existing_path(second)
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            os.link(path, self._new_path(first, first + second), follow_symlinks=False)

    def rename(self, first: int, second: int) -> None:
        self._move(self._existing_path(first), self._new_path(second, first))

    def exchange(self, first: int, second: int) -> None:
        """Exchange two entries; if they are folders, no ctime below them changes."""
        path, other_path = self._existing_path(first), self._existing_path(second)
        if path + b"/" in other_path + b"/" or other_path + b"/" in path + b"/":
            return
        os.rename(path, self._root + b"/exchanged")
        os.rename(other_path, path)
        os.rename(self._root + b"/exchanged", other_path)

    def change_attribute(self, first: int, second: int) -> None:
        path = self._existing_path(first)
        status = os.lstat(path)
        if stat.S_ISCHR(status.st_mode) and status.st_rdev == 0:
            return  # The kernel refuses attributes of a whiteout.
        name = "trusted.overlay.opaque" if second % 2 else "trusted.other"
        if second % 3:
            os.setxattr(path, name, b"%d" % second, follow_symlinks=False)
        elif name in os.listxattr(path, follow_symlinks=False):
            os.removexattr(path, name, follow_symlinks=False)

    def change_mode(self, first: int, second: int) -> None:
        path = self._existing_path(first)
        if not stat.S_ISLNK(os.lstat(path).st_mode):
            os.chmod(path, (0o755, 0o4711, 0o000, 0o1777, 0o2750)[second % 5])

    def change_owner(self, first: int, second: int) -> None:
        os.chown(self._existing_path(first), second % 70_000, first % 70_000, follow_symlinks=False)

    def change_times(self, first: int, second: int) -> None:
        os.utime(self._existing_path(first), ns=(second, second * 1_000_003), follow_symlinks=False)

    def symlink(self, first: int, second: int) -> None:
        os.symlink(self._content(second % 200), self._new_path(first, second))

    def make_special_file(self, first: int, second: int) -> None:
        kind = (stat.S_IFCHR, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR)[second % 4]
        os.mknod(self._new_path(first, first), kind | 0o640, os.makedev(1, 3) if second % 4 == 3 else 0)

    def change_type(self, first: int, second: int) -> None:
        """Replace a folder by a file, or a file by a folder."""
        path = self._existing_path(first)
        if stat.S_ISDIR(os.lstat(path).st_mode):
            shutil.rmtree(path)
            with open(path, "wb") as file:
                file.write(self._content(second % 100))
        else:
            os.unlink(path)
            os.mkdir(path)
            os.mkdir(path + b"/a")

    def _move(self, path: bytes, to: bytes) -> None:
        if not (to + b"/").startswith(path + b"/"):
            with suppress(OSError):  # The target may be a folder that is not empty.
                os.rename(path, to)


EDITS: tuple[Callable[[EditedTree, int, int], None], ...] = (
    EditedTree.write,
    EditedTree.write,
    EditedTree.make_folder,
    EditedTree.rewrite_with_old_time,
    EditedTree.append,
    EditedTree.truncate,
    EditedTree.write_through_mapping,
    EditedTree.remove,
    EditedTree.link,
    EditedTree.rename,
    EditedTree.exchange,
    EditedTree.change_attribute,
    EditedTree.change_mode,
    EditedTree.change_owner,
    EditedTree.change_times,
    EditedTree.symlink,
    EditedTree.make_special_file,
    EditedTree.change_type,
)
