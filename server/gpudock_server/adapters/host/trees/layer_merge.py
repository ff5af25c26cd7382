"""Merges image layers: what their union shows, and the tar of one layer with the same effect.

Entries are copied byte for byte with their headers, which keeps owners, times and attributes. Only what relates to
other layers is rewritten: whiteouts, opaque folders, and hard links whose target is hidden.
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
# Records of the extended header that a rewritten header replaces.
_REPLACED_PAX_RECORDS: Final = ("path", "linkpath", "size")


class EntryKind(Enum):
    """What is at a path."""

    FOLDER = "folder"
    OTHER = "other"
    WHITEOUT = "whiteout"


@dataclass(slots=True)
class MergedEntry:
    """What the union of the layers has at a path.

    `layer` is the number of the layer whose entry it is; None for a whiteout, and for a folder without an entry.
    `opaque`: the folder hides what is below these layers.
    """

    kind: EntryKind
    layer: int | None = None
    opaque: bool = False


def merge_layers(layers: Sequence[LayerIndex]) -> dict[str, MergedEntry]:
    """The union of `layers` (the lowest first) by path, with what they hide of layers below them."""
    stack = _LayerMerge()
    for number in range(len(layers) - 1, -1, -1):
        stack.add_lower(number, layers[number])
    return stack.nodes


class _LayerMerge:
    """Merges from the uppermost layer down: each layer adds the entries that the layers above do not hide."""

    def __init__(self) -> None:
        self.nodes: dict[str, MergedEntry] = {}
        # Paths below which lower layers are hidden.
        self._hidden_paths: set[str] = set()
        # Whether each folder is one of those or below one. A cache: a path can have thousands of parents, and all
        # entries of a folder have the same answer.
        self._sealed_folders: dict[str, bool] = {}

    def add_lower(self, number: int, layer: LayerIndex) -> None:
        """Add the next lower layer; what it hides takes effect for the layers below it."""
        to_hide: set[str] = set()
        for path, entry in layer.entries.items():
            if not self._hidden(path):
                self._add_entry(path, entry, number, to_hide)
        for path in layer.opaque:
            if not self._hidden(path) and path not in self._hidden_paths:
                self._folder(path).opaque = True
                to_hide.add(path)
        for path in layer.whiteouts:
            if not self._hidden(path) and path not in self._hidden_paths:
                self._add_whiteout(path, to_hide)
        self._hidden_paths |= to_hide
        self._sealed_folders.clear()

    def _add_entry(self, path: str, entry: TarEntry, number: int, to_hide: set[str]) -> None:
        if path in self._hidden_paths:
            return
        node = self.nodes.get(path)
        if node is None:
            self._imply_parents(path)
            self.nodes[path] = MergedEntry(EntryKind.FOLDER if entry.folder else EntryKind.OTHER, number)
        elif not entry.folder:
            # An upper layer has a folder here and this layer a file: both hide what lower layers have here.
            node.opaque = True
        elif node.layer is None:
            node.layer = number
        if not entry.folder:
            to_hide.add(path)

    def _add_whiteout(self, path: str, to_hide: set[str]) -> None:
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
    """The parent folders of a path, the nearest first, without the root, which no layer can replace."""
    while "/" in path:
        path = path.rpartition("/")[0]
        yield path


def write_merged(
    out: IO[bytes],
    layers: Sequence[tuple[LayerIndex, IO[bytes]]],
    below: Mapping[str, MergedEntry],
    interrupt: Interrupt,
) -> None:
    """Write the tar of one layer with the effect of `layers` (the lowest first) on top of `below`.

    `below` is the result of `merge_layers` for the layers below. Raises BrokenTarError, OSError, Interrupted.
    """
    nodes = merge_layers([index for index, _ in layers])
    content_paths = _content_paths(nodes, [index for index, _ in layers])
    tars = [open_tar(_rewind(file)) for _, file in layers]
    # Folders before their content, and the first name of a hard-linked file before the others.
    for path in sorted(nodes, key=_order):
        interrupt.check()
        node = nodes[path]
        if node.kind is EntryKind.WHITEOUT:
            if _shows(below, path) and not any(nodes[parent].opaque for parent in _parents(path)):
                out.write(whiteout(path))
        elif node.layer is not None:
            index, file = layers[node.layer]
            _write_entry(out, path, content_paths.get(path, path), (index, tars[node.layer], file), interrupt)
        # Only for a folder that the layers below have: without one the marker would be wrong.
        if node.opaque and path in below and below[path].kind is EntryKind.FOLDER:
            out.write(opaque_marker(path))
    out.write(END)


def _shows(below: Mapping[str, MergedEntry], path: str) -> bool:
    return path in below and below[path].kind is not EntryKind.WHITEOUT


def _order(path: str) -> str:
    """A sort key with the order of the list of parts, which would take fifty times the memory. Names have no NUL."""
    return path.replace("/", "\0")


def _rewind(file: IO[bytes]) -> IO[bytes]:
    file.seek(0)
    return file


def _content_paths(nodes: Mapping[str, MergedEntry], layers: Sequence[LayerIndex]) -> dict[str, str]:
    """For every visible name of a hard-linked file, the first visible name, at which the content is written."""
    names: dict[tuple[int, str], list[str]] = {}
    for path, node in nodes.items():
        if node.layer is not None and node.kind is EntryKind.OTHER:
            names.setdefault((node.layer, _link_target(layers[node.layer], path)), []).append(path)
    firsts = {group: min(paths, key=_order) for group, paths in names.items()}
    return {path: firsts[group] for group, paths in names.items() for path in paths}


def _link_target(index: LayerIndex, path: str) -> str:
    """The path of the entry with the content, which the format requires to be in the same layer."""
    start, visited = path, {path}
    while (link := index.entries[path].link) is not None:
        if link not in index.entries or link in visited:
            raise BrokenTarError(f"hard link {start!r} points to {link!r}, which is not in the layer")
        visited.add(link)
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
        # Its target is hidden or written later, so the content is written here.
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
        raise BrokenTarError(f"corrupt layer: no entry at byte {entry.start}: {error}") from error
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
            raise BrokenTarError(f"corrupt layer: truncated by {left} bytes")
        out.write(piece)
        left -= len(piece)
