"""In the VM: limits on folders and on containers' layers are real ones, and what gpudock builds on them holds."""

from __future__ import annotations

import re

import pytest

from tests.rig import HttpStatusError, Rig

from .conftest import Folder, Place, Shell, run_container
from .machine import XFS
from .quotas import MIB


def _bound(rig: Rig, folder: Folder) -> Shell:
    """A container with a volume on the folder, made as gpudock makes one."""
    options = {"type": "none", "o": "bind", "device": str(folder.path)}
    rig.engine.call("POST", "/volumes/create", send={"Name": "limited", "Driver": "local", "DriverOpts": options})
    return run_container(rig, Binds=["limited:/data"])


def _shown_size(shell: Shell, path: str) -> int:
    """What `df` calls the size of the filesystem there, in bytes."""
    printed = shell(f"df -P -k {path} | tail -n 1")
    return int(printed.split()[1]) << 10


def _fill(shell: Shell, path: str, mib: int) -> str:
    return shell(f"dd if=/dev/zero of={path} bs=64k count={mib * 16} conv=fsync 2>&1")


def test_a_limit_is_met_inside_and_lifted_in_place(clean_engine: Rig, folder: Folder) -> None:
    shell = _bound(clean_engine, folder)
    before = clean_engine.engine.call("GET", f"/containers/{shell.container}/json")["State"]
    assert _shown_size(shell, "/data") == 16 * MIB
    assert _fill(shell, "/data/kept", 8).endswith("\n0\n")

    printed = _fill(shell, "/data/more", 12)
    assert folder.place.full in printed
    assert printed.endswith("\n1\n")
    assert (folder.path / "kept").stat().st_size == 8 * MIB
    assert 7 * MIB <= (folder.path / "more").stat().st_size <= 8 * MIB

    folder.resize(48 * MIB)
    assert _shown_size(shell, "/data") == 48 * MIB
    assert _fill(shell, "/data/more", 12).endswith("\n0\n")
    assert clean_engine.engine.call("GET", f"/containers/{shell.container}/json")["State"] == before


def test_a_limit_below_what_is_used_takes_nothing_away(clean_engine: Rig, folder: Folder) -> None:
    shell = _bound(clean_engine, folder)
    assert _fill(shell, "/data/kept", 8).endswith("\n0\n")
    folder.resize(4 * MIB)
    assert folder.place.full in _fill(shell, "/data/more", 1)
    assert shell("wc -c < /data/kept") == f"{8 * MIB}\n0\n"
    assert shell("rm /data/kept && dd if=/dev/zero of=/data/more bs=1M count=3 2>/dev/null") == "0\n"


def test_a_limit_outlasts_the_container_and_the_engine(clean_engine: Rig, folder: Folder) -> None:
    shell = _bound(clean_engine, folder)
    clean_engine.engine.kill9()
    clean_engine.engine.start()
    clean_engine.engine.call("POST", f"/containers/{shell.container}/restart", query={"t": "0"})
    assert _shown_size(shell, "/data") == 16 * MIB
    assert folder.place.full in _fill(shell, "/data/file", 20)


def test_the_engine_limits_layers_on_xfs_and_says_that_it_cannot_elsewhere(clean_engine: Rig, place: Place) -> None:
    options = {"size": "32M"}
    if place.filesystem != XFS:
        with pytest.raises(HttpStatusError, match=re.escape("--storage-opt is supported only for overlay over xfs")):
            run_container(clean_engine, StorageOpt=options)
        return
    shell = run_container(clean_engine, StorageOpt=options)
    assert _shown_size(shell, "/") == 32 * MIB
    assert place.full in _fill(shell, "/file", 40)
    assert shell("stat -c %s /file | grep -c '^3[0-9]\\{7\\}$'") == "1\n0\n"
