"""Indexes the tar of an image layer: its entries, their position in the tar, and its whiteouts.

The format is the image specification's (opencontainers/image-spec, layer.md): an entry replaces what lower layers have
at its path, `.wh.NAME` hides NAME of lower layers, and `.wh..wh..opq` hides everything of lower layers in its folder.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field
from typing import IO, Final

BLOCK: Final = 512
END: Final = b"\0" * (2 * BLOCK)

_WHITEOUT: Final = ".wh."
_OPAQUE: Final = ".wh..wh..opq"
# Metadata of the former aufs driver, not files of the image.
_AUFS_METADATA: Final = ".wh..wh."


class BrokenTarError(Exception):
    """A layer's tar cannot be read; the message says why."""


@dataclass(frozen=True, slots=True)
class TarEntry:
    """The position of an entry in its tar: offsets in bytes of its headers, of its content, and of what follows it.

    `link` is the path that a hard link points to, None for other entries.
    """

    folder: bool
    start: int
    data: int
    end: int
    link: str | None = None


@dataclass(frozen=True, slots=True)
class LayerIndex:
    """The entries of a layer by path, the paths it hides, and its opaque folders.

    Paths have no slash at either end; the root's path is empty. Bytes that are not UTF-8 are surrogate-escaped, as in
    Python's file names.
    """

    entries: dict[str, TarEntry] = field(default_factory=dict)
    whiteouts: set[str] = field(default_factory=set)
    opaque: set[str] = field(default_factory=set)


def open_tar(file: IO[bytes]) -> tarfile.TarFile:
    """Open a layer's tar, which must be uncompressed and seekable. Raises BrokenTarError."""
    try:
        return tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
    except tarfile.TarError as error:
        raise BrokenTarError(f"not a layer tar: {error}") from error


def read_layer(file: IO[bytes]) -> LayerIndex:
    """Index a layer; reads only headers. Raises BrokenTarError."""
    index = LayerIndex()
    file.seek(0)
    tar = open_tar(file)
    try:
        while (member := tar.next()) is not None:
            _index_member(index, member, tar.offset)
            # Saves memory: tarfile keeps every member for lookups, which are not used here.
            tar.members.clear()  # type: ignore[attr-defined]  # what its documentation calls the list of members
    except (tarfile.TarError, ValueError) as error:
        raise BrokenTarError(f"corrupt layer at byte {tar.offset}: {error}") from error
    # tarfile treats an invalid header as the end of the tar.
    file.seek(tar.offset)
    if file.read(BLOCK).strip(b"\0"):
        raise BrokenTarError(f"corrupt layer at byte {tar.offset}: expected a header")
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
        # The later of two entries with the same path wins, as when the tar is unpacked.
        index.entries[path] = TarEntry(member.isdir(), member.offset, member.offset_data, end, link)


def _resolve_whiteouts(index: LayerIndex) -> None:
    """Turn a whiteout of a folder that this layer has too into an opaque folder; drop it for a file of this layer."""
    for path in [path for path in index.whiteouts if path in index.entries]:
        index.whiteouts.discard(path)
        if index.entries[path].folder:
            index.opaque.add(path)


def _normal(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise BrokenTarError(f"path {name!r} is outside the image root")
    return "/".join(parts)


def joined(parent: str, name: str) -> str:
    """The path of `name` in the folder `parent`."""
    return f"{parent}/{name}" if parent else name


def whiteout(path: str) -> bytes:
    """The tar entry that hides `path` of lower layers."""
    parent, _, name = path.rpartition("/")
    return _marker(joined(parent, _WHITEOUT + name))


def opaque_marker(path: str) -> bytes:
    """The tar entry that hides everything of lower layers in the folder `path`."""
    return _marker(joined(path, _OPAQUE))


def _marker(path: str) -> bytes:
    return header(tarfile.TarInfo(path))


def header(member: tarfile.TarInfo) -> bytes:
    """The headers of an entry, as bytes."""
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
