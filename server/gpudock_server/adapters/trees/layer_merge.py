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

from gpudock_server.adapters.trees.interrupt import Interrupt
from gpudock_server.adapters.trees.layer_tar import (
    END,
    BrokenTarError,
    Entry,
    LayerIndex,
    header,
    opaque_mark,
    opened,
    whiteout,
)

_BLOCK: Final = 1 << 20
# Records of the extended header that say what a rewritten header says anew.
_SAID_ANEW: Final = ("path", "linkpath", "size")


class Kind(Enum):
    """What is at a path."""

    FOLDER = "folder"
    OTHER = "other"
    GONE = "gone"


@dataclass(slots=True)
class Node:
    """What is at a path once the layers lie on top of each other.

    `layer` is the number of the layer whose entry it is; None for what has gone, and for a folder that is known by what
    is in it alone. `opaque`: nothing of what lies below these layers shows in it.
    """

    kind: Kind
    layer: int | None = None
    opaque: bool = False


def stacked(layers: Sequence[LayerIndex]) -> dict[str, Node]:
    """What is seen of `layers`, the lowest first, and what they hide of whatever may lie below them."""
    stack = _Stack()
    for number in range(len(layers) - 1, -1, -1):
        stack.put_below(number, layers[number])
    return stack.nodes


class _Stack:
    """Layers from the uppermost down: what is decided stays, and each next one adds what still shows."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        # Below these paths nothing of a lower layer shows.
        self._sealed: set[str] = set()
        # Whether a folder is one of those, or lies below one: all that is in a folder has the same answer, and a path
        # may have thousands of folders above it.
        self._sealed_folders: dict[str, bool] = {}

    def put_below(self, number: int, layer: LayerIndex) -> None:
        """Add the next lower layer. What it hides, it hides of layers lower than itself."""
        to_seal: set[str] = set()
        for path, entry in layer.entries.items():
            if not self._hidden(path):
                self._entry(path, entry, number, to_seal)
        for path in layer.opaque:
            if not self._hidden(path) and path not in self._sealed:
                self._folder(path).opaque = True
                to_seal.add(path)
        for path in layer.gone:
            if not self._hidden(path) and path not in self._sealed:
                self._gone(path, to_seal)
        self._sealed |= to_seal
        self._sealed_folders.clear()

    def _entry(self, path: str, entry: Entry, number: int, to_seal: set[str]) -> None:
        if path in self._sealed:
            return
        node = self.nodes.get(path)
        if node is None:
            self._imply_parents(path)
            self.nodes[path] = Node(Kind.FOLDER if entry.folder else Kind.OTHER, number)
        elif not entry.folder:
            # A folder of an upper layer stands where this one has a file: what lies lower still is hidden by both.
            node.opaque = True
        elif node.layer is None:
            node.layer = number
        if not entry.folder:
            to_seal.add(path)

    def _gone(self, path: str, to_seal: set[str]) -> None:
        node = self.nodes.get(path)
        if node is None:
            self._imply_parents(path)
            self.nodes[path] = Node(Kind.GONE)
        else:
            node.opaque = True
        to_seal.add(path)

    def _folder(self, path: str) -> Node:
        if path not in self.nodes:
            self._imply_parents(path)
            self.nodes[path] = Node(Kind.FOLDER)
        return self.nodes[path]

    def _imply_parents(self, path: str) -> None:
        for parent in _parents(path):
            if parent in self.nodes:
                return
            self.nodes[parent] = Node(Kind.FOLDER)

    def _hidden(self, path: str) -> bool:
        known, unknown, hidden = self._sealed_folders, [], False
        for folder in _parents(path):
            if folder in known:
                hidden = known[folder]
                break
            unknown.append(folder)
            if folder in self._sealed:
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
    below: Mapping[str, Node],
    interrupt: Interrupt,
) -> None:
    """Write the layer that is all of `layers`, the lowest first, to lie on what `below` shows.

    Raises BrokenTarError, OSError, Interrupted.
    """
    nodes = stacked([index for index, _ in layers])
    carriers = _carriers(nodes, [index for index, _ in layers])
    tars = [opened(_rewound(file)) for _, file in layers]
    # Parents before what is in them, and the first name of a hard-linked file before the others.
    for path in sorted(nodes, key=_order):
        interrupt.check()
        node = nodes[path]
        if node.kind is Kind.GONE:
            if _shows(below, path) and not any(nodes[parent].opaque for parent in _parents(path)):
                out.write(whiteout(path))
        elif node.layer is not None:
            index, file = layers[node.layer]
            _write_entry(out, path, carriers.get(path, path), (index, tars[node.layer], file), interrupt)
        # In a folder that lies on nothing the mark would be a lie, and a whiteout would even show as a file.
        if node.opaque and path in below and below[path].kind is Kind.FOLDER:
            out.write(opaque_mark(path))
    out.write(END)


def _shows(below: Mapping[str, Node], path: str) -> bool:
    return path in below and below[path].kind is not Kind.GONE


def _order(path: str) -> str:
    """Sorts as the list of its parts would, which takes fifty times as much memory: no name has a NUL in it."""
    return path.replace("/", "\0")


def _rewound(file: IO[bytes]) -> IO[bytes]:
    file.seek(0)
    return file


def _carriers(nodes: Mapping[str, Node], layers: Sequence[LayerIndex]) -> dict[str, str]:
    """For every name of a hard-linked file that still shows: the first of its names that do, which has the content."""
    names: dict[tuple[int, str], list[str]] = {}
    for path, node in nodes.items():
        if node.layer is not None and node.kind is Kind.OTHER:
            names.setdefault((node.layer, _root(layers[node.layer], path)), []).append(path)
    firsts = {group: min(paths, key=_order) for group, paths in names.items()}
    return {path: firsts[group] for group, paths in names.items() for path in paths}


def _root(index: LayerIndex, path: str) -> str:
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
    carrier: str,
    source: tuple[LayerIndex, tarfile.TarFile, IO[bytes]],
    interrupt: Interrupt,
) -> None:
    index, tar, file = source
    entry = index.entries[path]
    if entry.folder or (path == carrier and entry.link is None) or entry.link == carrier:
        _copy(out, file, entry.start, entry.end, interrupt)
    elif path == carrier:
        # It was a link to a name that no longer shows, or comes later: now the content is its own.
        owner = index.entries[_root(index, path)]
        out.write(header(_renamed(tar, file, owner, path)))
        _copy(out, file, owner.data, owner.end, interrupt)
    else:
        link = _renamed(tar, file, entry, path)
        link.type, link.linkname, link.size = tarfile.LNKTYPE, carrier, 0
        out.write(header(link))


def _renamed(tar: tarfile.TarFile, file: IO[bytes], entry: Entry, path: str) -> tarfile.TarInfo:
    file.seek(entry.start)
    try:
        found = tarfile.TarInfo.fromtarfile(tar)
    except tarfile.TarError as error:
        raise BrokenTarError(f"no entry at byte {entry.start}: {error}") from error
    member = copy.copy(found)
    member.pax_headers = {name: value for name, value in found.pax_headers.items() if name not in _SAID_ANEW}
    member.name = path
    return member


def _copy(out: IO[bytes], file: IO[bytes], start: int, end: int, interrupt: Interrupt) -> None:
    file.seek(start)
    left = end - start
    while left:
        interrupt.check()
        piece = file.read(min(left, _BLOCK))
        if not piece:
            raise BrokenTarError(f"it ends {left} bytes too early")
        out.write(piece)
        left -= len(piece)
