"""Merged layers: on any base, the merged layer shows the same files as the original layers."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Mapping, Sequence
from typing import IO

import pytest
from gpudock_server.adapters.host.trees.interrupt import Interrupt
from gpudock_server.adapters.host.trees.layer_merge import merge_layers, write_merged
from gpudock_server.adapters.host.trees.layer_tar import BrokenTarError, read_layer
from hypothesis import given, settings
from hypothesis import strategies as st

# An entry of a layer: its path, and "/" for a folder, "=PATH" for a hard link, or else the content of a file.
Lines = Sequence[tuple[str, str]]
# A visible entry: a file's content and all its names, or None for a folder.
Tree = dict[str, tuple[str, int] | None]


def tar_of(lines: Lines) -> IO[bytes]:
    """A layer's tar."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path, what in lines:
            member = tarfile.TarInfo(path)
            if what == "/":
                member.type = tarfile.DIRTYPE
            elif what.startswith("="):
                member.type, member.linkname = tarfile.LNKTYPE, what[1:]
            content = what.encode() if member.isreg() else b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return file


def unpacked(layers: Sequence[IO[bytes]]) -> Tree:
    """The files that layers show, found by unpacking each onto the previous ones."""
    tree: Tree = {}
    serial = itertools.count()
    for layer in layers:
        layer.seek(0)
        below = set(tree)
        fresh: set[str] = set()
        with tarfile.open(fileobj=layer, mode="r:") as tar:
            for member in tar:
                parent, _, name = member.name.rpartition("/")
                if name == ".wh..wh..opq":
                    _remove(tree, {path for path in below - fresh if _inside(path, parent)})
                elif name.startswith(".wh."):
                    gone = f"{parent}/{name[4:]}" if parent else name[4:]
                    _remove(tree, {path for path in below - fresh if path == gone or _inside(path, gone)})
                else:
                    _put(tree, tar, member, serial)
                    fresh.add(member.name)
    names: dict[tuple[str, int], int] = {}
    for what in tree.values():
        if what is not None:
            names[what] = names.get(what, 0) + 1
    return {path: what and (what[0], names[what]) for path, what in tree.items()}


def _put(tree: Tree, tar: tarfile.TarFile, member: tarfile.TarInfo, serial: itertools.count[int]) -> None:
    above = member.name
    while "/" in above:
        above = above.rpartition("/")[0]
        if tree.get(above) is not None:
            del tree[above]
        tree.setdefault(above, None)
    if member.isdir():
        if tree.get(member.name) is not None:
            del tree[member.name]
        tree[member.name] = None
        return
    _remove(tree, {path for path in tree if path == member.name or _inside(path, member.name)})
    if member.islnk():
        tree[member.name] = tree[member.linkname]
        return
    content = tar.extractfile(member)
    assert content is not None
    tree[member.name] = (content.read().decode(), next(serial))


def _inside(path: str, folder: str) -> bool:
    return path.startswith(f"{folder}/") if folder else True


def _remove(tree: Tree, paths: set[str]) -> None:
    for path in paths:
        tree.pop(path, None)


def merged(layers: Sequence[IO[bytes]], base: Sequence[IO[bytes]] = ()) -> IO[bytes]:
    """`layers` merged to one layer on top of `base`."""
    out = io.BytesIO()
    below = merge_layers([read_layer(layer) for layer in base])
    write_merged(out, [(read_layer(layer), layer) for layer in layers], below, Interrupt())
    return out


def names_in(layer: IO[bytes]) -> list[str]:
    """The names of a layer's entries, as they are in its tar."""
    layer.seek(0)
    with tarfile.open(fileobj=layer, mode="r:") as tar:
        return tar.getnames()


CASES: Mapping[str, tuple[Lines, Sequence[Lines]]] = {
    "the later file is visible": ([("f", "0")], [[("f", "1")], [("f", "2")]]),
    "deleted, and not in the base": ([], [[("d", "/"), ("d/f", "1")], [("d", "/"), ("d/.wh.f", "")]]),
    "deleted from the base": ([("d", "/"), ("d/f", "0")], [[("d", "/"), ("d/.wh.f", "")], [("g", "1")]]),
    "deleted and created again": ([("d", "/"), ("d/f", "0")], [[(".wh.d", "")], [("d", "/"), ("d/g", "1")]]),
    "deleted below an opaque folder": (
        [("d", "/"), ("d/f", "0"), ("d/g", "0")],
        [[("d", "/"), ("d/.wh.f", "")], [("d", "/"), ("d/.wh..wh..opq", ""), ("d/h", "1")]],
    ),
    "opaque below, filled above": (
        [("d", "/"), ("d/f", "0")],
        [[("d", "/"), ("d/.wh..wh..opq", ""), ("d/g", "1")], [("d", "/"), ("d/h", "2")]],
    ),
    "a folder, a file, a folder": (
        [("d", "/"), ("d/f", "0")],
        [[("d", "1")], [(".wh.d", "")], [("d", "/"), ("d/g", "2")]],
    ),
    "a file where the base has a folder": ([("d", "/"), ("d/f", "0")], [[("d", "1")], [("e", "1")]]),
    "a link whose first name was overwritten": (
        [],
        [[("a", "1"), ("b", "=a"), ("c", "=a")], [("a", "2")]],
    ),
    "a link whose first name was deleted": ([], [[("z", "1"), ("b", "=z"), ("c", "=z")], [(".wh.z", "")]]),
    "a link that comes before its first name": ([], [[("z/one", "1"), ("a", "=z/one")], [("y", "2")]]),
    "a link to a link": ([], [[("a", "1"), ("b", "=a"), ("c", "=b")], [(".wh.a", "")]]),
    "a whiteout and a folder of the same name in one layer": (
        [("d", "/"), ("d/f", "0")],
        [[(".wh.d", ""), ("d", "/"), ("d/g", "1")], [("e", "1")]],
    ),
    "twice in one layer": ([], [[("f", "1"), ("f", "2")], [("g", "1")]]),
}


@pytest.mark.parametrize("case", CASES)
def test_merged_layers_show_the_same_files(case: str) -> None:
    base, layers = CASES[case]
    bottom, tars = tar_of(base), [tar_of(lines) for lines in layers]
    assert unpacked([bottom, merged(tars, [bottom])]) == unpacked([bottom, *tars])


def test_a_whiteout_that_hides_nothing_is_omitted() -> None:
    """Without a lower folder, the engine's file system would show the marker as a file."""
    layers = [tar_of([("d", "/"), ("d/f", "1")]), tar_of([("d", "/"), ("d/.wh.f", ""), (".wh.x", "")])]
    assert names_in(merged(layers, [tar_of([("x", "0")])])) == ["d", ".wh.x"]
    assert names_in(merged(layers)) == ["d"]


def test_headers_are_kept_as_they_are() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("grün-\udcff")
        member.mode, member.uid, member.gid, member.mtime = 0o4711, 4_000_000_000, 7, 12
        member.pax_headers = {"mtime": "1700000000.123456789", "SCHILY.xattr.user.note": "v\0\udcff"}
        tar.addfile(member)
        tar.addfile(tarfile.TarInfo("other"))
    out = merged([file, tar_of([("other", "2")])])
    out.seek(0)
    with tarfile.open(fileobj=out, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        (kept,) = [entry for entry in tar if entry.name != "other"]
    assert (kept.name, kept.mode, kept.uid, kept.gid) == ("grün-\udcff", 0o4711, 4_000_000_000, 7)
    assert kept.pax_headers["mtime"] == "1700000000.123456789"
    assert kept.pax_headers["SCHILY.xattr.user.note"] == "v\0\udcff"


def test_a_link_that_becomes_the_file_gets_its_content_and_attributes() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("first/" + "x" * 150)
        member.size, member.mode, member.uid = 3, 0o4755, 1000
        member.pax_headers = {"SCHILY.xattr.user.note": "kept"}
        tar.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("second")
        link.type, link.linkname = tarfile.LNKTYPE, member.name
        tar.addfile(link)
    out = merged([file, tar_of([("first/.wh." + "x" * 150, "")])])
    out.seek(0)
    with tarfile.open(fileobj=out, mode="r:") as tar:
        (left,) = [entry for entry in tar if entry.isreg()]
        content = tar.extractfile(left)
        assert content is not None
        assert content.read() == b"abc"
    assert (left.name, left.mode, left.uid) == ("second", 0o4755, 1000)
    assert left.pax_headers["SCHILY.xattr.user.note"] == "kept"


_WORDS = ("a", "b", "c")
_PATHS = st.lists(st.sampled_from(_WORDS), min_size=1, max_size=3).map("/".join)


@st.composite
def _changes(draw: st.DrawFn, visible: Tree, number: int) -> list[tuple[str, str]]:
    """A layer that an engine can write on top of the tree `visible`, with parents first."""
    lines: list[tuple[str, str]] = []
    entries: dict[str, str] = {}
    for step in range(draw(st.integers(1, 6))):
        path, kind = draw(_PATHS), draw(st.sampled_from(("file", "file", "folder", "gone", "opaque", "link")))
        parents = ["/".join(path.split("/")[:depth]) for depth in range(1, path.count("/") + 1)]
        # A layer has one entry for each path, since an engine writes only the final state.
        if any(entries.get(parent, "/") != "/" or f"gone {parent}" in entries for parent in parents):
            continue
        if path in entries or f"gone {path}" in entries or any(known.startswith(f"{path}/") for known in entries):
            continue
        if any(visible.get(parent) is not None and parent not in entries for parent in parents):
            continue
        for parent in parents:
            if parent not in entries:
                lines.append((parent, "/"))
                entries[parent] = "/"
        prefix, _, name = path.rpartition("/")
        marker = (prefix + "/" if prefix else "") + ".wh." + name
        if kind == "gone":
            lines.append((marker, ""))
            entries[f"gone {path}"] = ""
        elif kind in ("folder", "opaque"):
            lines.append((path, "/"))
            entries[path] = "/"
            if kind == "opaque":
                lines.append((f"{path}/.wh..wh..opq", ""))
        else:
            targets = [known for known, what in entries.items() if what not in ("", "/")]
            what = f"={draw(st.sampled_from(targets))}" if kind == "link" and targets else f"{number}.{step}"
            lines.append((path, what))
            entries[path] = what
    return lines


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_layers_show_the_same_files_when_merged(data: st.DataObject) -> None:
    layers: list[IO[bytes]] = []
    for number in range(data.draw(st.integers(2, 6))):
        layers.append(tar_of(data.draw(_changes(unpacked(layers), number))))
    split = data.draw(st.integers(0, len(layers) - 1))
    base, upper = layers[:split], layers[split:]
    assert unpacked([*base, merged(upper, base)]) == unpacked(layers)


def test_a_corrupt_tar_is_refused() -> None:
    raw = tar_bytes([("a", "1"), ("b", "2" * 600)])
    for broken, message in (
        (b"no tar" * 200, "not a layer tar"),
        (raw[:700], "corrupt layer at byte"),
        (raw[:1024] + b"x" * 512 + raw[1536:], "corrupt layer at byte 1024"),
        (tar_bytes([("../out", "1")]), "outside the image root"),
    ):
        with pytest.raises(BrokenTarError, match=message):
            read_layer(io.BytesIO(broken))


def test_a_link_without_its_target_is_refused() -> None:
    with pytest.raises(BrokenTarError, match="points to 'nowhere'"):
        merged([tar_of([("a", "=nowhere")]), tar_of([("b", "1")])])


def tar_bytes(lines: Lines) -> bytes:
    """A layer's tar, as bytes."""
    file = tar_of(lines)
    file.seek(0)
    return file.read()
