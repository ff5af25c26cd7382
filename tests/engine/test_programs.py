"""Programs of the host end with their daemon, whenever that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.rig.patience import PATIENCE

_REPOSITORY = Path(__file__).parents[2]
# Runs a program and dies, by its own hand, as soon as that was started.
_PARENT = """
import asyncio, os, signal, sys
from gpudock_server.adapters.volumes.programs import run
start = asyncio.create_subprocess_exec
async def started(*words, **named):
    await start(*words, **named)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.create_subprocess_exec = started
asyncio.run(run("sleep", sys.argv[1]))
"""
_LOOK_SECONDS = 0.05


def _running(mark: str) -> list[int]:
    """The processes that have this word among their arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("slowly", [False, True], ids=["at once", "slowly"])
def test_a_program_whose_daemon_dies_as_it_is_started_does_not_run(tmp_path: Path, *, slowly: bool) -> None:
    """Also where the daemon is dead before the program could ask to be killed with it."""
    if slowly:
        late = tmp_path / "setpriv"
        late.write_text('#!/bin/sh\nsleep 0.5\nexec /usr/bin/setpriv "$@"\n')
        late.chmod(0o755)
    # A time to sleep that no other process has.
    mark = f"900.{uuid.uuid4().int}"
    path = f"{tmp_path}:{os.environ['PATH']}"
    words = [sys.executable, "-c", _PARENT, mark]
    died = subprocess.run(words, check=False, cwd=_REPOSITORY, env={**os.environ, "PATH": path}, timeout=60)
    assert died.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10 * PATIENCE
    while (left := _running(mark)) and time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "it runs on, and changes what the next daemon looks at"
