"""What the tests in the VM stand on: a rig whose engine has its data on a filesystem with project quotas."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.rig import BUSYBOX, Rig

from . import quotas
from .machine import FILESYSTEM_VARIABLE, XFS, mount_point

_PROJECTS = itertools.count(5_000_000)


@dataclass(frozen=True)
class Place:
    """The filesystem under test."""

    filesystem: str

    @property
    def mount_point(self) -> Path:
        """Where it is."""
        return mount_point(self.filesystem)

    @property
    def full(self) -> str:
        """What a program is told that writes past its project's limit."""
        return "No space left on device" if self.filesystem == XFS else "Disk quota exceeded"


@dataclass(frozen=True)
class Folder:
    """A folder that may hold only so much."""

    path: Path
    project: int
    place: Place

    def resize(self, size: int) -> None:
        """Let it hold this many bytes."""
        quotas.limit(self.place.mount_point, self.project, size)


class Shell:
    """Runs commands in a container of the rig's engine."""

    def __init__(self, rig: Rig, container: str) -> None:
        self._rig = rig
        self.container = container

    def __call__(self, script: str) -> str:
        """What it prints, and the exit code in a line of its own."""
        words = ["sh", "-c", f"{script}\necho $?"]
        send = {"Cmd": words, "AttachStdout": True, "AttachStderr": True, "Tty": True}
        made = self._rig.engine.call("POST", f"/containers/{self.container}/exec", send=send)["Id"]
        printed = self._rig.engine.call("POST", f"/exec/{made}/start", send={"Tty": True})
        return str(printed.decode()).replace("\r\n", "\n")


@pytest.fixture(scope="package")
def place() -> Place:
    """The filesystem under test; skips where there is none."""
    filesystem = os.environ.get(FILESYSTEM_VARIABLE)
    if filesystem is None:
        pytest.skip("needs project quotas: `make test-vm` runs it in a VM that has them")
    return Place(filesystem)


@pytest.fixture(scope="package")
def rig(place: Place) -> Iterator[Rig]:
    """A rig that has a quota on every container's layer, where the engine can do that."""
    options = ["--storage-opt", "overlay2.size=512M"] if place.filesystem == XFS else []
    with Rig(images=[BUSYBOX], engine_options=options) as started:
        yield started


@pytest.fixture
def folder(place: Place) -> Iterator[Folder]:
    """An empty folder that may hold 16 MiB."""
    made = Folder(place.mount_point / "limited", next(_PROJECTS), place)
    made.path.mkdir()
    quotas.give_project(made.path, made.project)
    made.resize(16 * quotas.MIB)
    yield made
    shutil.rmtree(made.path)


def run_container(rig: Rig, **host_config: object) -> Shell:
    """Start an idle container; the engine removes it with the rest of the test's."""
    send = {"Image": BUSYBOX, "Cmd": ["sleep", "infinity"], "StopSignal": "SIGKILL", "HostConfig": host_config}
    container = rig.engine.call("POST", "/containers/create", send=send)["Id"]
    rig.engine.call("POST", f"/containers/{container}/start")
    return Shell(rig, container)
