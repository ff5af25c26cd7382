"""NvmlInventory with the real pynvml and the rig's double of the NVML library."""

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
    """The folder of the double; pynvml loads it as the driver's library in the tests of this module."""
    folder = tmp_path_factory.mktemp("nvml-lib")
    build_nvml(folder)
    pynvml.nvmlLib = ctypes.CDLL(str(folder / "libnvidia-ml.so.1"))
    yield folder
    pynvml.nvmlLib = None
    pynvml._nvmlGetFunctionPointer_cache.clear()


@pytest.fixture
def gpus(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpus:
    """Eight GPUs whose state belongs to this test."""
    assert library.is_dir()
    (tmp_path / "gpus").mkdir()
    gpus = FakeGpus(tmp_path / "gpus/state", 8)
    monkeypatch.setenv("GPUDOCK_NVML_STATE", str(gpus.path))
    return gpus


@pytest_asyncio.fixture
async def inventory(gpus: FakeGpus) -> AsyncIterator[NvmlInventory]:
    """A started inventory that queries the driver for every snapshot, and has no pause before it tries again."""
    inventory = NvmlInventory(timeout_seconds=5, cache_seconds=0, retry_seconds=0)
    await inventory.start()
    yield inventory
    if gpus.path.exists():
        gpus.reset()  # A call that hangs must return, or its thread would disturb the next test.
    await inventory.close()


async def _wait_for_report(inventory: NvmlInventory, condition: Callable[[GpuReport], bool]) -> GpuReport:
    async with asyncio.timeout(limit(10)):
        while not condition(report := await inventory.snapshot()):
            await asyncio.sleep(0.01)
    return report


def _healths(report: GpuReport) -> list[GpuHealth]:
    return [gpu.health for gpu in report.gpus]


# ---- fields of a GPU ----


async def test_eight_gpus_are_reported_with_all_fields(inventory: NvmlInventory, gpus: FakeGpus) -> None:
    gpus.set(
        3,
        memory_used_bytes=5 << 30,
        utilization_gpu_percent=97,
        temperature_celsius=61,
        power_milliwatts=512_345,
    )
    report = await inventory.snapshot()
    assert [gpu.uuid for gpu in report.gpus] == gpus.uuids
    assert [gpu.index for gpu in report.gpus] == list(range(8))
    assert (report.driver_version, report.cuda_driver_version, report.message) == ("550.54.15", "12.4", "")
    assert report.nvml_version == "12.550.54.15"
    assert report.gpus[3] == Gpu(
        uuid=gpus.uuids[3],
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
    assert all(gpu.schedulable for gpu in report.gpus)


async def test_unsupported_fields_are_none(inventory: NvmlInventory, gpus: FakeGpus) -> None:
    optional = "utilization_gpu_percent temperature_celsius power_milliwatts mig_mode_current minor_number"
    gpus.set(0, **dict.fromkeys([*optional.split(), "memory_total_bytes"]))
    gpu = (await inventory.snapshot()).gpus[0]
    assert (gpu.utilization_percent, gpu.temperature_celsius, gpu.power_milliwatts, gpu.minor_number) == (None,) * 4
    assert (gpu.mig_mode, gpu.memory_total_bytes, gpu.health) == (MigMode.UNSUPPORTED, 0, GpuHealth.HEALTHY)


async def test_a_gpu_in_mig_mode_is_not_schedulable(inventory: NvmlInventory, gpus: FakeGpus) -> None:
    gpus.enable_mig(1)
    gpu = (await inventory.snapshot()).gpus[1]
    assert (gpu.mig_mode, gpu.health, gpu.schedulable) == (MigMode.ENABLED, GpuHealth.HEALTHY, False)


async def test_each_process_is_reported_once_with_its_name(inventory: NvmlInventory, gpus: FakeGpus) -> None:
    own_pid = os.getpid()
    gpus.run_process(2, own_pid, 1 << 30)
    gpus.run_process(2, own_pid, 1 << 30, kind="graphics")
    gpus.run_process(2, 4_100_000, 7)
    name = Path("/proc/self/comm").read_text().strip()  # noqa: ASYNC240 - procfs does not block
    assert (await inventory.snapshot()).gpus[2].processes == (
        GpuProcess(pid=own_pid, name=name, used_memory_bytes=1 << 30),
        GpuProcess(pid=4_100_000, name="", used_memory_bytes=7),
    )


# ---- failing GPUs ----


async def test_a_lost_gpu_is_reported_with_its_name_until_it_returns(inventory: NvmlInventory, gpus: FakeGpus) -> None:
    before = (await inventory.snapshot()).gpus[5]
    gpus.lose(5)
    report = await inventory.snapshot()
    lost_gpu = report.gpus[5]
    assert (lost_gpu.uuid, lost_gpu.index, lost_gpu.name, lost_gpu.pci_bus_id) == (
        before.uuid,
        5,
        before.name,
        before.pci_bus_id,
    )
    assert (lost_gpu.health, lost_gpu.health_message, lost_gpu.temperature_celsius) == (
        GpuHealth.LOST,
        "GPU is lost",
        None,
    )
    assert _healths(report).count(GpuHealth.HEALTHY) == 7
    gpus.restore(5)
    assert (await inventory.snapshot()).gpus[5] == before


async def test_a_gpu_that_was_lost_before_the_start_is_named_in_the_message(gpus: FakeGpus) -> None:
    gpus.lose(5)
    inventory = NvmlInventory()
    await inventory.start()
    report = await inventory.snapshot()
    assert [gpu.index for gpu in report.gpus] == [0, 1, 2, 3, 4, 6, 7]
    assert report.message == "GPU 5: GPU is lost"
    await inventory.close()


async def test_a_gpu_that_the_driver_no_longer_counts_is_lost(inventory: NvmlInventory, gpus: FakeGpus) -> None:
    gpus.reset(7)
    report = await inventory.snapshot()
    assert _healths(report)[7] is GpuHealth.LOST
    assert len(report.gpus) == 8


async def test_only_a_fatal_xid_makes_its_gpu_unhealthy(gpus: FakeGpus) -> None:
    """A cached report is replaced when an XID arrives."""
    inventory = NvmlInventory(cache_seconds=3600)
    await inventory.start()
    for xid in (13, 31, 43, 45, 63, 68, 92, 94, 109):
        gpus.raise_xid(2, xid)
    gpus.raise_xid(6, 79)
    gpus.raise_xid(6, 45)
    report = await _wait_for_report(inventory, lambda report: not report.gpus[6].schedulable)
    assert (report.gpus[6].health, report.gpus[6].health_message) == (
        GpuHealth.UNHEALTHY,
        "XID 79: fell off the bus",
    )
    assert _healths(report).count(GpuHealth.HEALTHY) == 7
    await inventory.close()


async def test_every_fatal_xid_has_a_message(inventory: NvmlInventory, gpus: FakeGpus) -> None:
    assert FATAL_XIDS.keys() >= {48, 62, 64, 74, 79, 95, 119, 120, 140, 143}
    for xid in (48, 119):
        gpus.raise_xid(xid % 8, xid)
    report = await _wait_for_report(inventory, lambda report: _healths(report).count(GpuHealth.UNHEALTHY) == 2)
    assert report.gpus[0].health_message == "XID 48: double bit ECC error"


async def test_the_message_of_a_lost_gpu_includes_its_xid(inventory: NvmlInventory, gpus: FakeGpus) -> None:
    gpus.lose(4, xid=79)
    report = await _wait_for_report(inventory, lambda report: "XID" in report.gpus[4].health_message)
    assert (report.gpus[4].health, report.gpus[4].health_message) == (
        GpuHealth.LOST,
        "XID 79: fell off the bus; GPU is lost",
    )


async def test_a_gpu_whose_driver_requests_a_reset_is_unhealthy(
    inventory: NvmlInventory, gpus: FakeGpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drivers have this field since R565; the double has none."""
    field = pynvml.c_nvmlFieldValue_t()
    field.value.uiVal = pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET
    monkeypatch.setattr(pynvml, "nvmlDeviceGetFieldValues", lambda _handle, _fields: [field])
    gpu = (await inventory.snapshot()).gpus[0]
    assert gpu.uuid == gpus.uuids[0]
    assert (gpu.health, gpu.health_message) == (
        GpuHealth.UNHEALTHY,
        "the driver requests recovery: reset the GPU",
    )


async def test_a_failing_query_makes_its_gpu_unhealthy(inventory: NvmlInventory, gpus: FakeGpus) -> None:
    gpus.fail("nvmlDeviceGetTemperatureV", UNKNOWN_ERROR, gpu=1)
    gpus.fail("nvmlDeviceGetTemperature", UNKNOWN_ERROR, gpu=1)
    report = await inventory.snapshot()
    assert report.gpus[1].health is GpuHealth.UNHEALTHY
    assert "Unknown Error" in report.gpus[1].health_message
    assert _healths(report).count(GpuHealth.HEALTHY) == 7


# ---- a failing driver, or none ----


async def test_a_driver_that_cannot_count_makes_all_gpus_unhealthy(inventory: NvmlInventory, gpus: FakeGpus) -> None:
    gpus.fail("nvmlDeviceGetCount_v2", UNKNOWN_ERROR)
    report = await inventory.snapshot()
    assert _healths(report) == [GpuHealth.UNHEALTHY] * 8
    assert "Unknown Error" in report.message
    gpus.fail("nvmlDeviceGetCount_v2", 0)
    assert _healths(await inventory.snapshot()) == [GpuHealth.HEALTHY] * 8


async def test_a_driver_that_is_loaded_again_has_healthy_gpus(inventory: NvmlInventory, gpus: FakeGpus) -> None:
    gpus.raise_xid(0, 79)
    await _wait_for_report(inventory, lambda report: not report.gpus[0].schedulable)
    gpus.unload_driver()
    unloaded = await inventory.snapshot()
    assert (unloaded.gpus, unloaded.message) == ((), "NVIDIA driver unavailable: Driver Not Loaded")
    assert (await inventory.snapshot()).message == "NVML cannot be used: Driver Not Loaded"
    gpus.reset()
    assert _healths(await inventory.snapshot()) == [GpuHealth.HEALTHY] * 8
    gpus.raise_xid(1, 48)
    await _wait_for_report(inventory, lambda report: not report.gpus[1].schedulable)


async def test_a_driver_with_another_version_than_its_library_is_reported(gpus: FakeGpus) -> None:
    gpus.fail("nvmlInitWithFlags", VERSION_MISMATCH)
    inventory = NvmlInventory(retry_seconds=3600, cache_seconds=0)
    await inventory.start()
    report = await inventory.snapshot()
    assert report.gpus == ()
    assert "version mismatch. Reload the NVIDIA driver" in report.message
    gpus.fail("nvmlInitWithFlags", 0)
    assert (await inventory.snapshot()).gpus == (), "the driver is not tried again before retry_seconds"
    await inventory.close()


async def test_a_driver_without_gpus_reports_its_version(gpus: FakeGpus) -> None:
    gpus.reset(0)
    inventory = NvmlInventory()
    await inventory.start()
    report = await inventory.snapshot()
    assert (report.gpus, report.driver_version) == ((), "550.54.15")
    assert report.message == "the NVIDIA driver reports no GPUs"
    await inventory.close()


async def test_a_driver_without_events_is_used(gpus: FakeGpus) -> None:
    gpus.fail("nvmlEventSetCreate", NOT_SUPPORTED)
    inventory = NvmlInventory()
    await inventory.start()
    assert _healths(await inventory.snapshot()) == [GpuHealth.HEALTHY] * 8
    await inventory.close()


async def test_a_driver_that_hangs_delays_callers_once(gpus: FakeGpus) -> None:
    inventory = NvmlInventory(timeout_seconds=1, cache_seconds=0)
    await inventory.start()
    gpus.hang("nvmlDeviceGetMemoryInfo", gpu=7)
    begin = time.monotonic()
    # Were each of them to wait for itself, it would take more than a minute.
    async with asyncio.timeout(limit(5)):
        snapshots = await asyncio.gather(*[inventory.snapshot() for _ in range(100)])
    assert time.monotonic() - begin > 0.9
    for report in snapshots:
        assert _healths(report) == [GpuHealth.UNHEALTHY] * 8
        assert "has not answered" in report.message
    begin = time.monotonic()
    await inventory.snapshot()
    assert time.monotonic() - begin < 0.9, "it waits once, not for every caller"
    gpus.unhang("nvmlDeviceGetMemoryInfo", gpu=7)
    await _wait_for_report(inventory, lambda report: all(gpu.schedulable for gpu in report.gpus))
    await inventory.close()


# ---- caching, closing, and a missing library ----


async def test_a_hundred_callers_share_one_query(gpus: FakeGpus) -> None:
    inventory = NvmlInventory(cache_seconds=3600)
    await inventory.start()
    first, *others = await asyncio.gather(*[inventory.snapshot() for _ in range(100)])
    assert all(other is first for other in others)
    gpus.set(0, temperature_celsius=77)
    assert await inventory.snapshot() is first
    await inventory.close()


async def test_a_closed_inventory_leaves_no_thread(gpus: FakeGpus) -> None:
    assert gpus.uuids
    inventory = NvmlInventory()
    assert (await inventory.snapshot()).message == "the GPU inventory is not started"
    await inventory.start()
    assert {"nvml", "nvml-events"} <= {thread.name for thread in threading.enumerate()}
    async with asyncio.timeout(limit(2)):
        await inventory.close()
        await inventory.close()
    assert not {"nvml", "nvml-events"} & {thread.name for thread in threading.enumerate()}


def _run_python(code: str, **environment: str) -> str:
    """Run code that uses an inventory in another Python process, which must exit; returns its output."""
    prelude = "import asyncio; from gpudock_server.adapters.nvml import NvmlInventory\n"
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", prelude + code],
        env=variables,
        capture_output=True,
        text=True,
        timeout=limit(20),
        check=True,
    )
    return process.stdout.strip()


def test_without_the_library_there_are_no_gpus(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").touch()  # Found before a real library; an empty file is none.
    code = """
async def main():
    inventory = NvmlInventory()
    await inventory.start()
    print(await inventory.snapshot())
    await inventory.close()
asyncio.run(main())"""
    output = _run_python(code, LD_LIBRARY_PATH=str(tmp_path))
    assert "gpus=()" in output
    assert "NVML Shared Library Not Found" in output


def test_a_driver_that_hangs_does_not_keep_the_process_from_exiting(library: Path, gpus: FakeGpus) -> None:
    gpus.hang("nvmlDeviceGetCount_v2")
    code = """
async def main():
    inventory = NvmlInventory(timeout_seconds=0.1)
    await inventory.start()
    print((await inventory.snapshot()).gpus)
    await inventory.close()
asyncio.run(main())"""
    assert _run_python(code, LD_LIBRARY_PATH=str(library)) == "()"
