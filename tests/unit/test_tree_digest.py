"""The digest of a tree depends on the content of its files and not on how a filesystem stores them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gpudock_server.adapters.host.trees.digest import digest_tree
from gpudock_server.adapters.host.trees.interrupt import Interrupt

MIB = 1 << 20
# Two pieces of data, the second across the border of two blocks, and zeros at the end.
SIZE = 5 * MIB + 7
PIECES = {3 * 4096: b"first", 3 * MIB - 2: b"second"}


def _digest(folder: Path) -> str:
    for each in (*folder.iterdir(), folder):
        os.utime(each, ns=(0, 0))
    return digest_tree(str(folder), Interrupt()).sha256


def _sparse(file: Path, pieces: dict[int, bytes], size: int = SIZE) -> None:
    with file.open("wb") as opened:
        for at, data in pieces.items():
            opened.seek(at)
            opened.write(data)
        opened.truncate(size)


def test_holes_and_written_zeros_have_the_same_digest(tmp_path: Path) -> None:
    file = tmp_path / "file"
    _sparse(file, PIECES)
    assert file.stat().st_blocks * 512 < SIZE
    digest = _digest(tmp_path)
    content = file.read_bytes()
    file.write_bytes(content)
    assert file.stat().st_blocks * 512 >= SIZE
    assert _digest(tmp_path) == digest
    half = content[: 2 * MIB]
    file.write_bytes(half)
    os.truncate(file, 3 * MIB - 2)
    with file.open("ab") as opened:
        opened.write(content[3 * MIB - 2 :])
    assert _digest(tmp_path) == digest


@pytest.mark.parametrize(
    ("pieces", "size"),
    [
        ({3 * 4096: b"firsT", 3 * MIB - 2: b"second"}, SIZE),
        ({3 * 4096 + 1: b"first", 3 * MIB - 2: b"second"}, SIZE),
        ({4 * 4096: b"first", 3 * MIB - 2: b"second"}, SIZE),
        ({3 * 4096: b"first", 3 * MIB - 3: b"second"}, SIZE),
        ({3 * 4096: b"first", 4 * MIB - 2: b"second"}, SIZE),
        ({MIB + 3 * 4096: b"first", 3 * MIB - 2: b"second"}, SIZE),
        ({3 * 4096: b"first"}, SIZE),
        ({**PIECES, SIZE - 1: b"x"}, SIZE),
        (PIECES, SIZE - 1),
        (PIECES, SIZE + MIB),
    ],
)
def test_different_content_has_a_different_digest(tmp_path: Path, pieces: dict[int, bytes], size: int) -> None:
    file = tmp_path / "file"
    _sparse(file, PIECES)
    digest = _digest(tmp_path)
    assert _digest(tmp_path) == digest
    _sparse(file, pieces, size)
    assert _digest(tmp_path) != digest


def test_a_hole_of_terabytes_is_not_read(tmp_path: Path) -> None:
    """Reading these 8 TiB as zeros would exceed the time limit of a test."""
    _sparse(tmp_path / "file", {1 << 42: b"data"}, 1 << 43)
    found = digest_tree(str(tmp_path), Interrupt())
    assert found.content_bytes == 1 << 43
