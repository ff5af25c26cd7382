"""Programs of the host that are too old count as missing, with a reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gpudock_server.adapters.host import subprocesses
from gpudock_server.adapters.host.subprocesses import missing_programs, with_parent_death_signal
from gpudock_server.adapters.volumes import check_versions


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is first in PATH. After the test no program counts as unusable."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(subprocesses, "_UNUSABLE", {})
    return tmp_path


def _write_program(folder: Path, name: str, prints: str, *, to: str = "1") -> None:
    (folder / name).write_text(f"#!/bin/sh\necho '{prints}' >&{to}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("name", "prints", "expected"),
    [
        ("losetup", "losetup from util-linux 2.27.1", "losetup 2.27.1 is too old; 2.29 or later is required"),
        ("mkfs.btrfs", "mkfs.btrfs, part of btrfs-progs v4.3", "mkfs.btrfs 4.3 is too old; 4.4 or later is required"),
    ],
)
async def test_a_program_that_is_too_old_counts_as_missing(folder: Path, name: str, prints: str, expected: str) -> None:
    _write_program(folder, name, prints)
    assert missing_programs(name) == ""
    assert any(expected in text for text in await check_versions())
    assert expected in missing_programs(name)


async def test_versions_are_compared_as_numbers_and_may_be_printed_to_stderr(folder: Path) -> None:
    _write_program(folder, "losetup", "losetup from util-linux 2.100")
    _write_program(folder, "mkfs.ext4", "mke2fs 1.42.9 (28-Dec-2013)", to="2")
    await check_versions()
    assert missing_programs("losetup") == ""
    assert "mkfs.ext4 1.42.9 is too old" in missing_programs("losetup", "mkfs.ext4")


async def test_a_program_without_a_version_is_used(folder: Path) -> None:
    _write_program(folder, "losetup", "BusyBox")
    _write_program(folder, "setpriv", "BusyBox")
    await check_versions()
    assert missing_programs("losetup", "setpriv") == ""


async def test_a_setpriv_without_the_option_is_not_used(folder: Path) -> None:
    _write_program(folder, "setpriv", "setpriv from util-linux 2.32.1")
    assert with_parent_death_signal(["true"])[0] == "setpriv"
    await check_versions()
    assert with_parent_death_signal(["true"]) == ["true"]
