"""Programs of the host, and child processes that work on trees, end with their daemon, whenever it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rig.patience import limit

_REPOSITORY = Path(__file__).parents[2]
# Starts a program, and kills itself as soon as the program has been started.
_DIES_AT_START = """
import asyncio, os, signal, sys
from gpudock_server.adapters.host.subprocesses import run
start = asyncio.create_subprocess_exec
async def started(*words, **named):
    await start(*words, **named)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.create_subprocess_exec = started
asyncio.run(run("sleep", sys.argv[1]))
"""
# Has a child process read a large file, stops the child, so that it cannot end, and kills itself.
_DIES_DURING_JOB = """
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
# The file has no holes, since these are not read. Reading it takes several tenths of a second.
_LARGE_MIB = 768
_POLL_SECONDS = 0.05


def _processes_with(mark: str) -> list[int]:
    """The ids of the processes that have `mark` among their arguments."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "cmdline").read_bytes():
                pids.append(int(process.name))
        except OSError:
            continue
    return pids


@pytest.mark.parametrize("delayed", [False, True], ids=["immediately", "delayed"])
def test_a_program_whose_daemon_dies_as_it_is_started_does_not_run(tmp_path: Path, *, delayed: bool) -> None:
    """Also if the daemon dies before the program has requested to be killed with it."""
    if delayed:
        slow_setpriv = tmp_path / "setpriv"
        slow_setpriv.write_text('#!/bin/sh\nsleep 0.5\nexec /usr/bin/setpriv "$@"\n')
        slow_setpriv.chmod(0o755)
    # A number of seconds that no other process has among its arguments.
    mark = f"900.{uuid.uuid4().int}"
    path = f"{tmp_path}:{os.environ['PATH']}"
    command = [sys.executable, "-c", _DIES_AT_START, mark]
    environment = {**os.environ, "PATH": path}
    parent = subprocess.run(command, check=False, cwd=_REPOSITORY, env=environment, timeout=limit(60))
    assert parent.returncode == -signal.SIGKILL
    _require_end_of(lambda: _processes_with(mark))


@pytest.mark.deep
def test_a_job_on_a_tree_ends_with_its_daemon(tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        for _ in range(_LARGE_MIB):
            file.write(bytes(1 << 20))
    command = [sys.executable, "-c", _DIES_DURING_JOB, str(tmp_path)]
    parent = subprocess.run(command, check=False, cwd=_REPOSITORY, capture_output=True, text=True, timeout=limit(60))
    large.unlink()
    assert parent.returncode == -signal.SIGKILL, parent.stderr
    child = int(parent.stdout)
    _require_end_of(lambda: [child] if _is_running(child) else [])


def _require_end_of(find: Callable[[], list[int]]) -> None:
    """Wait until `find` returns no process; kill those that still run after a time limit, and fail."""
    deadline = time.monotonic() + limit(10)
    while (pids := find()) and time.monotonic() < deadline:
        # The kernel reports the end of a process only to its parent, which is dead.
        time.sleep(_POLL_SECONDS)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert not pids, "a process outlives its daemon, and changes what the next daemon works on"


def _is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False
