"""What is left on the disk of containers and operations that are no more is removed; what may still be needed stays."""

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

_QUICK = ("--reconcile-interval", "0.3")


def _folder(daemons: IsolatedDaemons) -> Path:
    """Where the node's daemon keeps files of containers."""
    return daemons.rig.engine.data_root / "gpudock/snapshots" / daemons.node


def _put_dead_partial(container: Path) -> Path:
    """A snapshot that an operation which nobody knows has begun."""
    partial = container / f"1.partial-{new_operation_id()}"
    (partial / "tree").mkdir(parents=True)
    (partial / "tree/file").write_text("half")
    return partial


async def _until_gone(path: Path) -> None:
    async def gone() -> bool:
        return not await asyncio.to_thread(path.exists)

    await until(gone)


async def test_snapshots_of_a_deleted_container_that_came_back_are_removed(
    daemons: IsolatedDaemons, tmp_path: Path
) -> None:
    """As after a backup of the disk alone was put back; those of a container that nobody knows of stay."""
    daemon = await daemons.start(*_QUICK)
    async with Caller(daemon.target) as caller:
        uid = (await caller.create("vanishes", 1)).uid
        await caller.scale("vanishes", 2)
        folder = _folder(daemons) / uid
        assert (folder / "1/meta.json").is_file()
        await asyncio.to_thread(shutil.copytree, folder, tmp_path / "saved", symlinks=True)
        await caller.delete("vanishes")
        assert not folder.exists()
        unknown = _folder(daemons) / str(uuid.uuid4())
        await asyncio.to_thread(shutil.copytree, tmp_path / "saved", unknown, symlinks=True)
        await asyncio.to_thread(shutil.copytree, tmp_path / "saved", folder, symlinks=True)
        await _until_gone(folder)
        # Another look, which would have removed that one as well.
        partial = _put_dead_partial(_folder(daemons) / (await caller.create("lives")).uid)
        await _until_gone(partial)
        assert (unknown / "1/meta.json").is_file()


async def test_a_snapshot_that_nobody_finishes_is_removed(daemons: IsolatedDaemons, engine_proxy: EngineProxy) -> None:
    """And one that an operation is at work on is not."""
    daemon = await daemons.start(*_QUICK, docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        uid = (await caller.create("half", 1)).uid
        stop = engine_proxy.faults.hang("POST", "/containers/[^/]+/stop")
        scale = asyncio.create_task(caller.scale("half", 2))
        async with in_time("the scale did not come to its stop"):
            await stop.hit.wait()
        (living,) = (_folder(daemons) / uid).glob("1.partial-*")
        dead = _put_dead_partial(_folder(daemons) / uid)
        await _until_gone(dead)
        assert (living / "tree").is_dir()
        engine_proxy.faults.clear()
        async with in_time("the scale went on and did not end"):
            await scale
        first, _ = await caller.revisions("half")
        assert first.HasField("snapshot")
        assert not living.exists()
