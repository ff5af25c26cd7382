"""What the tar of an image's layer says: its entries, what it takes away, and where each entry lies in it.

The format is the image specification's (opencontainers/image-spec, layer.md): an entry replaces what lower layers have
at its path, `.wh.NAME` takes NAME away from them, and `.wh..wh..opq` everything in its folder.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field
from typing import IO, Final

BLOCK: Final = 512
END: Final = b"\0" * (2 * BLOCK)

_WHITEOUT: Final = ".wh."
_OPAQUE: Final = ".wh..wh..opq"
# Of the aufs driver, which is long gone: its own notes, and no files of anybody's.
_AUFS_METADATA: Final = ".wh..wh."


class BrokenTarError(Exception):
    """What should be a layer's tar is none; the text says in what."""


@dataclass(frozen=True, slots=True)
class TarEntry:
    """One entry: its headers begin at `start`, its content at `data`, and what follows it at `end`.

    `link` is the path of what it is a hard link to, None for everything else.
    """

    folder: bool
    start: int
    data: int
    end: int
    link: str | None = None


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """A layer, by path.

    Paths have no slash at either end, and that of the root is empty. Bytes that are no UTF-8 are escaped as in Python's
    file names.
    """

    entries: dict[str, TarEntry] = field(default_factory=dict)
    whiteouts: set[str] = field(default_factory=set)
    opaque: set[str] = field(default_factory=set)


def open_tar(file: IO[bytes]) -> tarfile.TarFile:
    """A layer's tar, uncompressed and seekable. Raises BrokenTarError."""
    try:
        return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
    except tarfile.TarError as error:
        raise BrokenTarError(f"not the tar of a layer: {error}") from error


def read_layer(file: IO[bytes]) -> LayerIndex:
    """Index a layer. Only headers are read. Raises BrokenTarError."""
    index = LayerIndex()
    file.seek(0)
    tar = open_tar(file)
    try:
        while (member := tar.next()) is not None:
            _index_member(index, member, tar.offset)
            # tarfile remembers every member it has met, for lookups that are not made here.
            tar.members.clear()  # type: ignore[attr-defined]  # what its documentation calls the list of members
    except (tarfile.TarError, ValueError) as error:
        raise BrokenTarError(f"broken at byte {tar.offset}: {error}") from error
    # tarfile takes a header that makes no sense for the end.
    file.seek(tar.offset)
    if file.read(BLOCK).strip(b"\0"):
        raise BrokenTarError(f"broken at byte {tar.offset}: no header where one should be")
    _resolve_whiteouts(index)
    return index


def _index_member(index: LayerIndex, member: tarfile.TarInfo, end: int) -> None:
    path = _normal(member.name)
    parent, _, name = path.rpartition("/")
    if name == _OPAQUE:
        index.opaque.add(parent)
    elif name.startswith(_AUFS_METADATA):
        return
    elif name.startswith(_WHITEOUT):
        index.whiteouts.add(joined(parent, name.removeprefix(_WHITEOUT)))
    else:
        link = _normal(member.linkname) if member.islnk() else None
        # Of two with one name the later wins, as when it is unpacked.
        index.entries[path] = TarEntry(member.isdir(), member.offset, member.offset_data, end, link)


def _resolve_whiteouts(index: LayerIndex) -> None:
    """A whiteout is about lower layers only: beside a folder of its own layer it empties what is below that."""
    for path in [path for path in index.whiteouts if path in index.entries]:
        index.whiteouts.discard(path)
        if index.entries[path].folder:
            index.opaque.add(path)


def _normal(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise BrokenTarError(f"{name!r} leads out of the image")
    return "/".join(parts)


def joined(parent: str, name: str) -> str:
    """The path of `name` in the folder `parent`."""
    return f"{parent}/{name}" if parent else name


def whiteout(path: str) -> bytes:
    """The entry that takes `path` away from the layers below."""
    parent, _, name = path.rpartition("/")
    return _marker(joined(parent, _WHITEOUT + name))


def opaque_marker(path: str) -> bytes:
    """The entry that takes away what the layers below have in the folder `path`."""
    return _marker(joined(path, _OPAQUE))


def _marker(path: str) -> bytes:
    return header(tarfile.TarInfo(path))


def header(member: tarfile.TarInfo) -> bytes:
    """An entry's headers."""
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
