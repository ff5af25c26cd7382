"""Programs of the host, and the child process that works on trees, end with their daemon, whenever that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from tests.rig.patience import limit

_REPOSITORY = Path(__file__).parents[2]
# Runs a program and dies, by its own hand, as soon as that was started.
_PARENT = """
import asyncio, os, signal, sys
from gpudock_server.adapters.host.subprocesses import run
start = asyncio.create_subprocess_exec
async def started(*words, **named):
    await start(*words, **named)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.create_subprocess_exec = started
asyncio.run(run("sleep", sys.argv[1]))
"""
# Has a child process read a large file, and dies in the midst of that; the child is stopped, lest it end by itself.
_PARENT_OF_JOB = """
import asyncio, os, signal, sys
from pathlib import Path
from gpudock_server.adapters.host.trees.worker import run_job
start = asyncio.create_subprocess_exec
def reads(pid):
    counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(counts["rchar"]) > 1 << 25
async def dies(pid):
    while not reads(pid):
        await asyncio.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGKILL)
async def started(*words, **named):
    process = await start(*words, **named)
    print(process.pid, flush=True)
    asyncio.ensure_future(dies(process.pid))
    return process
asyncio.create_subprocess_exec = started
asyncio.run(run_job("digest", memory_bytes=1 << 30, root=sys.argv[1]))
"""
# Not sparse, since holes are not read; read for a good part of a second, and looked at every hundredth.
_LARGE_MIB = 768
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
    deadline = time.monotonic() + limit(10)
    while (left := _running(mark)) and time.monotonic() < deadline:
        # The kernel tells nobody but its parent of the end of a process, and the parent is dead.
        time.sleep(_LOOK_SECONDS)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, "it runs on, and changes what the next daemon looks at"


@pytest.mark.deep
def test_a_job_on_a_tree_ends_with_its_daemon(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        for _ in range(_LARGE_MIB):
            file.write(bytes(1 << 20))
    words = [sys.executable, "-c", _PARENT_OF_JOB, str(tmp_path)]
    died = subprocess.run(words, check=False, cwd=_REPOSITORY, capture_output=True, text=True, timeout=limit(60))
    large.unlink()
    assert died.returncode == -signal.SIGKILL, died.stderr
    child = int(died.stdout)
    deadline = time.monotonic() + limit(10)
    while (left := _lives(child)) and time.monotonic() < deadline:
        # The kernel tells nobody but its parent of the end of a process, and the parent is dead.
        time.sleep(_LOOK_SECONDS)
    if left:
        os.kill(child, signal.SIGKILL)
    assert not left, "it works on, and changes what the next daemon looks at"


def _lives(pid: int) -> bool:
    """Whether a process has not ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False
