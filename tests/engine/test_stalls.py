"""Programs that a tenant can make wait for ever are ended, and what they were started for fails."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import uuid
from pathlib import Path

import pytest
from gpudock_server.adapters.trees.stalls import StalledError, unless_stalled
from gpudock_server.adapters.volumes import RsyncCopier
from gpudock_server.adapters.volumes.view import Reach
from gpudock_server.errors import VolumeFailed
from gpudock_server.model.volume import VolumeBackendKind, VolumeBacking

MIB = 1 << 20


class Folders:
    """Stores that are folders of a test."""

    kind = VolumeBackendKind.LOOP

    def __init__(self, root: Path) -> None:
        self._root = root

    async def reach(self, backing: VolumeBacking) -> Reach:
        """Where its files are."""
        return Reach(path=self._root / backing.name)

    def store(self, name: str) -> VolumeBacking:
        """A store of this name, which is empty."""
        (self._root / name).mkdir()
        return VolumeBacking(kind=self.kind, uid=str(uuid.uuid4()), name=name, size_bytes=0, engine_volume=name)


def _sessions(target: Path) -> set[int]:
    """The process groups of rsync that write to a folder."""
    found = subprocess.run(["pgrep", "--full", f"^rsync .*{target}/$"], capture_output=True, text=True, check=False)
    return {os.getpgid(int(pid)) for pid in found.stdout.split()}


async def test_an_rsync_that_opens_a_fifo_is_ended_and_the_copy_fails(tmp_path: Path) -> None:
    """The file was a file when rsync listed it; opening what it is by now waits for a writer that never comes."""
    folders = Folders(tmp_path)
    source, target = folders.store("source"), folders.store("target")
    (tmp_path / "source/a").write_bytes(os.urandom(MIB) * 256)
    (tmp_path / "source/z").write_bytes(b"z" * 10)
    copying = asyncio.create_task(
        RsyncCopier([folders], stall_seconds=2).copy(source, target, lambda _current, _total: None)
    )
    async with asyncio.timeout(60):
        # While the first file is sent, the list is made and the second file is not opened yet.
        while not list((tmp_path / "target").glob(".a.*")):
            assert not copying.done()
            await asyncio.sleep(0.001)
        (session,) = _sessions(tmp_path / "target")
        os.killpg(session, signal.SIGSTOP)
        assert not (tmp_path / "target/z").exists()
        (tmp_path / "source/z").unlink()
        os.mkfifo(tmp_path / "source/z")
        os.killpg(session, signal.SIGCONT)
        with pytest.raises(VolumeFailed, match="rsync made no progress for 2 s"):
            await copying
    assert _sessions(tmp_path / "target") == set()


async def test_what_goes_on_is_not_stalled_however_long_it_takes() -> None:
    busy = "import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass"
    process = await asyncio.create_subprocess_exec("python3", "-c", busy, start_new_session=True)
    assert await unless_stalled(process.wait(), process.pid, "python3", 0.5) == 0


async def test_what_sleeps_is_stalled() -> None:
    process = await asyncio.create_subprocess_exec("sleep", "100", start_new_session=True)
    try:
        with pytest.raises(StalledError, match="sleep made no progress for 0 s"):
            await unless_stalled(process.wait(), process.pid, "sleep", 0.3)
    finally:
        process.kill()
        await process.wait()


async def test_a_child_of_what_waits_counts_too() -> None:
    """Like rsync, whose first process waits for two others."""
    script = "i=0; while [ $i -lt 10 ]; do sleep 0.2; i=$((i+1)); done & wait"
    process = await asyncio.create_subprocess_exec("sh", "-c", script, start_new_session=True)
    assert await unless_stalled(process.wait(), process.pid, "sh", 1.0) == 0
