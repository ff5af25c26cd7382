"""Fixtures of the tests in the VM, where the engine's data are on a filesystem with project quotas."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest

from tests.rig import BUSYBOX, Rig

from .machine import FILESYSTEM_VARIABLE, XFS


@dataclass(frozen=True)
class QuotaFilesystem:
    """The filesystem under test."""

    name: str

    @property
    def full_message(self) -> str:
        """The error message of a write past the limit of a project."""
        return "No space left on device" if self.name == XFS else "Disk quota exceeded"


class Shell:
    """Runs commands in a container of the rig's engine."""

    def __init__(self, rig: Rig, container: str) -> None:
        self._rig = rig
        self.container = container

    def __call__(self, script: str) -> str:
        """Run a script; returns its output, and the exit code as the last line."""
        words = ["sh", "-c", f"{script}\necho $?"]
        send = {"Cmd": words, "AttachStdout": True, "AttachStderr": True, "Tty": True}
        made = self._rig.engine.call("POST", f"/containers/{self.container}/exec", send=send)["Id"]
        printed = self._rig.engine.call("POST", f"/exec/{made}/start", send={"Tty": True})
        return str(printed.decode()).replace("\r\n", "\n")


@pytest.fixture(scope="package")
def quota_filesystem() -> QuotaFilesystem:
    """The filesystem under test; skips the test outside of the VM."""
    filesystem = os.environ.get(FILESYSTEM_VARIABLE)
    if filesystem is None:
        pytest.skip("needs project quotas: `make test-vm` runs it in a VM that has them")
    return QuotaFilesystem(filesystem)


def run_container(rig: Rig, **host_config: object) -> Shell:
    """Start an idle container. The fixture `clean_engine` removes it."""
    send = {"Image": BUSYBOX, "Cmd": ["sleep", "infinity"], "StopSignal": "SIGKILL", "HostConfig": host_config}
    container = rig.engine.call("POST", "/containers/create", send=send)["Id"]
    rig.engine.call("POST", f"/containers/{container}/start")
    return Shell(rig, container)
