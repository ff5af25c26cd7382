"""Trees with which a tenant could harm the daemon, and a fingerprint of a tree that needs no path names."""

from __future__ import annotations

import hashlib
import os
import socket
import stat
import subprocess
from collections.abc import Callable
from contextlib import suppress

_MIB = 1 << 20
_READ_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def make_nested_folders(root: int, depth: int, name: str, *, siblings: bool = False) -> None:
    """Make nested folders with a file in the innermost one; with `siblings` each folder has two subfolders."""
    folder = os.dup(root)
    for _ in range(depth):
        os.mkdir(name, dir_fd=folder)
        if siblings:
            os.mkdir("sibling", dir_fd=folder)
        subfolder = os.open(name, _READ_FLAGS, dir_fd=folder)
        os.close(folder)
        folder = subfolder
    _write(folder, "file", b"at the bottom")
    os.close(folder)


def _deep(root: int) -> None:
    """The paths of these folders have 125 MB; a daemon that kept the paths of 2,200 folders used 4 GB."""
    make_nested_folders(root, 1000, "d" * 250)


def _long_names(root: int) -> None:
    """The path of the innermost folder, below a snapshot's folder, is longer than PATH_MAX."""
    make_nested_folders(root, 20, "n" * 199)


def _forked(root: int) -> None:
    """A walk that cannot keep all folders open has to reopen each of them when it returns."""
    make_nested_folders(root, 150, "f", siblings=True)


def _many_links(root: int) -> None:
    _write(root, "first", b"linked")
    os.mkdir("links", dir_fd=root)
    folder = os.open("links", _READ_FLAGS, dir_fd=root)
    for number in range(1000):
        os.link("first", f"{number}", src_dir_fd=root, dst_dir_fd=folder)
    os.close(folder)


def _sparse(root: int) -> None:
    for number in range(3):
        file = os.open(f"sparse{number}", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=root)
        os.ftruncate(file, 1 << 40)
        for at in range(number + 1):
            os.pwrite(file, b"data", at * (1 << 36))
        os.close(file)


def _attributes(root: int) -> None:
    os.mkdir("opaque", dir_fd=root)
    os.setxattr(f"/proc/self/fd/{root}/opaque", "trusted.overlay.opaque", b"y")
    for number in range(20):
        _write(root, f"noted{number}", b"x")
        for each in range(20):
            os.setxattr(f"/proc/self/fd/{root}/noted{number}", f"user.note{each}", bytes([each]) * 100)
    os.symlink("nowhere", "link", dir_fd=root)
    os.setxattr(f"/proc/self/fd/{root}/link", "trusted.of-a-link", b"1", follow_symlinks=False)


def _devices(root: int) -> None:
    """No container can make these: it has no CAP_MKNOD, and the kernel makes a whiteout when a file is deleted."""
    os.mknod("null", stat.S_IFCHR | 0o666, os.makedev(1, 3), dir_fd=root)
    os.mknod("block", stat.S_IFBLK | 0o600, os.makedev(240, 250), dir_fd=root)
    os.mknod("whiteout", stat.S_IFCHR, 0, dir_fd=root)


def _odd_files(root: int) -> None:
    for number in range(20):
        os.mkfifo(f"fifo{number}", 0o640, dir_fd=root)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"/proc/self/fd/{root}/socket")
    listener.close()
    _write(root, os.fsdecode(b"not-utf8-\xff\n"), b"x")
    _write(root, "locked", b"x", 0o000)
    _write(root, "noted", b"x")
    os.setxattr(f"/proc/self/fd/{root}/noted", "user.note", b"1" * 1000)
    os.chmod("noted", 0o4700, dir_fd=root)


HOSTILE_SHAPES: dict[str, Callable[[int], None]] = {
    "deep": _deep,
    "long names": _long_names,
    "forked": _forked,
    "many links": _many_links,
    "sparse": _sparse,
    "attributes": _attributes,
    "odd files": _odd_files,
    "devices": _devices,
}


def _write(folder: int, name: str, content: bytes, mode: int = 0o644) -> None:
    file = os.open(name, os.O_CREAT | os.O_WRONLY, mode, dir_fd=folder)
    os.write(file, content)
    os.close(file)


def fingerprint(root: str) -> str:
    """A digest of a tree: names, metadata, attributes, hard links and contents.

    It walks by descriptors, and shares no code with the tested code.
    """
    digest = hashlib.sha256()
    links: dict[int, int] = {}
    descriptors = [os.open(root, _READ_FLAGS)]
    waiting = [_names(descriptors[0])]
    digest.update(repr(_facts(descriptors[0], ".", links, 0)).encode())
    count = 0
    while waiting:
        if not waiting[-1]:
            waiting.pop()
            os.close(descriptors.pop())
            continue
        name = waiting[-1].pop()
        count += 1
        facts = _facts(descriptors[-1], name, links, count)
        digest.update(repr((len(waiting), name, facts)).encode(errors="surrogateescape"))
        if stat.S_ISDIR(facts[0]):
            descriptors.append(os.open(name, _READ_FLAGS, dir_fd=descriptors[-1]))
            waiting.append(_names(descriptors[-1]))
    return f"{count} entries {digest.hexdigest()}"


def _facts(folder: int, name: str, links: dict[int, int], number: int) -> tuple[int, ...]:
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    path = f"/proc/self/fd/{folder}/{name}"
    rest = repr([(each, os.getxattr(path, each, follow_symlinks=False)) for each in _attribute_names(path)])
    if stat.S_ISLNK(status.st_mode):
        rest += os.readlink(name, dir_fd=folder)
    elif stat.S_ISREG(status.st_mode):
        rest += _content(folder, name, status.st_size)
    is_plain = not stat.S_ISDIR(status.st_mode) and not stat.S_ISCHR(status.st_mode)
    first = links.setdefault(status.st_ino, number) if is_plain else 0
    return (
        status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_rdev,
        0 if stat.S_ISDIR(status.st_mode) else status.st_size, first, hash(rest),
    )  # fmt: skip


def _names(folder: int) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries)


def _attribute_names(path: str) -> list[str]:
    return sorted(os.listxattr(path, follow_symlinks=False))


def _content(folder: int, name: str, size: int) -> str:
    """A digest of the data of a file and its offsets, without holes."""
    digest = hashlib.sha256()
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
    at = 0
    with suppress(OSError):  # ENXIO: no more data
        while at < size:
            at = os.lseek(file, at, os.SEEK_DATA)
            data = os.pread(file, _MIB, at).rstrip(b"\0")
            digest.update(b"%d" % at + data)
            at += _MIB
    os.close(file)
    return digest.hexdigest()


def remove_tree(root: str) -> None:
    """Remove a deep tree; pytest cannot, because shutil.rmtree calls itself for every level."""
    subprocess.run(["rm", "-rf", "--", root], check=True)
