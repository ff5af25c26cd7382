"""Child processes without progress, such as tenants' files can cause, are killed, and their operation fails."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from asyncio.subprocess import Process
from pathlib import Path
from typing import Any

import pytest
from gpudock_server.adapters.host.stalls import StalledError, fail_if_stalled
from gpudock_server.adapters.volumes import MirrorVolumeCopier
from gpudock_server.errors import VolumeFailed

from tests.engine.folder_backend import FolderBackend
from tests.engine.snapshot_host import ignore_progress
from tests.rig.patience import limit

pytestmark = pytest.mark.deep

MIB = 1 << 20


async def test_a_copy_whose_child_process_stalls_is_killed_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = FolderBackend(tmp_path)
    source, target = backend.create("source"), backend.create("target")
    (tmp_path / "source/a").write_bytes(os.urandom(MIB))
    start = asyncio.create_subprocess_exec
    children: list[Process] = []

    async def start_stopped(*args: Any, **kwargs: Any) -> Process:
        process = await start(*args, **kwargs)
        if any("trees.child" in str(argument) for argument in args):
            children.append(process)
            # The first child measures, the second copies. It is stopped before it gets its job: later it might have
            # copied everything already.
            if len(children) > 1:
                process.send_signal(signal.SIGSTOP)
        return process

    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "create_subprocess_exec", start_stopped)
        async with asyncio.timeout(limit(60)):
            with pytest.raises(VolumeFailed, match="job 'mirror' made no progress for 2 s"):
                await MirrorVolumeCopier([backend], stall_seconds=2).copy(source, target, ignore_progress, final=True)
    assert [process.returncode for process in children] == [-signal.SIGKILL] * 2
    assert not (tmp_path / "target/a").exists()
    await MirrorVolumeCopier([backend]).copy(source, target, ignore_progress, final=True)
    assert (tmp_path / "target/a").read_bytes() == (tmp_path / "source/a").read_bytes()


async def test_files_that_become_fifos_during_a_copy_do_not_block_it(tmp_path: Path) -> None:
    """A file that was listed may be a FIFO without a writer when it is opened."""
    backend = FolderBackend(tmp_path)
    source, target = backend.create("source"), backend.create("target")
    # With so many files, some are replaced between the check of the type and the opening.
    names = [tmp_path / f"source/{number}" for number in range(500)]
    stopping = threading.Event()
    rounds = 0

    def exchange() -> None:
        nonlocal rounds
        new_entry = tmp_path / "new_entry"
        while not stopping.is_set():
            for make in (Path.touch, os.mkfifo):
                for name in names:
                    make(new_entry)
                    new_entry.rename(name)
            rounds += 1

    thread = threading.Thread(target=exchange)
    thread.start()
    copier = MirrorVolumeCopier([backend], stall_seconds=10)
    try:
        for _ in range(6):
            await copier.copy(source, target, ignore_progress, final=False)
    finally:
        stopping.set()
        thread.join()
    assert rounds > 0
    await copier.copy(source, target, ignore_progress, final=True)
    await copier.verify(source, target)


async def test_a_busy_program_is_not_stalled_however_long_it_takes() -> None:
    busy = "import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass"
    process = await asyncio.create_subprocess_exec("python3", "-c", busy, start_new_session=True)
    assert await fail_if_stalled(process.wait(), process.pid, "python3", 0.5) == 0


async def test_a_sleeping_program_is_stalled() -> None:
    process = await asyncio.create_subprocess_exec("sleep", "100", start_new_session=True)
    try:
        with pytest.raises(StalledError, match="sleep made no progress for 0 s"):
            await fail_if_stalled(process.wait(), process.pid, "sleep", 0.3)
    finally:
        process.kill()
        await process.wait()


async def test_a_program_that_waits_for_a_busy_child_is_not_stalled() -> None:
    """The progress of child processes counts as progress of the program."""
    script = "i=0; while [ $i -lt 10 ]; do sleep 0.2; i=$((i+1)); done & wait"
    process = await asyncio.create_subprocess_exec("sh", "-c", script, start_new_session=True)
    assert await fail_if_stalled(process.wait(), process.pid, "sh", 1.0) == 0
