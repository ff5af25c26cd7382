"""The digest of a file tree: equal trees have the same digest.

It is a SHA-256 over the entries in the order of a walk in which the names of each folder are sorted. Of each entry it
includes the number of its folder in the walk, its name, type, mode, owner, group, modification time (ns), device
number, target of a symbolic link, extended attributes (which include ACLs), the number of the first entry with the same
inode, and for a file its length and the SHA-256 of its content. Blocks of zeros are left out, whether they are holes or
not: the layout depends on the filesystem, and a hole of terabytes must not take time.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from dataclasses import dataclass, field

from gpudock_server.adapters.host.filesystem import sync_filesystem
from gpudock_server.adapters.host.trees.entry_copy import next_data
from gpudock_server.adapters.host.trees.folders import FOLDER_FLAGS, ROOT, FolderTree, OpenFolders
from gpudock_server.adapters.host.trees.interrupt import Interrupt
from gpudock_server.adapters.host.trees.xattrs import NO_XATTRS_ERRNOS

_BLOCK_BYTES = 1 << 20
_ZEROS = bytes(_BLOCK_BYTES)
# O_NONBLOCK: do not wait if the name is a FIFO now.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class TreeDigest:
    """The digest of a tree, with its numbers of entries and bytes of content."""

    entries: int
    content_bytes: int
    sha256: str


def digest_tree(root: str, interrupt: Interrupt) -> TreeDigest:
    """Compute the digest of a tree, which must not change meanwhile. Raises OSError, Interrupted."""
    descriptor = os.open(root, FOLDER_FLAGS)
    try:
        # Filesystems have reported wrong holes in files that were not written to disk yet.
        sync_filesystem(descriptor)
        return _DigestWalk(descriptor, interrupt).run()
    finally:
        os.close(descriptor)


@dataclass
class _DigestWalk:
    root: int
    interrupt: Interrupt
    folder_tree: FolderTree = field(default_factory=FolderTree)
    # (device, inode) of a file with several names -> number of the first entry with it.
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
            # The content of a file with several names is read once.
            if first == self.entries:
                facts.append(self._content(name, here, found.st_size))
                self.content_bytes += found.st_size
        return _framed(facts)

    def _first(self, found: os.stat_result) -> int:
        """Return the number of the first entry with this inode, which may be the current entry."""
        if found.st_nlink == 1 or stat.S_ISDIR(found.st_mode):
            return self.entries
        return self.links.setdefault((found.st_dev, found.st_ino), self.entries)

    def _content(self, name: str, here: int, size: int) -> bytes:
        """Hash each block that is not all zeros, preceded by its offset, which is a multiple of the block size."""
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
    """Read `count` bytes of an open file, fewer only at its end; a single pread may return fewer anywhere."""
    block = os.pread(file, count, at)
    while len(block) < count and (more := os.pread(file, count - len(block), at + len(block))):
        block += more
    return block


def _xattrs(path: str) -> bytes:
    """Return the extended attributes in one byte string; `path` is not followed if it ends in a symbolic link."""
    try:
        names = sorted(os.listxattr(path, follow_symlinks=False))
        return _framed([p for n in names for p in (os.fsencode(n), os.getxattr(path, n, follow_symlinks=False))])
    except OSError as error:
        if error.errno in NO_XATTRS_ERRNOS:
            return b""
        raise


def _framed(parts: list[bytes]) -> bytes:
    """Join parts, each after its length, so that different lists never give the same bytes."""
    return b"".join(struct.pack("<Q", len(part)) + part for part in (struct.pack("<Q", len(parts)), *parts))
