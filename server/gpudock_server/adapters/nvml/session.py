"""A session from nvmlInit to nvmlShutdown: known GPUs and their problems. Used in the driver thread."""

from __future__ import annotations

import threading
from contextlib import suppress

import pynvml
import structlog

from gpudock_server.adapters.nvml.driver import (
    GpuLostError,
    Handle,
    gpu_handles,
    gpu_uuid,
    machine_versions,
    read_gpu,
)
from gpudock_server.adapters.nvml.events import XidListener
from gpudock_server.adapters.nvml.xids import fatal_xid_message
from gpudock_server.model.gpu import Gpu, GpuHealth, GpuReport

_log = structlog.get_logger(__name__)
# After these errors the library must be initialized again.
_DRIVER_GONE = frozenset({pynvml.NVML_ERROR_DRIVER_NOT_LOADED, pynvml.NVML_ERROR_UNINITIALIZED})


class DriverUnavailableError(Exception):
    """The driver is not loaded, or was unloaded."""


class NvmlSession:
    """A session with the loaded driver. A new session knows no XIDs and no lost GPUs.

    All methods block. `changes` counts changes, so that older reports are known to be stale; any thread may read it.
    """

    def __init__(self) -> None:
        """Initialize NVML. Raises DriverUnavailableError with the reason."""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            # Usually the library is newer than the kernel module, and a later retry succeeds. If this process has
            # loaded the old library, it must be restarted: it cannot load the new one.
            updated = error.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
            advice = (
                " Reload the NVIDIA driver or reboot; restart the daemon only if the error persists." if updated else ""
            )
            raise DriverUnavailableError(f"NVML cannot be used: {error}{advice}") from error
        self.changes = 0
        self._versions = machine_versions()
        self._known: dict[str, Gpu] = {}
        self._xids: dict[str, str] = {}
        self._lock = threading.Lock()
        self._listener = self._start_listener()

    def _start_listener(self) -> XidListener | None:
        try:
            return XidListener(self._xid_raised, self._changed)
        except pynvml.NVMLError as error:
            _log.warning("XID events not available", error=str(error))
            return None

    def _xid_raised(self, uuid: str, xid: int) -> None:
        if text := fatal_xid_message(xid):
            with self._lock:
                # The first XID is the cause; later ones are mostly its consequences.
                self._xids.setdefault(uuid, text)
        # Also after other XIDs: the driver may report another health in the next read.
        self._changed()

    def _changed(self) -> None:
        with self._lock:
            self.changes += 1

    def read(self) -> GpuReport:
        """Read all GPUs, including lost ones that were known before. Raises DriverUnavailableError."""
        try:
            seen, problems = self._read_all()
        except pynvml.NVMLError as error:
            if error.value in _DRIVER_GONE:
                raise DriverUnavailableError(f"NVIDIA driver unavailable: {error}") from error
            return self._snapshot(self._all_unhealthy(str(error)), f"the NVIDIA driver reported an error: {error}")
        for uuid, gpu in self._known.items():
            if uuid not in seen:
                seen[uuid] = _lost(gpu, problems.pop(gpu.index, "no longer reported by the driver"))
        self._known |= seen
        message = "; ".join(f"GPU {index}: {problem}" for index, problem in sorted(problems.items()))
        return self._snapshot(seen, message or ("" if seen else "the NVIDIA driver reports no GPUs"))

    def _read_all(self) -> tuple[dict[str, Gpu], dict[int, str]]:
        """Return GPUs by UUID, and by index the errors of GPUs whose UUID is not available. Raises NVMLError."""
        seen: dict[str, Gpu] = {}
        problems: dict[int, str] = {}
        for index, handle in gpu_handles():
            if isinstance(handle, str):
                problems[index] = handle
                continue
            try:
                uuid = gpu_uuid(handle)
            except pynvml.NVMLError as error:
                problems[index] = str(error)
                continue
            seen[uuid] = self._read_gpu(handle, uuid, index)
        return seen, problems

    def _read_gpu(self, handle: Handle, uuid: str, index: int) -> Gpu:
        if self._listener is not None:
            self._listener.add(handle, uuid)
        try:
            return read_gpu(handle, uuid, index)
        except GpuLostError as error:
            return _lost(self._known.get(uuid, Gpu(uuid=uuid, index=index)), str(error))

    def _all_unhealthy(self, problem: str) -> dict[str, Gpu]:
        return {uuid: unhealthy(gpu, problem) for uuid, gpu in self._known.items()}

    def _snapshot(self, gpus: dict[str, Gpu], message: str) -> GpuReport:
        with self._lock:
            xids = dict(self._xids)
        marked = (unhealthy(gpu, xids[uuid]) if uuid in xids else gpu for uuid, gpu in gpus.items())
        driver, nvml, cuda = self._versions
        return GpuReport(
            gpus=tuple(sorted(marked, key=lambda gpu: gpu.index)),
            driver_version=driver,
            nvml_version=nvml,
            cuda_driver_version=cuda,
            message=message,
        )

    def close(self, timeout_seconds: float) -> None:
        """Stop the listener, which takes up to half a second, and shut NVML down."""
        if self._listener is not None and not self._listener.close(timeout_seconds):
            return  # nvmlShutdown is not safe during a call that hangs
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def unhealthy(gpu: Gpu, message: str) -> Gpu:
    """Mark a GPU as unhealthy, so that it is not allocated; a lost one stays lost. All reasons are kept."""
    health = GpuHealth.LOST if gpu.health is GpuHealth.LOST else GpuHealth.UNHEALTHY
    both = f"{message}; {gpu.health_message}" if gpu.health_message else message
    return gpu.model_copy(update={"health": health, "health_message": both})


def _lost(gpu: Gpu, message: str) -> Gpu:
    """Return a lost GPU: its identity without its telemetry."""
    return Gpu(
        uuid=gpu.uuid,
        index=gpu.index,
        minor_number=gpu.minor_number,
        name=gpu.name,
        pci_bus_id=gpu.pci_bus_id,
        memory_total_bytes=gpu.memory_total_bytes,
        mig_mode=gpu.mig_mode,
        health=GpuHealth.LOST,
        health_message=message,
    )
