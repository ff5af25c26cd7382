"""What was copied from where: by it, the next pass and the next snapshot know what has not changed since.

The file, little-endian: one line of JSON (a header with the checksum of the rest), then for each folder its path and
its entries, each a fixed part and a name. It is read whole or not at all.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from gpudock_server.model.record import Record

INDEX_NAME = "index"
_FORMAT = 1
_FOLDER = struct.Struct("<II")  # length of the path, number of entries
_ENTRY = struct.Struct("<QqqQIIIQQBH")  # the key's eight, copy, flags, length of the name
_HEADER_BYTES = 4096
_SETTLED, _SHARED = 1, 2

# ino, ctime_ns, mtime_ns, size, mode, uid, gid, rdev: what tells one state of an inode from every other. The ctime
# does it nearly alone, because nobody can set it; size and mtime alone would miss a file that was written in place
# and had its mtime put back.
Key = tuple[int, int, int, int, int, int, int, int]


def key_of(status: os.stat_result) -> Key:
    """The state of an inode as `status` shows it."""
    mode = status.st_mode
    if is_whiteout(status):
        # The kernel may make all whiteouts hard links of one inode, whose ctime changes with each that is added.
        return (0, 0, status.st_mtime_ns, 0, mode, status.st_uid, status.st_gid, 0)
    size = 0 if stat.S_ISDIR(mode) else status.st_size
    return (
        status.st_ino, status.st_ctime_ns, status.st_mtime_ns, size, mode, status.st_uid, status.st_gid,
        status.st_rdev,
    )  # fmt: skip


def is_whiteout(status: os.stat_result) -> bool:
    """Whether it is overlayfs's mark for a deleted name."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


class Entry(NamedTuple):
    """A name that was copied. `copy` is the inode number of the copy.

    `settled`: the copy is known to be of exactly the state `key`; otherwise a change may have hidden in the same tick
    of the clock, or in memory. `shared`: the copy takes no room of its own.
    """

    key: Key
    copy: int
    settled: bool
    shared: bool

    @property
    def is_folder(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.key[4])


@dataclass
class Index:
    """The entries of a tree: path of a folder -> name -> entry. The root itself is the name "" of the folder "".

    `device` is the source's filesystem; on another one inode numbers mean something else. `complete`: the source was
    still when it was copied; `cloned`: extents are shared with it where that was possible.
    """

    device: int
    folders: dict[str, dict[str, Entry]] = field(default_factory=dict)
    complete: bool = False
    cloned: bool = False

    def __len__(self) -> int:
        return sum(len(entries) for entries in self.folders.values())

    def walk(self) -> Iterator[tuple[str, str, Entry]]:
        """Every entry with its folder and its name."""
        for folder, entries in self.folders.items():
            for name, entry in entries.items():
                yield folder, name, entry


class _Header(Record):
    format: int
    device: int
    complete: bool
    cloned: bool
    boot: str
    folders: int
    checksum: int


def save_index(index: Index, folder: int) -> None:
    """Write the index into the folder, all of it or nothing."""
    body = _packed(index)
    header = _Header(
        format=_FORMAT, device=index.device, complete=index.complete, cloned=index.cloned, boot=boot_id(),
        folders=len(index.folders), checksum=zlib.crc32(body),
    )  # fmt: skip
    temporary = f"{INDEX_NAME}.new"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=folder)
    with os.fdopen(descriptor, "wb") as file:
        file.write(json.dumps(header.model_dump()).encode() + b"\n")
        file.write(body)
    os.rename(temporary, INDEX_NAME, src_dir_fd=folder, dst_dir_fd=folder)


def load_index(folder: int, *, same_boot: bool) -> Index | None:
    """The index in the folder; None when there is none, or when it is torn or of another format.

    `same_boot`: nor when it was written before the machine last started. An index that outlived a power failure may
    tell of files that did not.
    """
    try:
        descriptor = os.open(INDEX_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        head, body = file.readline(_HEADER_BYTES), file.read()
    try:
        header = _Header.model_validate_json(head)
    except ValidationError:
        return None
    if header.format != _FORMAT or header.checksum != zlib.crc32(body) or (same_boot and header.boot != boot_id()):
        return None
    return Index(header.device, _unpacked(body, header.folders), header.complete, header.cloned)


def forget_index(folder: int) -> None:
    """Remove the index: from now on the tree is not what it says."""
    try:
        os.unlink(INDEX_NAME, dir_fd=folder)
    except FileNotFoundError:
        return


def boot_id() -> str:
    """The kernel's name for the time since the machine started."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _packed(index: Index) -> bytes:
    parts: list[bytes] = []
    pack, encode = _ENTRY.pack, os.fsencode
    for folder, entries in index.folders.items():
        path = encode(folder)
        parts += (_FOLDER.pack(len(path), len(entries)), path)
        for name, (key, copy, settled, shared) in entries.items():
            raw = encode(name)
            parts += (pack(*key, copy, settled * _SETTLED | shared * _SHARED, len(raw)), raw)
    return b"".join(parts)


def _unpacked(body: bytes, count: int) -> dict[str, dict[str, Entry]]:
    folders: dict[str, dict[str, Entry]] = {}
    unpack, decode, fixed, at = _ENTRY.unpack_from, os.fsdecode, _ENTRY.size, 0
    for _ in range(count):
        length, entries = _FOLDER.unpack_from(body, at)
        at += _FOLDER.size
        found = folders[decode(body[at : at + length])] = {}
        at += length
        for _ in range(entries):
            *key, copy, flags, length = unpack(body, at)
            at += fixed
            found[decode(body[at : at + length])] = Entry(
                tuple(key), copy, bool(flags & _SETTLED), bool(flags & _SHARED)
            )
            at += length
    return folders
