"""One number for all that a tree of files holds, so that two trees can be told apart and the same one recognized.

The digest is a SHA-256 over the entries in the order of their paths. Of each it takes the path, type, mode, owner and
group, the time of modification (ns), a device's number, a symbolic link's target, the extended attributes (ACLs are
some of them), the first path that shares its inode, and for a file its length and the SHA-256 of its content. Holes are
read as what they are, zeros: filesystems lay files out as they like.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from dataclasses import dataclass, field

from gpudock_server.adapters.layers.threads import Interrupt
from gpudock_server.model.volume import TreeSummary

_CHUNK_BYTES = 1 << 20
_NO_XATTRS = frozenset({errno.ENOTSUP, errno.ENODATA})


def summary(root: str, interrupt: Interrupt) -> TreeSummary:
    """Read a whole tree, on one filesystem. Raises OSError, Interrupted; nothing in it may change meanwhile."""
    return _Reading(os.fsencode(root), interrupt).run()


@dataclass
class _Reading:
    root: bytes
    interrupt: Interrupt
    # (device, inode) -> the first path found for it, of those that have several.
    links: dict[tuple[int, int], bytes] = field(default_factory=dict)
    entries: int = 0
    content_bytes: int = 0

    def run(self) -> TreeSummary:
        digest = hashlib.sha256()
        folders = [b""]
        digest.update(self._entry(b""))
        while folders:
            folder = folders.pop()
            with os.scandir(self.root + folder) as listed:
                names = sorted(entry.name for entry in listed)
            for name in names:
                self.interrupt.check()
                path = folder + b"/" + name
                digest.update(self._entry(path))
                if stat.S_ISDIR(os.lstat(self.root + path).st_mode):
                    folders.append(path)
        return TreeSummary(entries=self.entries, content_bytes=self.content_bytes, sha256=digest.hexdigest())

    def _entry(self, path: bytes) -> bytes:
        found = os.lstat(self.root + path)
        self.entries += 1
        facts = [
            path,
            struct.pack("<IIIqQ", found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_rdev),
            self._xattrs(self.root + path),
            self._first(path, found),
        ]
        if stat.S_ISLNK(found.st_mode):
            facts.append(os.readlink(self.root + path))  # noqa: PTH115 - names are bytes here: not every one is text
        elif stat.S_ISREG(found.st_mode):
            facts.append(struct.pack("<Q", found.st_size))
            # The content of what has several names is read once.
            if facts[3] == path:
                facts.append(self._content(self.root + path))
                self.content_bytes += found.st_size
        return _framed(facts)

    def _first(self, path: bytes, found: os.stat_result) -> bytes:
        if found.st_nlink == 1 or stat.S_ISDIR(found.st_mode):
            return path
        return self.links.setdefault((found.st_dev, found.st_ino), path)

    def _content(self, path: bytes) -> bytes:
        digest = hashlib.sha256()
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                self.interrupt.check()
                digest.update(chunk)
        return digest.digest()

    def _xattrs(self, path: bytes) -> bytes:
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
