"""Copy one entry of a tree: data, holes, extents and attributes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gpudock_server.adapters.host.trees.interrupt import Interrupt
from gpudock_server.adapters.host.trees.xattrs import read_xattrs

# ioctl_ficlone(2): share the other file's extents.
_FICLONE = 0x40049409
_CLONE_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EXDEV})
_CLONE_REFUSED = frozenset({errno.EINVAL, errno.ETXTBSY, errno.EPERM})
_COPY_RANGE_UNSUPPORTED = frozenset({errno.EXDEV, errno.ENOSYS})
_COPY_RANGE_REFUSED = _COPY_RANGE_UNSUPPORTED | {errno.EINVAL, errno.EOPNOTSUPP}
# sync_file_range(2): WAIT_BEFORE | WRITE | WAIT_AFTER
_WRITE_AND_WAIT, _WRITE = 7, 2
_TMPFS, _RAMFS = 0x01021994, 0x858458F6
_STATFS_BYTES = 512
_CHUNK_BYTES = 8 << 20
_READ_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 20


class CopyResult(NamedTuple):
    """How a file was copied: whether extents are shared, and whether the source was written back before."""

    cloned: bool
    written: bool


class EntryCopier:
    """Copies files and their attributes by descriptors. `moved` is called with the number of bytes as they are copied.

    `clones`: whether extents may be shared; it becomes False if the filesystem does not support that.
    """

    def __init__(self, interrupt: Interrupt, moved: Callable[[int], None], *, clones: bool) -> None:
        self._interrupt = interrupt
        self._moved = moved
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._kernel_copies = True
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self.clones = clones

    def file(
        self, source: int, status: os.stat_result, folder: int, name: str, *, write_back: bool = False
    ) -> CopyResult:
        """Copy an open regular file to `name` in `folder`; with `write_back`, write it back before copying bytes."""
        target = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
        try:
            cloned, written = self._cloned(source, target), False
            if not cloned:
                written = write_back and self.write_back(source)
                self._fill(source, target, status)
            os.fchown(target, status.st_uid, status.st_gid)
            match_xattrs(source, target)
            os.fchmod(target, stat.S_IMODE(status.st_mode))
            os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(target)
        return CopyResult(cloned, written)

    def special(self, handle: int, status: os.stat_result, folder: int, name: str) -> None:
        """Copy a link, device, whiteout, FIFO or socket (an O_PATH descriptor) to `name` in `folder`."""
        mode = status.st_mode
        if stat.S_ISLNK(mode):
            os.symlink(os.readlink("", dir_fd=handle), name, dir_fd=folder)
        else:
            os.mknod(name, stat.S_IFMT(mode) | 0o600, status.st_rdev, dir_fd=folder)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=folder, follow_symlinks=False)
        match_xattrs(f"/proc/self/fd/{handle}", f"/proc/self/fd/{folder}/{name}")
        if not stat.S_ISLNK(mode):
            os.chmod(name, stat.S_IMODE(mode), dir_fd=folder)
        os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=folder, follow_symlinks=False)

    def write_back(self, file: int) -> bool:
        """Make sure that later changes of an open file change its ctime; False if that is not possible.

        Two kinds of changes may leave the ctime as it is, so they must end between reading the ctime and copying. A
        write(2) sets the ctime when it begins: SEEK_DATA and a read wait for the lock of the inode, and so for the
        writes that have begun. A store into mapped memory sets the ctime only if the page was clean: after the pages
        are written back, the next store faults and sets it again. tmpfs never writes back, so it is not supported.
        """
        try:
            os.lseek(file, 0, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
        os.pread(file, 1, 0)
        nothing, flags = ctypes.c_longlong(0), ctypes.c_uint(_WRITE_AND_WAIT)
        if self._libc.sync_file_range(file, nothing, nothing, flags) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.ESPIPE, errno.EINVAL):
            return False
        raise OSError(code, os.strerror(code))

    def tracks_mapped_writes(self, folder: int) -> bool:
        """Whether `write_back` is effective on the filesystem."""
        buffer = ctypes.create_string_buffer(_STATFS_BYTES)
        if self._libc.fstatfs(folder, buffer) != 0:
            return False
        return ctypes.c_long.from_buffer(buffer).value not in (_TMPFS, _RAMFS)

    def same_file(self, one: int, other: int, size: int) -> bool:
        """Whether two open files of the same size have the same content and extended attributes."""
        if read_xattrs(one, follow=True) != read_xattrs(other, follow=True):
            return False
        at = 0
        while at < size:
            self._interrupt.check()
            begin = min(next_data(one, at, size), next_data(other, at, size))
            if os.pread(one, _READ_BYTES, begin) != os.pread(other, _READ_BYTES, begin):
                return False
            at = begin + _READ_BYTES
        return True

    def _cloned(self, source: int, target: int) -> bool:
        if not self.clones:
            return False
        try:
            fcntl.ioctl(target, _FICLONE, source)
        except OSError as error:
            if error.errno in _CLONE_UNSUPPORTED:
                self.clones = False
            elif error.errno not in _CLONE_REFUSED:
                raise
            return False
        return True

    def _fill(self, source: int, target: int, status: os.stat_result) -> None:
        length = 0
        for begin, end in data_ranges(source, status):
            length = self._copy_range(source, target, begin, end)
        # Skipped if the length is right: XFS would write the file out and wait for the disk.
        if length != status.st_size:
            os.ftruncate(target, status.st_size)

    def _copy_range(self, source: int, target: int, begin: int, end: int) -> int:
        """Copy a range; returns its end, which is earlier if the source was truncated: it will be copied again then."""
        unwritten = begin
        while begin < end:
            self._interrupt.check()
            count = self._copied_at(source, target, begin, min(end - begin, _CHUNK_BYTES))
            if count == 0:
                break
            begin += count
            self._moved(count)
            if begin - unwritten >= _CHUNK_BYTES:
                self._begin_to_write(target, unwritten, begin - unwritten)
                unwritten = begin
        return begin

    def _begin_to_write(self, file: int, at: int, count: int) -> None:
        """Start to write a range to disk while the copy continues. The sync at the end reports errors."""
        self._libc.sync_file_range(file, ctypes.c_longlong(at), ctypes.c_longlong(count), ctypes.c_uint(_WRITE))

    def _copied_at(self, source: int, target: int, at: int, count: int) -> int:
        if self._kernel_copies:
            try:
                return os.copy_file_range(source, target, count, at, at)
            except OSError as error:
                if error.errno not in _COPY_RANGE_REFUSED:
                    raise
                self._kernel_copies = error.errno not in _COPY_RANGE_UNSUPPORTED
        found, written = os.preadv(source, [self._buffer[:count]], at), 0
        while written < found:
            written += os.pwrite(target, self._buffer[written:found], at + written)
        return written


def can_clone(folder: int, name: str) -> bool:
    """Whether files in the open folder can share extents, tested with two temporary files `name`-1 and `name`-2."""
    names = (f"{name}-1", f"{name}-2")
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    opened = [os.open(each, flags, 0o600, dir_fd=folder) for each in names]
    try:
        os.pwrite(opened[0], b"x" * 4096, 0)
        fcntl.ioctl(opened[1], _FICLONE, opened[0])
        return os.pread(opened[1], 2, 4094) == b"xx"
    except OSError as error:
        if error.errno in _CLONE_UNSUPPORTED | _CLONE_REFUSED:
            return False
        raise
    finally:
        for each, descriptor in zip(names, opened, strict=True):
            os.close(descriptor)
            os.unlink(each, dir_fd=folder)


def data_ranges(file: int, status: os.stat_result) -> Iterator[tuple[int, int]]:
    """Iterate over the ranges of an open file that are not holes, as (begin, end)."""
    size = status.st_size
    if status.st_blocks * 512 >= size:
        yield 0, size
        return
    at = 0
    while (begin := next_data(file, at, size)) < size:
        at = min(os.lseek(file, begin, os.SEEK_HOLE), size)
        yield begin, at


def match_xattrs(source: int | str, target: int | str) -> dict[str, bytes]:
    """Give the target the extended attributes of the source, and return these.

    A source path is /proc/self/fd/<number>, which leads to the opened entry only. A target path that ends in a symbolic
    link is not followed.
    """
    follow = isinstance(target, int)
    expected, found = read_xattrs(source, follow=True), read_xattrs(target, follow=follow)
    for name in found.keys() - expected.keys():
        if not name.startswith("security."):  # security modules set these on every file
            os.removexattr(target, name, follow_symlinks=follow)
    for name, value in expected.items():
        if found.get(name) != value:
            os.setxattr(target, name, value, follow_symlinks=follow)
    return expected


def next_data(file: int, at: int, size: int) -> int:
    """Return the offset of the next data; `size` if only a hole follows."""
    try:
        return min(os.lseek(file, at, os.SEEK_DATA), size)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        raise
