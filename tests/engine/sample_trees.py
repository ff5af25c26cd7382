"""A tree with everything in it that a carry can lose, and recordings of trees that can be compared.

`grow` makes the tree inside a container (see `grow_command`) or in any folder; `record` reads what a container sees,
from the host, through `/proc/<pid>/root`. The module runs by itself: its own text is what is sent into a container.
"""

# Its names are bytes, because not every one is text; its modes are odd on purpose.
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

# For what is longer the buffer of 256 KiB that file_digest makes is worth it.
_SMALL_BYTES = 1 << 16
_FOLDERS = 100
_LINKED = 12
_NOTED = 8
_DEEP = 60
# version 2, effective, CAP_NET_BIND_SERVICE permitted (linux/capability.h, struct vfs_cap_data)
_CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
# Before 1970, with a fraction that only nanoseconds show, and beyond 2038.
_TIMES_NS = (-86_400_000_000_123, 1_234_567_890_123_456_789, 4_102_444_800_999_999_999)
_ODD_NAMES = (
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


# Made by the engine in a layer of its own, below the writable one and new for every container.
ENGINE_FILES = frozenset({b"/.dockerenv", b"/etc", b"/etc/mtab"})


def image_files() -> dict[str, bytes]:
    """Files that the image has to bring, for `grow` to delete, replace and edit."""
    kinds = {"kept": 50, "gone": 200, "replaced": 60, "emptied": 40, "edited": 20, "moved": 5, "linked": 5}
    return {
        f"image/{kind}/{number}": f"{kind} {number}\n".encode()
        for kind, count in kinds.items()
        for number in range(count)
    }


def create_tree_command(root: str = "/", files: int = FILES) -> list[str]:
    """A command that makes the tree below `root`; it needs Python in the container."""
    source = Path(__file__).read_text(encoding="utf-8")
    return ["sh", "-c", 'exec python3 -c "$1" "$2" "$3"', "grow", source, root, str(files)]


def create_tree(root: str, files: int = FILES) -> None:
    """Make the tree below `root`, the same one every time. Where `image_files` lie there, many of them are changed."""
    base = os.fsencode(root.rstrip("/")) + b"/"
    top = base + b"grown"
    os.mkdir(top)
    dice = random.Random(7)  # noqa: S311 - the same tree every time
    _plain_files(top, dice, files // _FOLDERS)
    _hard_links(top)
    _attributes(top)
    _sparse(top, dice)
    _odd_ones(top)
    if os.path.isdir(base + b"image"):
        _change_image(base + b"image/")
    for number, path in enumerate(sorted(_walk(top))):
        time = _TIMES_NS[number % 3] + number * 1_000_003
        os.utime(path, ns=(time, time), follow_symlinks=False)
    os.chmod(base, 0o751)
    os.utime(base, ns=(_TIMES_NS[1], _TIMES_NS[1]))


def _plain_files(top: bytes, dice: random.Random, per_folder: int) -> None:
    for folder in range(_FOLDERS):
        os.mkdir(top + b"/d%d" % folder)
        for number in range(per_folder):
            _write(top + b"/d%d/f%d" % (folder, number), dice.randbytes(dice.randrange(64)))


def _hard_links(top: bytes) -> None:
    """Groups of four names, in four folders."""
    os.mkdir(top + b"/links")
    for folder in range(50):
        for number in range(_LINKED):
            first = top + b"/d%d/f%d" % (folder, number)
            os.link(first, top + b"/links/%d-%d" % (folder, number))
            os.link(first, top + b"/d%d/linked%d-%d" % (99 - folder, folder, number))
            os.link(first, top + b"/d%d/linked-again%d-%d" % (folder + 20, folder, number))


def _attributes(top: bytes) -> None:
    for folder in range(10, 40):
        for number in range(_NOTED):
            os.setxattr(top + b"/d%d/f%d" % (folder, number), f"user.note{number}", b"value %d\0\xff" % number)
    os.setxattr(top + b"/d2", "user.folder", b"")
    for number in range(3):
        os.setxattr(top + b"/d3/f%d" % number, "security.capability", _CAPABILITY)
    for number, mode in enumerate((0o4755, 0o2755, 0o6711, 0o1644, 0o000, 0o777)):
        os.chown(top + b"/d4/f%d" % number, 1000 + number, 65534)
        os.chmod(top + b"/d4/f%d" % number, mode)
    os.chmod(top + b"/d5", 0o3770)
    os.chown(top + b"/d5", 123456, 4_000_000_000)


def _sparse(top: bytes, dice: random.Random) -> None:
    os.mkdir(top + b"/sparse")
    with open(top + b"/sparse/hole", "wb") as file:
        file.truncate(32 << 20)
    with open(top + b"/sparse/islands", "wb") as file:
        for offset in (0, 5 << 20, 9_000_001):
            file.seek(offset)
            file.write(dice.randbytes(5000))
        file.truncate(16 << 20)
    _write(top + b"/sparse/dense", dice.randbytes(3 << 20))


def _odd_ones(top: bytes) -> None:
    os.mkdir(top + b"/odd")
    for name in _ODD_NAMES:
        _write(top + b"/odd/" + name, name)
    # XFS takes 1023 bytes for a link's target.
    for number, target in enumerate((b"../d0/f1", b"/nowhere", b"x" * 1000, b".", b"new\nline")):
        os.symlink(target, top + b"/odd/symlink%d" % number)
        os.chown(top + b"/odd/symlink%d" % number, 42, 43, follow_symlinks=False)
    os.mkfifo(top + b"/odd/fifo", 0o620)
    os.mknod(top + b"/odd/socket", stat.S_IFSOCK | 0o640)
    for number in range(50):
        os.mkdir(top + b"/odd/empty%d" % number, 0o700)
    os.makedirs(top + b"/deep" + b"/deeper" * _DEEP)


def _change_image(image: bytes) -> None:
    for number in range(0, 200, 2):
        os.unlink(image + b"gone/%d" % number)
    shutil.rmtree(image + b"emptied")
    shutil.rmtree(image + b"replaced")  # and made again: opaque, none of the image's files may come back
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
    """Everything below `top` and itself."""
    yield top
    for folder, folders, files in os.walk(top):
        for name in folders + files:
            yield folder + b"/" + name


@dataclass(frozen=True)
class TreeEntry:
    """What is compared of one name.

    `links` is the first name of those that share the inode, empty for a folder or a whiteout.
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
    """Everything on the filesystem of `root`, by its path below it, without what is mounted there or ENGINE_MADE."""
    top = os.fsencode(root)
    device = os.stat(top).st_dev
    found: dict[bytes, TreeEntry] = {}
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
                found[path] = _entry(top + path, path, status, first_names)
    found[b"/"] = _entry(top + b"/", b"/", os.stat(top), first_names)
    return found


def _entry(place: bytes, path: bytes, status: os.stat_result, first_names: dict[int, bytes]) -> TreeEntry:
    # The kernel hard-links whiteouts to each other as it likes (since 5.8); they mean the same either way.
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
            name: os.getxattr(place, name, follow_symlinks=False) for name in os.listxattr(place, follow_symlinks=False)
        },
        content=_content(place, status),
        sparse=stat.S_ISREG(status.st_mode) and status.st_blocks * 512 + 65536 < status.st_size,
    )


def _content(place: bytes, status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return repr(os.readlink(place))
    if not stat.S_ISREG(status.st_mode):
        return hex(status.st_rdev)
    with open(place, "rb", buffering=0) as file:
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
    """The differences, one a line; empty when there is none. `ignored_fields` are not compared."""
    names = [field.name for field in fields(TreeEntry) if field.name not in ignored_fields]
    lines = [f"{path!r}: gone" for path in sorted(before.keys() - after.keys())]
    lines += [f"{path!r}: came from nowhere" for path in sorted(after.keys() - before.keys())]
    for path in sorted(before.keys() & after.keys()):
        for name in names:
            one, other = getattr(before[path], name), getattr(after[path], name)
            if one != other:
                lines.append(f"{path!r}: {name} was {one!r}, is {other!r}")
    return "\n".join([*lines[:limit], *([f"and {len(lines) - limit} more"] if len(lines) > limit else [])])


def create_layer_folders(root: Path, *numbers: int) -> list[Path]:
    """Lay out a data folder as the overlay2 driver does, with one container's empty layer for each number."""
    links = root / "overlay2/l"
    links.mkdir(parents=True, exist_ok=True)
    planted = []
    for number in numbers:
        name = f"{number:064x}"
        for which, mark in ((f"{name}-init", "I"), (name, "C")):
            (root / "overlay2" / which / "diff").mkdir(parents=True)
            short = f"{mark}{number:025X}"
            (root / "overlay2" / which / "link").write_text(short)
            (links / short).symlink_to(f"../{which}/diff")
        (root / "overlay2" / name / "lower").write_text(f"l/I{number:025X}:l/IMAGE0000000000000000000000")
        planted.append(root / "overlay2" / name / "diff")
    return planted


if __name__ == "__main__":
    create_tree(sys.argv[1], int(sys.argv[2]))
