"""Several layers as one: what is seen of them when they lie on top of each other, and the tar of a layer that is that.

Entries are copied byte for byte, headers and all, so that whatever they say of owners, times and attributes is kept.
Only what one layer says of another is said anew: whiteouts, opaque folders, and hard links whose first name has gone.
"""

from __future__ import annotations

import copy
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import IO, Final

from gpudock_server.adapters.host.trees.interrupt import Interrupt
from gpudock_server.adapters.host.trees.layer_tar import (
    END,
    BrokenTarError,
    LayerIndex,
    TarEntry,
    header,
    opaque_marker,
    open_tar,
    whiteout,
)

_BLOCK_BYTES: Final = 1 << 20
# Records of the extended header that say what a rewritten header says anew.
_REPLACED_PAX_RECORDS: Final = ("path", "linkpath", "size")


class EntryKind(Enum):
    """What is at a path."""

    FOLDER = "folder"
    OTHER = "other"
    WHITEOUT = "gone"


@dataclass(slots=True)
class MergedEntry:
    """What is at a path once the layers lie on top of each other.

    `layer` is the number of the layer whose entry it is; None for what has gone, and for a folder that is known by what
    is in it alone. `opaque`: nothing of what lies below these layers shows in it.
    """

    kind: EntryKind
    layer: int | None = None
    opaque: bool = False


def merge_layers(layers: Sequence[LayerIndex]) -> dict[str, MergedEntry]:
    """What is seen of `layers`, the lowest first, and what they hide of whatever may lie below them."""
    stack = _LayerMerge()
    for number in range(len(layers) - 1, -1, -1):
        stack.add_lower(number, layers[number])
    return stack.nodes


class _LayerMerge:
    """Layers from the uppermost down: what is decided stays, and each next one adds what still shows."""

    def __init__(self) -> None:
        self.nodes: dict[str, MergedEntry] = {}
        # Below these paths nothing of a lower layer shows.
        self._hidden_paths: set[str] = set()
        # Whether a folder is one of those, or lies below one: all that is in a folder has the same answer, and a path
        # may have thousands of folders above it.
        self._sealed_folders: dict[str, bool] = {}

    def add_lower(self, number: int, layer: LayerIndex) -> None:
        """Add the next lower layer. What it hides, it hides of layers lower than itself."""
        to_hide: set[str] = set()
        for path, entry in layer.entries.items():
            if not self._hidden(path):
                self._entry(path, entry, number, to_hide)
        for path in layer.opaque:
            if not self._hidden(path) and path not in self._hidden_paths:
                self._folder(path).opaque = True
                to_hide.add(path)
        for path in layer.whiteouts:
            if not self._hidden(path) and path not in self._hidden_paths:
                self._gone(path, to_hide)
        self._hidden_paths |= to_hide
        self._sealed_folders.clear()

    def _entry(self, path: str, entry: TarEntry, number: int, to_hide: set[str]) -> None:
        if path in self._hidden_paths:
            return
        node = self.nodes.get(path)
        if node is None:
            self._imply_parents(path)
            self.nodes[path] = MergedEntry(EntryKind.FOLDER if entry.folder else EntryKind.OTHER, number)
        elif not entry.folder:
            # A folder of an upper layer stands where this one has a file: what lies lower still is hidden by both.
            node.opaque = True
        elif node.layer is None:
            node.layer = number
        if not entry.folder:
            to_hide.add(path)

    def _gone(self, path: str, to_hide: set[str]) -> None:
        node = self.nodes.get(path)
        if node is None:
            self._imply_parents(path)
            self.nodes[path] = MergedEntry(EntryKind.WHITEOUT)
        else:
            node.opaque = True
        to_hide.add(path)

    def _folder(self, path: str) -> MergedEntry:
        if path not in self.nodes:
            self._imply_parents(path)
            self.nodes[path] = MergedEntry(EntryKind.FOLDER)
        return self.nodes[path]

    def _imply_parents(self, path: str) -> None:
        for parent in _parents(path):
            if parent in self.nodes:
                return
            self.nodes[parent] = MergedEntry(EntryKind.FOLDER)

    def _hidden(self, path: str) -> bool:
        known, unknown, hidden = self._sealed_folders, [], False
        for folder in _parents(path):
            if folder in known:
                hidden = known[folder]
                break
            unknown.append(folder)
            if folder in self._hidden_paths:
                hidden = True
                break
        known.update(dict.fromkeys(unknown, hidden))
        return hidden


def _parents(path: str) -> Iterator[str]:
    """The folders above a path, the nearest first; not the root of all, which no layer can replace."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def write_merged(
    out: IO[bytes],
    layers: Sequence[tuple[LayerIndex, IO[bytes]]],
    below: Mapping[str, MergedEntry],
    interrupt: Interrupt,
) -> None:
    """Write the layer that is all of `layers`, the lowest first, to lie on what `below` shows.

    Raises BrokenTarError, OSError, Interrupted.
    """
    nodes = merge_layers([index for index, _ in layers])
    content_paths = _content_paths(nodes, [index for index, _ in layers])
    tars = [open_tar(_rewind(file)) for _, file in layers]
    # Parents before what is in them, and the first name of a hard-linked file before the others.
    for path in sorted(nodes, key=_order):
        interrupt.check()
        node = nodes[path]
        if node.kind is EntryKind.WHITEOUT:
            if _shows(below, path) and not any(nodes[parent].opaque for parent in _parents(path)):
                out.write(whiteout(path))
        elif node.layer is not None:
            index, file = layers[node.layer]
            _write_entry(out, path, content_paths.get(path, path), (index, tars[node.layer], file), interrupt)
        # In a folder that lies on nothing the mark would be a lie, and a whiteout would even show as a file.
        if node.opaque and path in below and below[path].kind is EntryKind.FOLDER:
            out.write(opaque_marker(path))
    out.write(END)


def _shows(below: Mapping[str, MergedEntry], path: str) -> bool:
    return path in below and below[path].kind is not EntryKind.WHITEOUT


def _order(path: str) -> str:
    """Sorts as the list of its parts would, which takes fifty times as much memory: no name has a NUL in it."""
    return path.replace("/", "\0")


def _rewind(file: IO[bytes]) -> IO[bytes]:
    file.seek(0)
    return file


def _content_paths(nodes: Mapping[str, MergedEntry], layers: Sequence[LayerIndex]) -> dict[str, str]:
    """For every name of a hard-linked file that still shows: the first of its names that do, which has the content."""
    names: dict[tuple[int, str], list[str]] = {}
    for path, node in nodes.items():
        if node.layer is not None and node.kind is EntryKind.OTHER:
            names.setdefault((node.layer, _link_target(layers[node.layer], path)), []).append(path)
    firsts = {group: min(paths, key=_order) for group, paths in names.items()}
    return {path: firsts[group] for group, paths in names.items() for path in paths}


def _link_target(index: LayerIndex, path: str) -> str:
    """The name that has the content: an entry of the same layer, by the format."""
    start, seen = path, {path}
    while (link := index.entries[path].link) is not None:
        if link not in index.entries or link in seen:
            raise BrokenTarError(f"{start!r} is a hard link to {link!r}, which its layer does not have")
        seen.add(link)
        path = link
    return path


def _write_entry(
    out: IO[bytes],
    path: str,
    content_path: str,
    source: tuple[LayerIndex, tarfile.TarFile, IO[bytes]],
    interrupt: Interrupt,
) -> None:
    index, tar, file = source
    entry = index.entries[path]
    if entry.folder or (path == content_path and entry.link is None) or entry.link == content_path:
        _copy(out, file, entry.start, entry.end, interrupt)
    elif path == content_path:
        # It was a link to a name that no longer shows, or comes later: now the content is its own.
        owner = index.entries[_link_target(index, path)]
        out.write(header(_renamed_header(tar, file, owner, path)))
        _copy(out, file, owner.data, owner.end, interrupt)
    else:
        link = _renamed_header(tar, file, entry, path)
        link.type, link.linkname, link.size = tarfile.LNKTYPE, content_path, 0
        out.write(header(link))


def _renamed_header(tar: tarfile.TarFile, file: IO[bytes], entry: TarEntry, path: str) -> tarfile.TarInfo:
    file.seek(entry.start)
    try:
        found = tarfile.TarInfo.fromtarfile(tar)
    except tarfile.TarError as error:
        raise BrokenTarError(f"no entry at byte {entry.start}: {error}") from error
    member = copy.copy(found)
    member.pax_headers = {name: value for name, value in found.pax_headers.items() if name not in _REPLACED_PAX_RECORDS}
    member.name = path
    return member


def _copy(out: IO[bytes], file: IO[bytes], start: int, end: int, interrupt: Interrupt) -> None:
    file.seek(start)
    left = end - start
    while left:
        interrupt.check()
        piece = file.read(min(left, _BLOCK_BYTES))
        if not piece:
            raise BrokenTarError(f"it ends {left} bytes too early")
        out.write(piece)
        left -= len(piece)
