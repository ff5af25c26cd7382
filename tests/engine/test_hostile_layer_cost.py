"""The memory and the delay of other callers that a change of a container with a hostile layer costs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from gpudock.v1 import container_pb2, container_service_pb2

from tests.calls import Caller
from tests.engine.drift import docker_inspect
from tests.engine.hostile_trees import make_nested_folders
from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.engine.process_memory import memory, reset_peak
from tests.rig import CUDA_LIKE
from tests.rig.patience import limit

__all__ = ["daemons"]

pytestmark = pytest.mark.deep

MIB = 1 << 20
# A daemon that kept the paths of all folders grew by 4 GiB at its peak, and other callers waited for 5.4 s.
_MAX_GROWTH = 150 * MIB
_MAX_SECONDS = 2.0


def _make_nested(root: int) -> None:
    """The paths of these folders have 600 MB."""
    make_nested_folders(root, 2200, "d" * 250)


def _long_paths(root: int) -> None:
    """Each path has the maximum length for the engine, and more than a thousand parts."""
    make_nested_folders(root, 1200, "dd")
    folder = os.dup(root)
    for _ in range(1200):
        subfolder = os.open("dd", os.O_RDONLY | os.O_DIRECTORY, dir_fd=folder)
        os.close(folder)
        folder = subfolder
    for number in range(10_000):
        os.close(os.open(f"{number}", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)


async def _keep_and_restore_snapshot(caller: Caller) -> None:
    """Make a change that keeps a snapshot, and one that restores it."""
    await caller.scale("hostile", 2)
    assert (await caller.revisions("hostile"))[0].snapshot_warning == ""
    await caller.rollback("hostile", 1)


async def _update_to_another_image(caller: Caller) -> None:
    """The files are transferred by a commit, whose layers the daemon merges."""
    changed: dict[str, Any] = {"image": CUDA_LIKE, "files": container_service_pb2.FILES_POLICY_CARRY_COMMIT}
    await caller.update("hostile", **changed)


@dataclass
class _Cost:
    """The growth of the daemon in bytes, and the slowest response to another caller in seconds."""

    growth: int = 0
    slowest: float = 0.0
    answers: int = 0


@asynccontextmanager
async def _measure_cost(caller: Caller, pid: int) -> AsyncIterator[_Cost]:
    """Get another container continuously, and measure the peak memory of the daemon."""
    cost, ending = _Cost(), asyncio.Event()

    async def ask() -> None:
        while not ending.is_set():
            begin = time.monotonic()
            await caller.get("neighbour")
            cost.slowest = max(cost.slowest, time.monotonic() - begin)
            cost.answers += 1
            await asyncio.sleep(0.01)

    before = reset_peak(pid)
    asking = asyncio.create_task(ask())
    try:
        yield cost
    finally:
        ending.set()
        await asking
    cost.growth = memory(pid, "VmHWM") - before


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("plant", "change"),
    [
        pytest.param(_make_nested, _keep_and_restore_snapshot, id="nested-folders-in-snapshots"),
        pytest.param(_long_paths, _update_to_another_image, id="long-paths-in-images"),
    ],
)
async def test_a_change_of_a_hostile_layer_needs_bounded_memory_and_delays_no_other_caller(
    daemons: IsolatedDaemons, plant: Callable[[int], None], change: Callable[[Caller], Awaitable[None]]
) -> None:
    daemon = await daemons.start("--settle-period", "0")
    async with Caller(daemon.target) as caller, Caller(daemon.target) as other:
        hostile: container_pb2.Container = await caller.create("hostile", 1)
        await caller.create("neighbour")
        await caller.shell("hostile", "mkdir /zoo")
        pid = docker_inspect(daemons.rig, hostile.status.engine_id)["State"]["Pid"]
        zoo = os.open(f"/proc/{pid}/root/zoo", os.O_RDONLY | os.O_DIRECTORY)
        plant(zoo)
        os.close(zoo)
        async with _measure_cost(other, daemon.pid) as cost:
            await change(caller)
        assert cost.answers > 0
        assert cost.growth < _MAX_GROWTH, cost
        assert cost.slowest < limit(_MAX_SECONDS), cost
        for name in ("hostile", "neighbour"):
            await caller.delete(name)
