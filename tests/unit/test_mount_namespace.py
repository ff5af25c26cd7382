"""Work in the engine's mount namespace: what becomes of it when the engine or the path does not answer."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path

import pytest
from gpudock_server.adapters.host_paths import HostPathBinder, MountNamespace
from gpudock_server.errors import EngineUnavailable, HostPathFailed


async def test_an_engine_that_is_away_is_told_from_a_path_that_is_wrong(tmp_path: Path) -> None:
    binder = HostPathBinder(tmp_path / "state", [str(tmp_path)], MountNamespace(str(tmp_path / "docker.sock")))
    with pytest.raises(EngineUnavailable):
        await binder.check([str(tmp_path)])


async def test_an_engine_on_another_host_mounts_no_host_paths(tmp_path: Path) -> None:
    binder = HostPathBinder(tmp_path / "state", [str(tmp_path)], None)
    with pytest.raises(HostPathFailed, match="another host"):
        await binder.check([str(tmp_path)])
    assert await binder.names() == frozenset()
    await binder.release("gpudock-none")


async def test_a_path_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one on a network filesystem whose server is away."""
    answer = threading.Event()
    binder = HostPathBinder(tmp_path / "state", [str(tmp_path)], MountNamespace(seconds=0.05))
    # As open(2) does.
    monkeypatch.setattr(binder, "_check", lambda _: answer.wait())
    try:
        with pytest.raises(HostPathFailed, match="not finished after"):
            await binder.check([str(tmp_path)])
    finally:
        answer.set()


async def test_a_caller_that_is_cancelled_waits_for_what_is_under_way() -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        go_on.wait()
        ended.set()

    running = asyncio.create_task(MountNamespace().run(work))
    await asyncio.to_thread(begun.wait)
    running.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    assert running.cancelled()
    assert ended.is_set()
