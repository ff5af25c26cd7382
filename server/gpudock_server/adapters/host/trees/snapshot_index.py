"""The index of a copy: the state of each original and the inode of its copy, to find out what has not changed since.

File format, little-endian: one line of JSON (a header with the checksum of the rest, padded with blanks), then for each
folder the number of its parent, its name and its entries, each with a fixed part and a name. Folders are numbered in
the order of the file, parents before children. A damaged file counts as absent. So do files of format 1, which had the
path of each folder and grew with the square of the depth: the first snapshot after that update shares no files with
older ones.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from gpudock_server.adapters.host.trees.folders import ROOT, FolderTree

INDEX_NAME = "index"
_FORMAT = 2
_FOLDER = struct.Struct("<IIH")  # number of the parent, number of entries, length of the name
_ENTRY = struct.Struct("<QqqQIIIQQBH")  # the key's eight, copy, flags, length of the name
_HEADER_BYTES = 512
_MAX_BYTES = 1 << 30
_WRITE_BYTES = 1 << 20
_SETTLED, _SHARED, _OPAQUE = 1, 2, 4
OPAQUE_XATTR = "trusted.overlay.opaque"

# ino, ctime_ns, mtime_ns, size, mode, uid, gid, rdev: identifies a state of an inode. The most important is the ctime,
# which no process can set; size and mtime alone would miss a file that was written in place and had its mtime reset.
Key = tuple[int, int, int, int, int, int, int, int]


def key_of(status: os.stat_result) -> Key:
    """Return the state of an inode from its stat result."""
    mode = status.st_mode
    if is_whiteout(status):
        # The kernel may make all whiteouts hard links of one inode, whose ctime changes with each new link.
        return (0, 0, status.st_mtime_ns, 0, mode, status.st_uid, status.st_gid, 0)
    size = 0 if stat.S_ISDIR(mode) else status.st_size
    return (
        status.st_ino, status.st_ctime_ns, status.st_mtime_ns, size, mode, status.st_uid, status.st_gid,
        status.st_rdev,
    )  # fmt: skip


def is_whiteout(status: os.stat_result) -> bool:
    """Whether an entry is a whiteout: overlayfs's mark of a deleted name."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


class IndexEntry(NamedTuple):
    """A copied entry. `copy` is the inode number of the copy.

    `settled`: the copy certainly has the state `key`; otherwise a change in the same tick of the clock, or in mapped
    memory, may have been missed. `shared`: the copy takes no additional space. `opaque`: the folder has overlayfs's
    mark that hides the folder of the image.
    """

    key: Key
    copy: int
    settled: bool
    shared: bool
    opaque: bool = False

    @property
    def is_folder(self) -> bool:
        """Whether the entry is a directory."""
        return stat.S_ISDIR(self.key[4])


@dataclass
class Index:
    """The entries of a tree by the number of their folder. `root` is the entry of the root.

    `device` is the filesystem of the source; its inode numbers are valid only there. `complete`: the source did not
    change during the last pass. `cloned`: extents are shared with the source where possible.
    """

    device: int
    folder_tree: FolderTree = field(default_factory=FolderTree)
    entries: list[dict[str, IndexEntry]] = field(default_factory=lambda: [{}])
    subfolders: dict[int, dict[str, int]] = field(default_factory=dict)
    root: IndexEntry | None = None
    complete: bool = False
    cloned: bool = False

    def __len__(self) -> int:
        return sum(map(len, self.entries)) + (self.root is not None)

    def add_folder(self, parent: int, name: str) -> int:
        """Add a folder and return its number. The caller adds its entry in the parent."""
        number = self.folder_tree.add(parent, name)
        self.entries.append({})
        self.subfolders.setdefault(parent, {})[name] = number
        return number

    def drop_last_folder(self) -> None:
        """Remove the folder that was added last, and its entry."""
        parent, name = self.folder_tree.parents[-1], self.folder_tree.names[-1]
        del self.subfolders[parent][name], self.entries[-1], self.entries[parent][name]
        self.folder_tree.drop_last()

    def subfolder(self, folder: int | None, name: str) -> int | None:
        """Return the number of a subfolder; None if the index does not have it."""
        return None if folder is None else self.subfolders.get(folder, {}).get(name)

    def entry(self, folder: int | None, name: str) -> IndexEntry | None:
        """Return the entry of a name in a folder; None if there is none."""
        return None if folder is None else self.entries[folder].get(name)

    def walk(self) -> Iterator[tuple[int, str, IndexEntry]]:
        """Iterate over all entries except the root, with folder and name."""
        for folder, entries in enumerate(self.entries):
            for name, entry in entries.items():
                yield folder, name, entry


@dataclass(frozen=True, slots=True)
class _Header:
    format: int
    device: int
    complete: bool
    cloned: bool
    boot: str
    folders: int
    checksum: int

    @classmethod
    def read(cls, line: bytes) -> _Header | None:
        """Parse a header; None if it is invalid or of another format."""
        try:
            fields = json.loads(line)
            header = cls(**fields)
        except (ValueError, TypeError):
            return None
        numbers = (header.format, header.device, header.folders, header.checksum)
        return header if header.format == _FORMAT and all(isinstance(each, int) for each in numbers) else None


def save_index(index: Index, folder: int) -> None:
    """Write the index into the folder atomically."""
    temporary = f"{INDEX_NAME}.new"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=folder)
    checksum = 0
    with os.fdopen(descriptor, "wb") as file:
        file.seek(_HEADER_BYTES)
        for block in _blocks(index):
            checksum = zlib.crc32(block, checksum)
            file.write(block)
        header = _Header(
            format=_FORMAT, device=index.device, complete=index.complete, cloned=index.cloned, boot=boot_id(),
            folders=len(index.folder_tree), checksum=checksum,
        )  # fmt: skip
        file.seek(0)
        file.write(json.dumps(asdict(header)).encode().ljust(_HEADER_BYTES - 1) + b"\n")
    os.rename(temporary, INDEX_NAME, src_dir_fd=folder, dst_dir_fd=folder)


def load_index(folder: int, *, same_boot: bool) -> Index | None:
    """Load the index from the folder; None if it is missing, damaged or of another format.

    `same_boot`: also None if it was written before the last boot: after a power failure the index may describe files
    that were not written to disk.
    """
    try:
        descriptor = os.open(INDEX_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        header = _Header.read(file.read(_HEADER_BYTES))
        if header is None or (same_boot and header.boot != boot_id()) or os.fstat(descriptor).st_size > _MAX_BYTES:
            return None
        body = file.read()
    if header.checksum != zlib.crc32(body):
        return None
    index = Index(header.device, complete=header.complete, cloned=header.cloned)
    _unpack(body, header.folders, index)
    return index


def remove_index(folder: int) -> None:
    """Remove the index, because the tree is about to change."""
    try:
        os.unlink(INDEX_NAME, dir_fd=folder)
    except FileNotFoundError:
        return


def boot_id() -> str:
    """Return the boot id of the kernel."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _blocks(index: Index) -> Iterator[bytes]:
    """Iterate over the body of the file in blocks. The root comes first: its entry, then a folder without a name."""
    block = bytearray()
    pack, encode = _ENTRY.pack, os.fsencode
    block += bytes([index.root is not None])
    if index.root is not None:
        block += _packed(index.root, 0)
    folder_tree = index.folder_tree
    for number, entries in enumerate(index.entries):
        folder_name = encode(folder_tree.names[number])
        block += _FOLDER.pack(folder_tree.parents[number], len(entries), len(folder_name))
        block += folder_name
        for name, (key, copy, settled, shared, opaque) in entries.items():
            raw = encode(name)
            block += pack(*key, copy, settled * _SETTLED | shared * _SHARED | opaque * _OPAQUE, len(raw))
            block += raw
            if len(block) >= _WRITE_BYTES:
                yield bytes(block)
                block.clear()
    yield bytes(block)


def _packed(entry: IndexEntry, name_bytes: int) -> bytes:
    key, copy, settled, shared, opaque = entry
    return _ENTRY.pack(*key, copy, settled * _SETTLED | shared * _SHARED | opaque * _OPAQUE, name_bytes)


def _unpack(body: bytes, count: int, index: Index) -> None:
    unpack, decode, fixed, at = _ENTRY.unpack_from, os.fsdecode, _ENTRY.size, 1
    if body[0]:
        *key, copy, flags, _ = unpack(body, at)
        index.root = _entry(key, copy, flags)
        at += fixed
    for number in range(count):
        parent, entries, length = _FOLDER.unpack_from(body, at)
        at += _FOLDER.size
        if number != ROOT:
            index.add_folder(parent, decode(body[at : at + length]))
        found = index.entries[number]
        at += length
        for _ in range(entries):
            *key, copy, flags, length = unpack(body, at)
            at += fixed
            found[decode(body[at : at + length])] = _entry(key, copy, flags)
            at += length


def _entry(key: list[int], copy: int, flags: int) -> IndexEntry:
    ino, ctime, mtime, size, mode, uid, gid, rdev = key
    return IndexEntry(
        (ino, ctime, mtime, size, mode, uid, gid, rdev),
        copy,
        bool(flags & _SETTLED),
        bool(flags & _SHARED),
        bool(flags & _OPAQUE),
    )
