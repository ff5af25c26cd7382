"""Programs that a tenant can make wait for ever are ended, and what they were started for fails."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import uuid
from asyncio.subprocess import Process
from pathlib import Path
from typing import Any

import pytest
from gpudock_server.adapters.host.stalls import StalledError, fail_if_stalled
from gpudock_server.adapters.volumes import MirrorVolumeCopier
from gpudock_server.adapters.volumes.private_mounts import FilesLocation
from gpudock_server.errors import VolumeFailed
from gpudock_server.model.volume import VolumeBackendKind, VolumeBacking

from tests.rig.patience import limit

pytestmark = pytest.mark.deep

MIB = 1 << 20


class Folders:
    """Stores that are folders of a test."""

    kind = VolumeBackendKind.LOOP

    def __init__(self, root: Path) -> None:
        self._root = root

    async def files_location(self, backing: VolumeBacking) -> FilesLocation:
        """Where its files are."""
        return FilesLocation(path=self._root / backing.name)

    def store(self, name: str) -> VolumeBacking:
        """A store of this name, which is empty."""
        (self._root / name).mkdir()
        return VolumeBacking(kind=self.kind, uid=str(uuid.uuid4()), name=name, size_bytes=0, engine_volume=name)


async def test_a_copy_whose_process_stands_still_is_ended_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = Folders(tmp_path)
    source, target = folders.store("source"), folders.store("target")
    (tmp_path / "source/a").write_bytes(os.urandom(MIB))
    start = asyncio.create_subprocess_exec
    children: list[Process] = []

    async def start_stopped(*args: Any, **kwargs: Any) -> Process:
        process = await start(*args, **kwargs)
        if any("trees.child" in str(argument) for argument in args):
            children.append(process)
            # The first one measures, the second one copies. It is stopped before it is given its job: any later, and
            # it could have copied everything by then.
            if len(children) > 1:
                process.send_signal(signal.SIGSTOP)
        return process

    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "create_subprocess_exec", start_stopped)
        async with asyncio.timeout(limit(60)):
            with pytest.raises(VolumeFailed, match="job 'mirror' made no progress for 2 s"):
                await MirrorVolumeCopier([folders], stall_seconds=2).copy(source, target, _nobody, final=True)
    assert [process.returncode for process in children] == [-signal.SIGKILL] * 2
    assert not (tmp_path / "target/a").exists()
    await MirrorVolumeCopier([folders]).copy(source, target, _nobody, final=True)
    assert (tmp_path / "target/a").read_bytes() == (tmp_path / "source/a").read_bytes()


async def test_files_that_become_fifos_while_they_are_copied_hold_nothing_up(tmp_path: Path) -> None:
    """What was a file when it was listed may be a FIFO when it is opened, whose writer never comes."""
    folders = Folders(tmp_path)
    source, target = folders.store("source"), folders.store("target")
    # So many that one of them is exchanged between a look at it and its opening.
    names = [tmp_path / f"source/{number}" for number in range(500)]
    ending = threading.Event()
    rounds = 0

    def exchange() -> None:
        nonlocal rounds
        made = tmp_path / "made"
        while not ending.is_set():
            for make in (Path.touch, os.mkfifo):
                for name in names:
                    make(made)
                    made.rename(name)
            rounds += 1

    thread = threading.Thread(target=exchange)
    thread.start()
    copier = MirrorVolumeCopier([folders], stall_seconds=10)
    try:
        for _ in range(6):
            await copier.copy(source, target, _nobody, final=False)
    finally:
        ending.set()
        thread.join()
    assert rounds > 0
    await copier.copy(source, target, _nobody, final=True)
    await copier.verify(source, target)


def _nobody(_current: int, _total: int) -> None:
    """Is told of progress."""


async def test_what_goes_on_is_not_stalled_however_long_it_takes() -> None:
    busy = "import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass"
    process = await asyncio.create_subprocess_exec("python3", "-c", busy, start_new_session=True)
    assert await fail_if_stalled(process.wait(), process.pid, "python3", 0.5) == 0


async def test_what_sleeps_is_stalled() -> None:
    process = await asyncio.create_subprocess_exec("sleep", "100", start_new_session=True)
    try:
        with pytest.raises(StalledError, match="sleep made no progress for 0 s"):
            await fail_if_stalled(process.wait(), process.pid, "sleep", 0.3)
    finally:
        process.kill()
        await process.wait()


async def test_a_child_of_what_waits_counts_too() -> None:
    """A program may leave all work to others and wait for them."""
    script = "i=0; while [ $i -lt 10 ]; do sleep 0.2; i=$((i+1)); done & wait"
    process = await asyncio.create_subprocess_exec("sh", "-c", script, start_new_session=True)
    assert await fail_if_stalled(process.wait(), process.pid, "sh", 1.0) == 0
