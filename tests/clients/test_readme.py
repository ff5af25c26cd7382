"""The calls of README.md, run as written. The rig has an image with the name that they use."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.calls import Caller
from tests.clients.command import DEADLINE, read_until
from tests.rig import GLIBC, Daemon, Rig
from tests.rig.patience import limit
from tests.rig.rig import REPOSITORY

_IMAGE = "pytorch/pytorch:latest"
# The program that the NVIDIA container toolkit injects on a real host.
_NVIDIA_SMI = b"""#!/bin/sh
echo "GPU 0: ${NVIDIA_VISIBLE_DEVICES%%,*}"
"""
_SECTION = (REPOSITORY / "README.md").read_text().partition("## The shortest call")[2].partition("\n## ")[0]
_BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", _SECTION, re.MULTILINE | re.DOTALL)


def block(language: str, word: str) -> str:
    """Return the block of the section in this language that contains this word."""
    [found] = [text for kind, text in _BLOCKS if kind == language and word in text]
    return str(found)


@pytest.fixture
def shell(rig: Rig, shared_daemon: Daemon, caller: Caller) -> Iterator[Shell]:  # noqa: ARG001 - deletes what is created
    """A shell that runs the README with the socket of the test daemon."""
    rig.images.derive(_IMAGE, GLIBC, files={"/usr/bin/nvidia-smi": _NVIDIA_SMI})
    yield Shell(shared_daemon)
    rig.engine.call("DELETE", f"/images/{_IMAGE}", query={"force": "1"})


class Shell:
    """A shell whose scripts use the socket of a daemon instead of the default one."""

    def __init__(self, daemon: Daemon) -> None:
        self._socket = str(daemon.socket)
        tools = str(Path(sys.executable).parent)
        self._environment = os.environ | {
            "GPUDOCK_ADDRESS": daemon.target,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "TERM": "dumb",
        }

    async def spawn(self, script: str, terminal: int | None = None) -> asyncio.subprocess.Process:
        """Start a script, at `terminal` if given."""
        streams = (
            (terminal,) * 3 if terminal is not None else (asyncio.subprocess.DEVNULL, *(asyncio.subprocess.PIPE,) * 2)
        )
        stdin, stdout, stderr = streams
        words = ("sh", "-ec", script.replace("/run/gpudock/gpudock.sock", self._socket))
        return await asyncio.create_subprocess_exec(
            *words, stdin=stdin, stdout=stdout, stderr=stderr, env=self._environment, cwd=REPOSITORY
        )

    async def run(self, script: str) -> str:
        """Run a script, which must succeed; return its output."""
        process = await self.spawn(script)
        out, err = await asyncio.wait_for(process.communicate(), limit(DEADLINE))
        assert process.returncode == 0, (script, out, err)
        return out.decode()


async def test_the_grpcurl_calls_work(shell: Shell, caller: Caller) -> None:
    listing, *calls = re.split(r"^(?=grpcurl)", block("sh", "grpcurl"), flags=re.MULTILINE)[1:]
    services = (await shell.run(listing)).split()
    assert {"gpudock.v1.ContainerService", "gpudock.v1.NodeService", "gpudock.v1.OperationService"} <= set(services)
    for script, gpus in zip(calls, (2, 4), strict=True):
        answers = json.loads("[" + re.sub(r"^}\n{", "},{", await shell.run(script), flags=re.MULTILINE) + "]")
        assert len(answers[-1]["result"]["status"]["gpu_uuids"]) == gpus
    assert (await caller.get("train")).status.ports[0].container_port == 8888


async def test_the_python_program_works(shell: Shell, caller: Caller) -> None:
    output = await shell.run(f"python - <<'EOF'\n{block('python', 'gpudock.connect')}EOF\n")
    assert output.startswith("GPU 0: GPU-")
    assert len((await caller.get("train")).status.gpu_uuids) == 4


async def test_the_shell_commands_work(shell: Shell, caller: Caller) -> None:
    create, enter, *rest = block("sh", "gpudock create").splitlines()
    await shell.run(create)
    await _at_a_terminal(shell, enter)
    for line in rest[:-1]:
        await shell.run(line)
    assert list((await caller.get("train")).status.gpu_uuids) == []
    assert len((await shell.run(rest[-1])).splitlines()) == 1 + 8


async def _at_a_terminal(shell: Shell, line: str) -> None:
    """Type into the shell that `line` starts, and exit it."""
    terminal, command_end = pty.openpty()
    process = await shell.spawn(line, command_end)
    try:
        os.write(terminal, b"nvidia-smi -L; exit\r")
        await read_until(terminal, b"GPU 0: GPU-")
        assert await asyncio.wait_for(process.wait(), limit(DEADLINE)) == 0
    finally:
        os.close(terminal)
        os.close(command_end)
