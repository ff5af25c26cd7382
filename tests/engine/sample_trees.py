"""A sample tree with everything that a transfer of files can lose, and the comparison of trees.

`create_tree` makes the tree in a folder, `create_tree_command` inside a container; `read_tree` reads the files of a
container from the host, through `/proc/<pid>/root`. The module imports the standard library alone, because its text
runs in the container.
"""

# Paths are bytes, because not every name is UTF-8; some modes are unsafe on purpose.
# ruff: noqa: PTH101, PTH102, PTH103, PTH104, PTH108, PTH112, PTH115, PTH116, PTH123, PTH208, PTH211, S103
from __future__ import annotations

import hashlib
import os
import random
import shutil
import stat
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

FILES = 20_000
"""Plain files in the tree; with all the rest it has some 20,800 entries."""

# For files below this size, the buffer of 256 KiB that file_digest allocates takes longer than the digest.
_SMALL_BYTES = 1 << 16
_FOLDERS = 100
_LINKED_FILES_PER_FOLDER = 12
_FILES_WITH_ATTRIBUTES = 8
_NESTED_FOLDERS = 60
# Version 2, effective, CAP_NET_BIND_SERVICE permitted (struct vfs_cap_data of linux/capability.h).
_CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
# Before 1970, with a fraction in nanoseconds, and after 2038.
_TIMES_NS = (-86_400_000_000_123, 1_234_567_890_123_456_789, 4_102_444_800_999_999_999)
_UNUSUAL_NAMES = (
    b"-rf",
    b"--",
    b" ",
    b"a b  c",
    b"new\nline",
    b"tab\there",
    b"quote'\"\\$(x)`y`",
    "grüße-日本-🙂".encode(),
    b"not-utf8-\xff\xfe",
    b".hidden",
    b"*",
    b"x" * 255,
)


# Files of the init layer, which the engine makes for each container below its writable layer.
ENGINE_FILES = frozenset({b"/.dockerenv", b"/etc", b"/etc/mtab"})


def image_files() -> dict[str, bytes]:
    """Files that an image must have, so that `create_tree` can delete, replace and edit them: path -> content."""
    kinds = {"kept": 50, "gone": 200, "replaced": 60, "emptied": 40, "edited": 20, "moved": 5, "linked": 5}
    return {
        f"image/{kind}/{number}": f"{kind} {number}\n".encode()
        for kind, count in kinds.items()
        for number in range(count)
    }


def create_tree_command(root: str = "/", files: int = FILES) -> list[str]:
    """A command that makes the tree below `root` inside a container, which must have Python."""
    source = Path(__file__).read_text(encoding="utf-8")
    return ["sh", "-c", 'exec python3 -c "$1" "$2" "$3"', "grow", source, root, str(files)]


def create_tree(root: str, files: int = FILES) -> None:
    """Make the tree below `root`, always the same; if `image_files` exist there, many of them are changed."""
    base = os.fsencode(root.rstrip("/")) + b"/"
    top = base + b"grown"
    os.mkdir(top)
    generator = random.Random(7)  # noqa: S311 - the same tree every time
    _plain_files(top, generator, files // _FOLDERS)
    _hard_links(top)
    _attributes(top)
    _sparse(top, generator)
    _unusual_entries(top)
    if os.path.isdir(base + b"image"):
        _change_image(base + b"image/")
    for number, path in enumerate(sorted(_walk(top))):
        time = _TIMES_NS[number % 3] + number * 1_000_003
        os.utime(path, ns=(time, time), follow_symlinks=False)
    os.chmod(base, 0o751)
    os.utime(base, ns=(_TIMES_NS[1], _TIMES_NS[1]))


def _plain_files(top: bytes, generator: random.Random, per_folder: int) -> None:
    for folder in range(_FOLDERS):
        os.mkdir(top + b"/d%d" % folder)
        for number in range(per_folder):
            _write(top + b"/d%d/f%d" % (folder, number), generator.randbytes(generator.randrange(64)))


def _hard_links(top: bytes) -> None:
    """Files with four names each, in four folders."""
    os.mkdir(top + b"/links")
    for folder in range(50):
        for number in range(_LINKED_FILES_PER_FOLDER):
            first = top + b"/d%d/f%d" % (folder, number)
            os.link(first, top + b"/links/%d-%d" % (folder, number))
            os.link(first, top + b"/d%d/linked%d-%d" % (99 - folder, folder, number))
            os.link(first, top + b"/d%d/linked-again%d-%d" % (folder + 20, folder, number))


def _attributes(top: bytes) -> None:
    for folder in range(10, 40):
        for number in range(_FILES_WITH_ATTRIBUTES):
            os.setxattr(top + b"/d%d/f%d" % (folder, number), f"user.note{number}", b"value %d\0\xff" % number)
    os.setxattr(top + b"/d2", "user.folder", b"")
    for number in range(3):
        os.setxattr(top + b"/d3/f%d" % number, "security.capability", _CAPABILITY)
    for number, mode in enumerate((0o4755, 0o2755, 0o6711, 0o1644, 0o000, 0o777)):
        os.chown(top + b"/d4/f%d" % number, 1000 + number, 65534)
        os.chmod(top + b"/d4/f%d" % number, mode)
    os.chmod(top + b"/d5", 0o3770)
    os.chown(top + b"/d5", 123456, 4_000_000_000)


def _sparse(top: bytes, generator: random.Random) -> None:
    os.mkdir(top + b"/sparse")
    with open(top + b"/sparse/hole", "wb") as file:
        file.truncate(32 << 20)
    with open(top + b"/sparse/islands", "wb") as file:
        for offset in (0, 5 << 20, 9_000_001):
            file.seek(offset)
            file.write(generator.randbytes(5000))
        file.truncate(16 << 20)
    _write(top + b"/sparse/dense", generator.randbytes(3 << 20))


def _unusual_entries(top: bytes) -> None:
    os.mkdir(top + b"/odd")
    for name in _UNUSUAL_NAMES:
        _write(top + b"/odd/" + name, name)
    # The target of a link on XFS has at most 1023 bytes.
    for number, target in enumerate((b"../d0/f1", b"/nowhere", b"x" * 1000, b".", b"new\nline")):
        os.symlink(target, top + b"/odd/symlink%d" % number)
        os.chown(top + b"/odd/symlink%d" % number, 42, 43, follow_symlinks=False)
    os.mkfifo(top + b"/odd/fifo", 0o620)
    os.mknod(top + b"/odd/socket", stat.S_IFSOCK | 0o640)
    for number in range(50):
        os.mkdir(top + b"/odd/empty%d" % number, 0o700)
    os.makedirs(top + b"/deep" + b"/deeper" * _NESTED_FOLDERS)


def _change_image(image: bytes) -> None:
    for number in range(0, 200, 2):
        os.unlink(image + b"gone/%d" % number)
    shutil.rmtree(image + b"emptied")
    # A folder that is deleted and made again is opaque: the files of the image must not appear in it.
    shutil.rmtree(image + b"replaced")
    os.mkdir(image + b"replaced", 0o711)
    for number in range(10):
        _write(image + b"replaced/new%d" % number, b"new\n")
    for number in range(20):
        with open(image + b"edited/%d" % number, "ab") as file:
            file.write(b"edited\n")
    for number in range(5):
        os.rename(image + b"moved/%d" % number, image + b"moved/elsewhere%d" % number)
        os.link(image + b"linked/%d" % number, image + b"linked/again%d" % number)
    os.chmod(image + b"kept", 0o750)


def _write(path: bytes, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def _walk(top: bytes) -> Iterator[bytes]:
    """`top` and every path below it."""
    yield top
    for folder, folders, files in os.walk(top):
        for name in folders + files:
            yield folder + b"/" + name


@dataclass(frozen=True)
class TreeEntry:
    """The properties of a path that are compared.

    `links` is the first path with the same inode, and empty for a folder or a whiteout. `content` is a digest, the
    target of a link, or the number of a device.
    """

    kind: str
    mode: str
    owner: str
    size: int
    mtime_ns: int
    nlink: int
    links: bytes
    xattrs: Mapping[str, bytes]
    content: str
    sparse: bool


def read_tree(root: str) -> dict[bytes, TreeEntry]:
    """The entries on the filesystem of `root`, by path below `root`; without mounts and ENGINE_FILES."""
    top = os.fsencode(root)
    device = os.stat(top).st_dev
    entries: dict[bytes, TreeEntry] = {}
    first_names: dict[int, bytes] = {}
    folders = [b""]
    while folders:
        folder = folders.pop()
        for name in sorted(os.listdir(top + folder + b"/")):
            path = folder + b"/" + name
            status = os.lstat(top + path)
            if status.st_dev != device:
                continue
            if stat.S_ISDIR(status.st_mode):
                folders.append(path)
            if path not in ENGINE_FILES:
                entries[path] = _entry(top + path, path, status, first_names)
    entries[b"/"] = _entry(top + b"/", b"/", os.stat(top), first_names)
    return entries


def _entry(full_path: bytes, path: bytes, status: os.stat_result, first_names: dict[int, bytes]) -> TreeEntry:
    # Since Linux 5.8 the kernel hard-links whiteouts to each other as it likes, which does not change their meaning.
    unlinked = stat.S_ISDIR(status.st_mode) or (stat.S_ISCHR(status.st_mode) and status.st_rdev == 0)
    return TreeEntry(
        kind=stat.filemode(status.st_mode)[0],
        mode=oct(stat.S_IMODE(status.st_mode)),
        owner=f"{status.st_uid}:{status.st_gid}",
        size=0 if stat.S_ISDIR(status.st_mode) else status.st_size,
        mtime_ns=status.st_mtime_ns,
        nlink=0 if unlinked else status.st_nlink,
        links=b"" if unlinked else first_names.setdefault(status.st_ino, path),
        xattrs={
            name: os.getxattr(full_path, name, follow_symlinks=False)
            for name in os.listxattr(full_path, follow_symlinks=False)
        },
        content=_content(full_path, status),
        sparse=stat.S_ISREG(status.st_mode) and status.st_blocks * 512 + 65536 < status.st_size,
    )


def _content(full_path: bytes, status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return repr(os.readlink(full_path))
    if not stat.S_ISREG(status.st_mode):
        return hex(status.st_rdev)
    with open(full_path, "rb", buffering=0) as file:
        if status.st_size < _SMALL_BYTES:
            return hashlib.sha1(file.read(), usedforsecurity=False).hexdigest()
        return hashlib.file_digest(file, "sha1").hexdigest()


def tree_differences(
    before: Mapping[bytes, TreeEntry],
    after: Mapping[bytes, TreeEntry],
    *,
    ignored_fields: frozenset[str] = frozenset(),
    limit: int = 20,
) -> str:
    """The first `limit` differences, one per line; empty if there is none. `ignored_fields` are not compared."""
    names = [field.name for field in fields(TreeEntry) if field.name not in ignored_fields]
    lines = [f"{path!r}: missing" for path in sorted(before.keys() - after.keys())]
    lines += [f"{path!r}: unexpected" for path in sorted(after.keys() - before.keys())]
    for path in sorted(before.keys() & after.keys()):
        for name in names:
            old_value, new_value = getattr(before[path], name), getattr(after[path], name)
            if old_value != new_value:
                lines.append(f"{path!r}: {name} was {old_value!r}, is {new_value!r}")
    return "\n".join([*lines[:limit], *([f"and {len(lines) - limit} more"] if len(lines) > limit else [])])


def create_layer_folders(root: Path, *numbers: int) -> list[Path]:
    """Make a data folder as the overlay2 driver does, with the empty layer of a container for each number.

    Returns the folders of the writable layers.
    """
    links = root / "overlay2/l"
    links.mkdir(parents=True, exist_ok=True)
    folders = []
    for number in numbers:
        name = f"{number:064x}"
        for layer, mark in ((f"{name}-init", "I"), (name, "C")):
            (root / "overlay2" / layer / "diff").mkdir(parents=True)
            short = f"{mark}{number:025X}"
            (root / "overlay2" / layer / "link").write_text(short)
            (links / short).symlink_to(f"../{layer}/diff")
        (root / "overlay2" / name / "lower").write_text(f"l/I{number:025X}:l/IMAGE0000000000000000000000")
        folders.append(root / "overlay2" / name / "diff")
    return folders


if __name__ == "__main__":
    create_tree(sys.argv[1], int(sys.argv[2]))
