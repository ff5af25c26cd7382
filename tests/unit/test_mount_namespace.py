"""Work in the mount namespace of the engine, when the engine or the path does not respond."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path

import pytest
from gpudock_server.adapters.host_paths import HostPathBinder, MountNamespace
from gpudock_server.errors import EngineUnavailable, HostPathFailed


async def test_an_unavailable_engine_is_not_reported_as_a_wrong_path(tmp_path: Path) -> None:
    binder = HostPathBinder(tmp_path / "state", [str(tmp_path)], MountNamespace(str(tmp_path / "docker.sock")))
    with pytest.raises(EngineUnavailable):
        await binder.check([str(tmp_path)])


async def test_an_engine_on_another_host_mounts_no_host_paths(tmp_path: Path) -> None:
    binder = HostPathBinder(tmp_path / "state", [str(tmp_path)], None)
    with pytest.raises(HostPathFailed, match="another host"):
        await binder.check([str(tmp_path)])
    assert await binder.names() == frozenset()
    await binder.release("gpudock-none")


async def test_a_check_of_a_path_that_does_not_respond_times_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a path on a network filesystem without its server."""
    answer = threading.Event()
    binder = HostPathBinder(tmp_path / "state", [str(tmp_path)], MountNamespace(seconds=0.05))
    # As open(2) would block.
    monkeypatch.setattr(binder, "_check", lambda _: answer.wait())
    try:
        with pytest.raises(HostPathFailed, match="not finished after"):
            await binder.check([str(tmp_path)])
    finally:
        answer.set()


async def test_a_cancelled_caller_waits_for_the_running_work() -> None:
    started, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        may_end.wait()
        ended.set()

    running = asyncio.create_task(MountNamespace().run(work))
    await asyncio.to_thread(started.wait)
    running.cancel()
    await asyncio.sleep(0)
    may_end.set()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert running.cancelled()
    assert ended.is_set()
