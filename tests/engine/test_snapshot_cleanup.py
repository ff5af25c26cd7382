"""Snapshots of deleted containers and of ended operations are removed from the disk; all others stay."""

from __future__ import annotations

import asyncio
import shutil
import uuid
from pathlib import Path

from gpudock_server.model.operation import new_operation_id

from tests.calls import Caller
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until
from tests.rig import EngineProxy
from tests.rig.patience import in_time

__all__ = ["daemons"]

_FREQUENT_PASSES = ("--reconcile-interval", "0.3")


def _snapshot_folder(daemons: IsolatedDaemons) -> Path:
    """The folder with the snapshots of the node."""
    return daemons.rig.engine.data_root / "gpudock/snapshots" / daemons.node


def _create_partial_snapshot(container: Path) -> Path:
    """Create a partial snapshot of an operation that does not exist."""
    partial = container / f"1.partial-{new_operation_id()}"
    (partial / "tree").mkdir(parents=True)
    (partial / "tree/file").write_text("half")
    return partial


async def _wait_until_removed(path: Path) -> None:
    async def is_removed() -> bool:
        return not await asyncio.to_thread(path.exists)

    await until(is_removed)


async def test_restored_snapshots_of_a_deleted_container_are_removed(daemons: IsolatedDaemons, tmp_path: Path) -> None:
    """As after a restore of the disk without etcd; snapshots of a container that was never known stay."""
    daemon = await daemons.start(*_FREQUENT_PASSES)
    async with Caller(daemon.target) as caller:
        uid = (await caller.create("vanishes", 1)).uid
        await caller.scale("vanishes", 2)
        folder = _snapshot_folder(daemons) / uid
        assert (folder / "1/meta.json").is_file()
        await asyncio.to_thread(shutil.copytree, folder, tmp_path / "saved", symlinks=True)
        # A folder appears complete: the daemon could remove it while it is being copied.
        restored = _snapshot_folder(daemons).parent.with_name(f"restored-{uid}")
        await asyncio.to_thread(shutil.copytree, folder, restored, symlinks=True)
        await caller.delete("vanishes")
        assert not folder.exists()
        unknown = _snapshot_folder(daemons) / str(uuid.uuid4())
        await asyncio.to_thread(shutil.copytree, tmp_path / "saved", unknown, symlinks=True)
        await asyncio.to_thread(restored.rename, folder)
        await _wait_until_removed(folder)
        # The pass that removes this partial snapshot would remove the unknown container's snapshots as well.
        partial = _create_partial_snapshot(_snapshot_folder(daemons) / (await caller.create("lives")).uid)
        await _wait_until_removed(partial)
        assert (unknown / "1/meta.json").is_file()


async def test_a_partial_snapshot_without_an_operation_is_removed(
    daemons: IsolatedDaemons, engine_proxy: EngineProxy
) -> None:
    """The partial snapshot of a running operation is kept."""
    daemon = await daemons.start(*_FREQUENT_PASSES, docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        uid = (await caller.create("half", 1)).uid
        stop = engine_proxy.faults.hang("POST", "/containers/[^/]+/stop")
        scale = asyncio.create_task(caller.scale("half", 2))
        async with in_time("the scale did not reach its stop"):
            await stop.hit.wait()
        (active,) = (_snapshot_folder(daemons) / uid).glob("1.partial-*")
        abandoned = _create_partial_snapshot(_snapshot_folder(daemons) / uid)
        await _wait_until_removed(abandoned)
        assert (active / "tree").is_dir()
        engine_proxy.faults.clear()
        async with in_time("the resumed scale did not end"):
            await scale
        first, _ = await caller.revisions("half")
        assert first.HasField("snapshot")
        assert not active.exists()
