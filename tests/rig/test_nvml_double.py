"""The NVML double, called by pynvml: each call answers immediately what the state file says."""

import json
import sys
from typing import Any

import pytest

from tests.rig import FakeGpus, Rig

PRELUDE = """
import json, sys, threading, time
import pynvml as n
n.nvmlInit()
h = n.nvmlDeviceGetHandleByIndex(1)
def code(call, *arguments):
    try:
        call(*arguments)
    except n.NVMLError as error:
        return error.value
    return 0
def show(value):
    print(json.dumps(value), flush=True)
"""


def run_script(rig: Rig, script: str) -> Any:
    """Run a script after the prelude in another process; returns the value that it passes to `show`."""
    return json.loads(rig.run(sys.executable, "-c", PRELUDE + script).stdout)


INVENTORY = """
pci, memory, v2 = n.nvmlDeviceGetPciInfo(h), n.nvmlDeviceGetMemoryInfo(h), n.nvmlDeviceGetMemoryInfo(h, n.nvmlMemory_v2)
rates = n.nvmlDeviceGetUtilizationRates(h)
show({
  "machine": [n.nvmlSystemGetDriverVersion(), n.nvmlSystemGetNVMLVersion(), n.nvmlSystemGetCudaDriverVersion(),
              n.nvmlSystemGetCudaDriverVersion_v2(), n.nvmlDeviceGetCount()],
  "identity": [n.nvmlDeviceGetUUID(h), n.nvmlDeviceGetName(h), n.nvmlDeviceGetIndex(h), n.nvmlDeviceGetMinorNumber(h),
               n.nvmlDeviceGetSerial(h)],
  "pci": [pci.busId, pci.busIdLegacy, pci.domain, pci.bus, pci.device, pci.pciDeviceId],
  "memory": [memory.total, memory.used, memory.free, v2.total, v2.used, v2.free, v2.reserved],
  "condition": [rates.gpu, rates.memory, n.nvmlDeviceGetTemperature(h, 0), n.nvmlDeviceGetTemperatureV(h, 0),
                n.nvmlDeviceGetPowerUsage(h), n.nvmlDeviceGetPowerManagementLimit(h),
                n.nvmlDeviceGetTotalEccErrors(h, 1, 1), n.nvmlDeviceGetRetiredPages(h, 0),
                n.nvmlDeviceGetRetiredPages_v2(h, 0), n.nvmlDeviceGetRemappedRows(h),
                n.nvmlDeviceGetPersistenceMode(h), n.nvmlDeviceGetComputeMode(h)],
  "capability": n.nvmlDeviceGetCudaComputeCapability(h),
  "mig": [n.nvmlDeviceGetMigMode(h), n.nvmlDeviceGetMaxMigDeviceCount(h)],
  "links": [n.nvmlDeviceGetTopologyCommonAncestor(h, n.nvmlDeviceGetHandleByIndex(i)) for i in (1, 2, 5)]
           + [n.nvmlDeviceGetP2PStatus(h, n.nvmlDeviceGetHandleByIndex(2), 2), n.nvmlDeviceGetNvLinkState(h, 17),
              n.nvmlDeviceGetNumaNodeId(h)],
  "again": [n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByUUID(n.nvmlDeviceGetUUID(h).encode())),
            n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByPciBusId(pci.busId.encode()))],
  "text": n.nvmlErrorString(15),
})
"""


def test_an_inventory_reads_the_values_of_the_state_file(rig: Rig, gpus: FakeGpus) -> None:
    gpus.set(1, memory_used_bytes=5 << 30, utilization_gpu_percent=97, minor_number=6, temperature_celsius=64)
    found = run_script(rig, INVENTORY)
    total = 85520809984
    assert found == {
        "machine": ["550.54.15", "12.550.54.15", 12040, 12040, 8],
        "identity": [gpus.uuids[1], "NVIDIA H100 80GB HBM3", 1, 6, "1652220000001"],
        "pci": ["00000000:3B:00.0", "0000:3B:00.0", 0, 0x3B, 0, 0x233010DE],
        "memory": [total, 5 << 30, total - (5 << 30), total, 5 << 30, total - (5 << 30), 0],
        "condition": [97, 0, 64, 64, 71000, 700000, 0, [], [], [0, 0, 0, 0], 1, 0],
        "capability": [9, 0],
        "mig": [[0, 0], 7],
        "links": [0, 40, 50, 0, 1, 0],
        "again": [1, 1],
        "text": "GPU is lost",
    }


def test_processes_are_listed_with_their_memory(rig: Rig, gpus: FakeGpus) -> None:
    gpus.run_process(1, 4711, 1 << 30)
    gpus.run_process(1, 4712, 1 << 20, kind="graphics")
    gpus.run_process(1, 4713, 1 << 20)
    gpus.end_process(1, 4713)
    found = run_script(
        rig,
        """
processes = lambda call: [[p.pid, p.usedGpuMemory] for p in call(h)]
show([processes(n.nvmlDeviceGetComputeRunningProcesses), processes(n.nvmlDeviceGetComputeRunningProcesses_v2),
      processes(n.nvmlDeviceGetGraphicsRunningProcesses), n.nvmlDeviceGetMemoryInfo(h).used])
""",
    )
    assert found == [[[4711, 1 << 30]], [[4711, 1 << 30]], [[4712, 1 << 20]], (1 << 30) + (1 << 20)]


def test_every_call_about_a_lost_gpu_fails_with_gpu_is_lost(rig: Rig, gpus: FakeGpus) -> None:
    uuid = gpus.uuids[1]
    script = f"""
from tests.rig.gpus import FakeGpus
from pathlib import Path
FakeGpus(Path({str(gpus.path)!r})).lose({uuid!r})
show([code(n.nvmlDeviceGetUUID, h), code(n.nvmlDeviceGetMemoryInfo, h), code(n.nvmlDeviceGetHandleByIndex, 1),
      code(n.nvmlDeviceGetHandleByUUID, {uuid!r}), code(n.nvmlDeviceGetHandleByIndex, 2), n.nvmlDeviceGetCount()])
"""
    assert run_script(rig, script) == [15, 15, 15, 15, 0, 8]


def test_events_reach_the_event_sets_that_registered_for_them(rig: Rig, gpus: FakeGpus) -> None:
    gpus.raise_xid(1, 13)  # not delivered, because no event set exists yet
    script = f"""
from tests.rig.gpus import FakeGpus
from pathlib import Path
gpus = FakeGpus(Path({str(gpus.path)!r}))
events = n.nvmlEventSetCreate()
n.nvmlDeviceRegisterEvents(h, n.nvmlEventTypeXidCriticalError, events)
shown = [n.nvmlDeviceGetSupportedEventTypes(h) & 8, code(n.nvmlEventSetWait, events, 50)]
gpus.raise_xid(2, 31)  # not delivered, because this GPU is not registered
threading.Timer(0.1, lambda: gpus.lose(1, xid=79)).start()
start = time.monotonic()
event = n.nvmlEventSetWait(events, 120000)
shown += [n.nvmlDeviceGetIndex(n.nvmlDeviceGetHandleByIndex(2)), event.eventType, event.eventData]
shown += [time.monotonic() - start < 60]
while not code(n.nvmlDeviceGetUUID, event.device):
    pass  # the XID is reported just before the GPU is lost
shown += [code(n.nvmlEventSetWait, events, 5000), code(n.nvmlEventSetFree, events)]
show(shown)
"""
    assert run_script(rig, script) == [8, 10, 2, 8, 79, True, 15, 0]


def test_calls_fail_or_hang_as_the_state_file_says(rig: Rig, gpus: FakeGpus) -> None:
    gpus.fail("nvmlDeviceGetPowerUsage", 3, gpu=1)
    gpus.fail("nvmlDeviceGetCount_v2", 999)
    gpus.hang("nvmlDeviceGetName", gpu=1)
    gpus.set(1, temperature_celsius=None)
    script = f"""
from tests.rig.gpus import FakeGpus
from pathlib import Path
gpus = FakeGpus(Path({str(gpus.path)!r}))
other = n.nvmlDeviceGetHandleByIndex(2)
names = []
thread = threading.Thread(target=lambda: names.append(n.nvmlDeviceGetName(h)))
thread.start()
thread.join(0.1)
shown = [code(n.nvmlDeviceGetPowerUsage, h), code(n.nvmlDeviceGetPowerUsage, other), code(n.nvmlDeviceGetCount),
         code(n.nvmlDeviceGetTemperature, h, 0), n.nvmlDeviceGetName(other), len(names)]
# A call that did not hang would have returned the old name.
gpus.set(1, name="new name")
gpus.unhang("nvmlDeviceGetName", gpu=1)
thread.join()
n.nvmlShutdown()
show([*shown, names, code(n.nvmlDeviceGetCount)])
"""
    assert run_script(rig, script) == [3, 0, 999, 3, "NVIDIA H100 80GB HBM3", 0, ["new name"], 1]


def test_mig_devices_have_their_own_handles(rig: Rig, gpus: FakeGpus) -> None:
    uuids = gpus.enable_mig(1, 2)
    script = """
handles = [n.nvmlDeviceGetMigDeviceHandleByIndex(h, i) for i in (0, 1)]
show([n.nvmlDeviceGetMigMode(h), [n.nvmlDeviceGetUUID(x) for x in handles], n.nvmlDeviceGetName(handles[0]),
      n.nvmlDeviceGetMemoryInfo(handles[1]).total, code(n.nvmlDeviceGetMigDeviceHandleByIndex, h, 2),
      n.nvmlDeviceGetUUID(n.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handles[1])),
      n.nvmlDeviceIsMigDeviceHandle(handles[0]).value, n.nvmlDeviceGetGpuInstanceId(handles[1])])
"""
    name = "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
    assert run_script(rig, script) == [[1, 1], uuids, name, 85520809984 // 8, 6, gpus.uuids[1], 1, 8]


@pytest.mark.usefixtures("gpus")
def test_initialization_fails_without_a_driver(rig: Rig) -> None:
    rig.gpus.unload_driver()
    script = "import pynvml as n\ntry: n.nvmlInit()\nexcept n.NVMLError as error: print(error.value)"
    assert rig.run(sys.executable, "-c", script).stdout == "9\n"
