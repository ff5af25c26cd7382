"""From nvmlInit to nvmlShutdown: which cards were seen, and what went wrong with them. Lives in the driver's thread."""

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
# After these the library has to be initialized anew.
_DRIVER_GONE = frozenset({pynvml.NVML_ERROR_DRIVER_NOT_LOADED, pynvml.NVML_ERROR_UNINITIALIZED})


class DriverUnavailableError(Exception):
    """The driver was unloaded, or never loaded."""


class NvmlSession:
    """The driver, while it is loaded. A new one knows of no XIDs and no lost cards.

    Everything blocks. `changes` counts what a snapshot that was taken before does not show; any thread may read it.
    """

    def __init__(self) -> None:
        """Initializes NVML. Raises DriverUnavailableError with the reason."""
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            # Mostly the library is new and the kernel's module old, and the next try shows when that is over. A process
            # that has loaded the old library has to be restarted: it cannot load the new one beside it.
            updated = error.value == pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
            advice = " Reload the NVIDIA driver or reboot; restart the daemon only if this stays." if updated else ""
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
            _log.warning("no_xid_events", error=str(error))
            return None

    def _xid_raised(self, uuid: str, xid: int) -> None:
        if text := fatal_xid_message(xid):
            with self._lock:
                # The first tells the cause; those after it are mostly its consequences.
                self._xids.setdefault(uuid, text)
        # An XID that is not fatal here may have changed the driver's own mind: let the next snapshot ask it.
        self._changed()

    def _changed(self) -> None:
        with self._lock:
            self.changes += 1

    def read(self) -> GpuReport:
        """All cards, those included that were seen once and are gone. Raises DriverUnavailableError."""
        try:
            seen, problems = self._read_all()
        except pynvml.NVMLError as error:
            if error.value in _DRIVER_GONE:
                raise DriverUnavailableError(f"the NVIDIA driver is gone: {error}") from error
            return self._snapshot(self._all_unhealthy(str(error)), f"the NVIDIA driver shows no cards: {error}")
        for uuid, gpu in self._known.items():
            if uuid not in seen:
                seen[uuid] = _lost(gpu, problems.pop(gpu.index, "the driver no longer shows it"))
        self._known |= seen
        message = "; ".join(f"GPU {index}: {problem}" for index, problem in sorted(problems.items()))
        return self._snapshot(seen, message or ("" if seen else "the NVIDIA driver shows no cards"))

    def _read_all(self) -> tuple[dict[str, Gpu], dict[int, str]]:
        """Cards by UUID, and by index what is wrong with those that do not even tell that. Raises NVMLError."""
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
        """End the listening, which takes up to half a second, and shut NVML down."""
        if self._listener is not None and not self._listener.close(timeout_seconds):
            return  # nvmlShutdown under a call that hangs is asking for trouble
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def unhealthy(gpu: Gpu, message: str) -> Gpu:
    """The card, marked so that it is not handed out; one that is lost stays that, and both reasons are kept."""
    health = GpuHealth.LOST if gpu.health is GpuHealth.LOST else GpuHealth.UNHEALTHY
    both = f"{message}; {gpu.health_message}" if gpu.health_message else message
    return gpu.model_copy(update={"health": health, "health_message": both})


def _lost(gpu: Gpu, message: str) -> Gpu:
    """Who it was, without what it measured."""
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
