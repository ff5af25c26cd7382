"""The inventory over the real pynvml and the rig's double of the driver's library."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pynvml
import pytest
import pytest_asyncio
from gpudock_server.adapters.nvml import NvmlInventory
from gpudock_server.adapters.nvml.xids import FATAL_XIDS
from gpudock_server.model.gpu import Gpu, GpuHealth, GpuProcess, GpuReport, MigMode

from tests.rig.builds import build_nvml
from tests.rig.gpus import FakeGpus
from tests.rig.patience import limit

UNKNOWN_ERROR = 999
NOT_SUPPORTED = 3
VERSION_MISMATCH = 18


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the double, which pynvml takes for the driver's library in this module's tests."""
    folder = tmp_path_factory.mktemp("nvml-lib")
    build_nvml(folder)
    pynvml.nvmlLib = ctypes.CDLL(str(folder / "libnvidia-ml.so.1"))
    yield folder
    pynvml.nvmlLib = None
    pynvml._nvmlGetFunctionPointer_cache.clear()


@pytest.fixture
def cards(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    """Eight cards of this test's own."""
    assert library.is_dir()
    (tmp_path / "gpus").mkdir()
    gpus = FakeGpus(tmp_path / "gpus/state", 8)
    monkeypatch.setenv("GPUDOCK_NVML_STATE", str(gpus.path))
    return gpus


@pytest_asyncio.fixture
async def inventory(cards: FakeGpus) -> AsyncIterator[NvmlInventory]:
    """Reads anew at every snapshot, and looks at once for a driver that was not there."""
    inventory = NvmlInventory(timeout_seconds=5, cache_seconds=0, retry_seconds=0)
    await inventory.start()
    yield inventory
    if cards.path.exists():
        cards.reset()  # what hangs must return, or its thread would disturb the next test
    await inventory.close()


async def _until(inventory: NvmlInventory, condition: Callable[[GpuReport], bool]) -> GpuReport:
    async with asyncio.timeout(limit(10)):
        while not condition(snapshot := await inventory.snapshot()):
            await asyncio.sleep(0.01)
    return snapshot


def _healths(snapshot: GpuReport) -> list[GpuHealth]:
    return [gpu.health for gpu in snapshot.gpus]


# ---- what a card shows ----


async def test_eight_cards_are_shown_with_all_that_they_tell(inventory: NvmlInventory, cards: FakeGpus) -> None:
    cards.set(
        3,
        memory_used_bytes=5 << 30,
        utilization_gpu_percent=97,
        temperature_celsius=61,
        power_milliwatts=512_345,
    )
    snapshot = await inventory.snapshot()
    assert [gpu.uuid for gpu in snapshot.gpus] == cards.uuids
    assert [gpu.index for gpu in snapshot.gpus] == list(range(8))
    assert (snapshot.driver_version, snapshot.cuda_driver_version, snapshot.message) == ("550.54.15", "12.4", "")
    assert snapshot.nvml_version == "12.550.54.15"
    assert snapshot.gpus[3] == Gpu(
        uuid=cards.uuids[3],
        index=3,
        minor_number=3,
        name="NVIDIA H100 80GB HBM3",
        pci_bus_id="00000000:5D:00.0",
        memory_total_bytes=85_520_809_984,
        memory_used_bytes=5 << 30,
        utilization_percent=97,
        temperature_celsius=61,
        power_milliwatts=512_345,
        mig_mode=MigMode.DISABLED,
        health=GpuHealth.HEALTHY,
    )
    assert all(gpu.schedulable for gpu in snapshot.gpus)


async def test_what_a_card_does_not_offer_is_none(inventory: NvmlInventory, cards: FakeGpus) -> None:
    optional = "utilization_gpu_percent temperature_celsius power_milliwatts mig_mode_current minor_number"
    cards.set(0, **dict.fromkeys([*optional.split(), "memory_total_bytes"]))
    gpu = (await inventory.snapshot()).gpus[0]
    assert (gpu.utilization_percent, gpu.temperature_celsius, gpu.power_milliwatts, gpu.minor_number) == (None,) * 4
    assert (gpu.mig_mode, gpu.memory_total_bytes, gpu.health) == (MigMode.UNSUPPORTED, 0, GpuHealth.HEALTHY)


async def test_a_card_in_mig_mode_is_not_handed_out_whole(inventory: NvmlInventory, cards: FakeGpus) -> None:
    cards.enable_mig(1)
    gpu = (await inventory.snapshot()).gpus[1]
    assert (gpu.mig_mode, gpu.health, gpu.schedulable) == (MigMode.ENABLED, GpuHealth.HEALTHY, False)


async def test_processes_are_shown_once_with_their_names(inventory: NvmlInventory, cards: FakeGpus) -> None:
    mine = os.getpid()
    cards.run_process(2, mine, 1 << 30)
    cards.run_process(2, mine, 1 << 30, kind="graphics")
    cards.run_process(2, 4_100_000, 7)
    name = Path("/proc/self/comm").read_text().strip()  # noqa: ASYNC240 - the kernel's memory
    assert (await inventory.snapshot()).gpus[2].processes == (
        GpuProcess(pid=mine, name=name, used_memory_bytes=1 << 30),
        GpuProcess(pid=4_100_000, name="", used_memory_bytes=7),
    )


# ---- a sick card ----


async def test_a_lost_card_stays_with_its_name_until_it_is_back(inventory: NvmlInventory, cards: FakeGpus) -> None:
    before = (await inventory.snapshot()).gpus[5]
    cards.lose(5)
    snapshot = await inventory.snapshot()
    lost = snapshot.gpus[5]
    assert (lost.uuid, lost.index, lost.name, lost.pci_bus_id) == (
        before.uuid,
        5,
        before.name,
        before.pci_bus_id,
    )
    assert (lost.health, lost.health_message, lost.temperature_celsius) == (GpuHealth.LOST, "GPU is lost", None)
    assert _healths(snapshot).count(GpuHealth.HEALTHY) == 7
    cards.restore(5)
    assert (await inventory.snapshot()).gpus[5] == before


async def test_a_card_that_was_lost_before_the_start_is_at_least_spoken_of(cards: FakeGpus) -> None:
    cards.lose(5)
    inventory = NvmlInventory()
    await inventory.start()
    snapshot = await inventory.snapshot()
    assert [gpu.index for gpu in snapshot.gpus] == [0, 1, 2, 3, 4, 6, 7]
    assert snapshot.message == "GPU 5: GPU is lost"
    await inventory.close()


async def test_a_card_that_the_driver_no_longer_counts_is_lost(inventory: NvmlInventory, cards: FakeGpus) -> None:
    cards.reset(7)
    snapshot = await inventory.snapshot()
    assert _healths(snapshot)[7] is GpuHealth.LOST
    assert len(snapshot.gpus) == 8


async def test_a_fatal_xid_takes_its_card_out_and_others_do_not(cards: FakeGpus) -> None:
    """With a cache that would hide it: an XID is seen all the same."""
    inventory = NvmlInventory(cache_seconds=3600)
    await inventory.start()
    for xid in (13, 31, 43, 45, 63, 68, 92, 94, 109):
        cards.raise_xid(2, xid)
    cards.raise_xid(6, 79)
    cards.raise_xid(6, 45)
    snapshot = await _until(inventory, lambda snapshot: not snapshot.gpus[6].schedulable)
    assert (snapshot.gpus[6].health, snapshot.gpus[6].health_message) == (
        GpuHealth.UNHEALTHY,
        "XID 79: fell off the bus",
    )
    assert _healths(snapshot).count(GpuHealth.HEALTHY) == 7
    await inventory.close()


async def test_every_fatal_xid_is_understood(inventory: NvmlInventory, cards: FakeGpus) -> None:
    assert FATAL_XIDS.keys() >= {48, 62, 64, 74, 79, 95, 119, 120, 140, 143}
    for xid in (48, 119):
        cards.raise_xid(xid % 8, xid)
    snapshot = await _until(inventory, lambda snapshot: _healths(snapshot).count(GpuHealth.UNHEALTHY) == 2)
    assert snapshot.gpus[0].health_message == "XID 48: double bit ECC error"


async def test_a_card_that_fell_off_the_bus_tells_both(inventory: NvmlInventory, cards: FakeGpus) -> None:
    cards.lose(4, xid=79)
    snapshot = await _until(inventory, lambda snapshot: "XID" in snapshot.gpus[4].health_message)
    assert (snapshot.gpus[4].health, snapshot.gpus[4].health_message) == (
        GpuHealth.LOST,
        "XID 79: fell off the bus; GPU is lost",
    )


async def test_the_drivers_own_wish_for_a_reset_is_heard(
    inventory: NvmlInventory, cards: FakeGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The double has no such field; a driver from R565 on has."""
    wanted = pynvml.c_nvmlFieldValue_t()
    wanted.value.uiVal = pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET
    monkeypatch.setattr(pynvml, "nvmlDeviceGetFieldValues", lambda _handle, _fields: [wanted])
    gpu = (await inventory.snapshot()).gpus[0]
    assert gpu.uuid == cards.uuids[0]
    assert (gpu.health, gpu.health_message) == (
        GpuHealth.UNHEALTHY,
        "the driver requests recovery: reset the GPU",
    )


async def test_a_query_that_fails_makes_its_card_unhealthy(inventory: NvmlInventory, cards: FakeGpus) -> None:
    cards.fail("nvmlDeviceGetTemperatureV", UNKNOWN_ERROR, gpu=1)
    cards.fail("nvmlDeviceGetTemperature", UNKNOWN_ERROR, gpu=1)
    snapshot = await inventory.snapshot()
    assert snapshot.gpus[1].health is GpuHealth.UNHEALTHY
    assert "Unknown Error" in snapshot.gpus[1].health_message
    assert _healths(snapshot).count(GpuHealth.HEALTHY) == 7


# ---- a sick driver, or none ----


async def test_a_driver_that_cannot_count_makes_all_cards_unhealthy(inventory: NvmlInventory, cards: FakeGpus) -> None:
    cards.fail("nvmlDeviceGetCount_v2", UNKNOWN_ERROR)
    snapshot = await inventory.snapshot()
    assert _healths(snapshot) == [GpuHealth.UNHEALTHY] * 8
    assert "Unknown Error" in snapshot.message
    cards.fail("nvmlDeviceGetCount_v2", 0)
    assert _healths(await inventory.snapshot()) == [GpuHealth.HEALTHY] * 8


async def test_a_driver_that_goes_and_comes_back_is_a_new_one(inventory: NvmlInventory, cards: FakeGpus) -> None:
    cards.raise_xid(0, 79)
    await _until(inventory, lambda snapshot: not snapshot.gpus[0].schedulable)
    cards.unload_driver()
    gone = await inventory.snapshot()
    assert (gone.gpus, gone.message) == ((), "NVIDIA driver unavailable: Driver Not Loaded")
    assert (await inventory.snapshot()).message == "NVML cannot be used: Driver Not Loaded"
    cards.reset()
    assert _healths(await inventory.snapshot()) == [GpuHealth.HEALTHY] * 8
    cards.raise_xid(1, 48)
    await _until(inventory, lambda snapshot: not snapshot.gpus[1].schedulable)


async def test_a_driver_that_does_not_fit_its_library_is_named(cards: FakeGpus) -> None:
    cards.fail("nvmlInitWithFlags", VERSION_MISMATCH)
    inventory = NvmlInventory(retry_seconds=3600, cache_seconds=0)
    await inventory.start()
    snapshot = await inventory.snapshot()
    assert snapshot.gpus == ()
    assert "version mismatch. Reload the NVIDIA driver" in snapshot.message
    cards.fail("nvmlInitWithFlags", 0)
    assert (await inventory.snapshot()).gpus == ()  # not looked at again so soon
    await inventory.close()


async def test_without_cards_the_driver_still_tells_its_version(cards: FakeGpus) -> None:
    cards.reset(0)
    inventory = NvmlInventory()
    await inventory.start()
    snapshot = await inventory.snapshot()
    assert (snapshot.gpus, snapshot.driver_version) == ((), "550.54.15")
    assert snapshot.message == "the NVIDIA driver reports no GPUs"
    await inventory.close()


async def test_a_driver_without_events_is_used_all_the_same(cards: FakeGpus) -> None:
    cards.fail("nvmlEventSetCreate", NOT_SUPPORTED)
    inventory = NvmlInventory()
    await inventory.start()
    assert _healths(await inventory.snapshot()) == [GpuHealth.HEALTHY] * 8
    await inventory.close()


async def test_a_driver_that_hangs_holds_nobody_up(cards: FakeGpus) -> None:
    inventory = NvmlInventory(timeout_seconds=1, cache_seconds=0)
    await inventory.start()
    cards.hang("nvmlDeviceGetMemoryInfo", gpu=7)
    began = time.monotonic()
    # Were each of them to wait for itself, it would take more than a minute.
    async with asyncio.timeout(limit(5)):
        snapshots = await asyncio.gather(*[inventory.snapshot() for _ in range(100)])
    assert time.monotonic() - began > 0.9
    for snapshot in snapshots:
        assert _healths(snapshot) == [GpuHealth.UNHEALTHY] * 8
        assert "has not answered" in snapshot.message
    began = time.monotonic()
    await inventory.snapshot()
    assert time.monotonic() - began < 0.9, "it waits once, not for every caller"
    cards.unhang("nvmlDeviceGetMemoryInfo", gpu=7)
    await _until(inventory, lambda snapshot: all(gpu.schedulable for gpu in snapshot.gpus))
    await inventory.close()


# ---- the inventory itself ----


async def test_a_hundred_callers_share_one_read(cards: FakeGpus) -> None:
    inventory = NvmlInventory(cache_seconds=3600)
    await inventory.start()
    first, *others = await asyncio.gather(*[inventory.snapshot() for _ in range(100)])
    assert all(other is first for other in others)
    cards.set(0, temperature_celsius=77)
    assert await inventory.snapshot() is first
    await inventory.close()


async def test_nothing_is_left_of_a_closed_inventory(cards: FakeGpus) -> None:
    assert cards.uuids
    inventory = NvmlInventory()
    assert (await inventory.snapshot()).message == "the GPU inventory is not started"
    await inventory.start()
    assert {"nvml", "nvml-events"} <= {thread.name for thread in threading.enumerate()}
    async with asyncio.timeout(limit(2)):
        await inventory.close()
        await inventory.close()
    assert not {"nvml", "nvml-events"} & {thread.name for thread in threading.enumerate()}


def _in_another_python(script: str, **environment: str) -> str:
    """What an inventory says in a process of its own, which has to end by itself."""
    prelude = "import asyncio; from gpudock_server.adapters.nvml import NvmlInventory\n"
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + script],
        env=variables,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout.strip()


def test_without_the_library_there_are_no_cards(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").touch()  # found before a real one, and none
    script = """
async def main():
    inventory = NvmlInventory()
    await inventory.start()
    print(await inventory.snapshot())
    await inventory.close()
asyncio.run(main())"""
    said = _in_another_python(script, LD_LIBRARY_PATH=str(tmp_path))
    assert "gpus=()" in said
    assert "NVML Shared Library Not Found" in said


def test_a_driver_that_hangs_does_not_keep_the_daemon_from_ending(library: Path, cards: FakeGpus) -> None:
    cards.hang("nvmlDeviceGetCount_v2")
    script = """
async def main():
    inventory = NvmlInventory(timeout_seconds=0.1)
    await inventory.start()
    print((await inventory.snapshot()).gpus)
    await inventory.close()
asyncio.run(main())"""
    assert _in_another_python(script, LD_LIBRARY_PATH=str(library)) == "()"
