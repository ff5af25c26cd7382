"""One number for all that a tree of files holds, so that two trees can be told apart and the same one recognized.

The digest is a SHA-256 over the entries in the order of a walk in which the names of each folder are sorted. Of each
entry it takes the number of its folder in that walk, its name, type, mode, owner and group, the time of modification
(ns), a device's number, a symbolic link's target, the extended attributes (ACLs are some of them), which entry was the
first with its inode, and for a file its length and the SHA-256 of its content. Blocks of the content that are all zeros
are left out, whether they are holes or not: filesystems lay files out as they like, and a hole of terabytes takes no
time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from dataclasses import dataclass, field

from gpudock_server.adapters.host.filesystem import sync_filesystem
from gpudock_server.adapters.host.trees.entry_copy import next_data
from gpudock_server.adapters.host.trees.folders import FOLDER_FLAGS, ROOT, FolderTree, OpenFolders
from gpudock_server.adapters.host.trees.interrupt import Interrupt

_BLOCK_BYTES = 1 << 20
_ZEROS = bytes(_BLOCK_BYTES)
_NO_XATTRS = frozenset({errno.ENOTSUP, errno.ENODATA})
# A name that has become a FIFO meanwhile must not be waited for.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class TreeDigest:
    """What was read."""

    entries: int
    content_bytes: int
    sha256: str


def digest_tree(root: str, interrupt: Interrupt) -> TreeDigest:
    """Read a whole tree, on one filesystem. Raises OSError, Interrupted; nothing in it may change meanwhile."""
    descriptor = os.open(root, FOLDER_FLAGS)
    try:
        # Where a filesystem was ever wrong about holes, it was in files that it had not written yet.
        sync_filesystem(descriptor)
        return _DigestWalk(descriptor, interrupt).run()
    finally:
        os.close(descriptor)


@dataclass
class _DigestWalk:
    root: int
    interrupt: Interrupt
    folder_tree: FolderTree = field(default_factory=FolderTree)
    # (device, inode) -> the number of the first entry found with it, of those that have several names.
    links: dict[tuple[int, int], int] = field(default_factory=dict)
    entries: int = 0
    content_bytes: int = 0

    def run(self) -> TreeDigest:
        digest = hashlib.sha256()
        digest.update(self._entry(ROOT, self.root, ".", os.fstat(self.root)))
        waiting: list[tuple[int, str]] = [(ROOT, "")]
        with OpenFolders(self.root, self.folder_tree) as open_folders:
            while waiting:
                parent, folder_name = waiting.pop()
                folder = self.folder_tree.add(parent, folder_name) if folder_name else ROOT
                here = open_folders.enter(folder)
                with os.scandir(here) as listed:
                    names = sorted(entry.name for entry in listed)
                for name in names:
                    self.interrupt.check()
                    status = os.stat(name, dir_fd=here, follow_symlinks=False)
                    digest.update(self._entry(folder, here, name, status))
                    if stat.S_ISDIR(status.st_mode):
                        waiting.append((folder, name))
        return TreeDigest(entries=self.entries, content_bytes=self.content_bytes, sha256=digest.hexdigest())

    def _entry(self, folder: int, here: int, name: str, found: os.stat_result) -> bytes:
        self.entries += 1
        first = self._first(found)
        facts = [
            struct.pack("<QQ", folder, first),
            os.fsencode(name),
            struct.pack("<IIIqQ", found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_rdev),
            _xattrs(f"/proc/self/fd/{here}/{name}"),
        ]
        if stat.S_ISLNK(found.st_mode):
            facts.append(os.fsencode(os.readlink(name, dir_fd=here)))
        elif stat.S_ISREG(found.st_mode):
            facts.append(struct.pack("<Q", found.st_size))
            # The content of what has several names is read once.
            if first == self.entries:
                facts.append(self._content(name, here, found.st_size))
                self.content_bytes += found.st_size
        return _framed(facts)

    def _first(self, found: os.stat_result) -> int:
        """The number of the first entry that has this inode; its own number when it is that one."""
        if found.st_nlink == 1 or stat.S_ISDIR(found.st_mode):
            return self.entries
        return self.links.setdefault((found.st_dev, found.st_ino), self.entries)

    def _content(self, name: str, here: int, size: int) -> bytes:
        """The SHA-256 of each block that is not all zeros behind its place; blocks begin at multiples of their size."""
        digest, at = hashlib.sha256(), 0
        file = os.open(name, _READ_FLAGS, dir_fd=here)
        try:
            while at < size and (data := next_data(file, at, size)) < size:
                self.interrupt.check()
                at = data - data % _BLOCK_BYTES
                block = _block(file, at, min(_BLOCK_BYTES, size - at))
                if block != _ZEROS[: len(block)]:
                    digest.update(struct.pack("<Q", at))
                    digest.update(block)
                at += _BLOCK_BYTES
        finally:
            os.close(file)
        return digest.digest()


def _block(file: int, at: int, count: int) -> bytes:
    """So many bytes of an open file; less at its end alone, though one read may give less anywhere."""
    block = os.pread(file, count, at)
    while len(block) < count and (more := os.pread(file, count - len(block), at + len(block))):
        block += more
    return block


def _xattrs(path: str) -> bytes:
    """All attributes in one, by a path through an open folder's descriptor; a link at its end is not followed."""
    try:
        names = sorted(os.listxattr(path, follow_symlinks=False))
        return _framed([p for n in names for p in (os.fsencode(n), os.getxattr(path, n, follow_symlinks=False))])
    except OSError as error:
        if error.errno in _NO_XATTRS:
            return b""
        raise


def _framed(parts: list[bytes]) -> bytes:
    """The parts in one, each behind its length: no two lists of parts give the same."""
    return b"".join(struct.pack("<Q", len(part)) + part for part in (struct.pack("<Q", len(parts)), *parts))
