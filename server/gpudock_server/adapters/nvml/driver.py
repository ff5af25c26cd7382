"""Blocking reads of one GPU and of the driver versions through pynvml, converted to the model.

All calls may block for any time, so they run in the driver thread. Names and meanings are those of nvml.h; pynvml
raises NVMLError with the code in `value`, also for a symbol that an older library does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import pynvml

from gpudock_server.adapters.host.processes import process_name
from gpudock_server.model.gpu import Gpu, GpuHealth, GpuProcess, MigMode

T = TypeVar("T")
# An opaque pointer to a GPU; valid until nvmlShutdown.
Handle = Any

# Errors that mean "not available on this GPU or driver, or for this caller"; they do not affect the health.
_NOT_OFFERED: Final = frozenset({
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_NOT_FOUND,
    pynvml.NVML_ERROR_NO_DATA,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_INSUFFICIENT_SIZE,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    pynvml.NVML_ERROR_DEPRECATED,
})  # fmt: skip
_RECOVERY_ACTIONS: Final = {
    pynvml.NVML_GPU_RECOVERY_ACTION_GPU_RESET: "reset the GPU",
    pynvml.NVML_GPU_RECOVERY_ACTION_NODE_REBOOT: "reboot the node",
    pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_P2P: "stop the processes that use peer-to-peer access",
    pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET: "drain and reset the GPU",
}


class GpuLostError(Exception):
    """The driver reports that a GPU fell off the bus."""


@dataclass
class _Queries:
    """Queries one GPU; collects errors that affect its health instead of raising them."""

    handle: Handle
    query_errors: list[str] = field(default_factory=list)

    def ask(self, query: Callable[..., T], *arguments: object) -> T | None:
        """Return the result of a query; None if it failed. Raises GpuLostError."""
        try:
            return query(self.handle, *arguments)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
                raise GpuLostError(str(error)) from error
            if error.value not in _NOT_OFFERED:
                self.query_errors.append(f"{query.__name__}: {error}")
            return None


def machine_versions() -> tuple[str, str, str]:
    """Return the versions of the driver, of NVML, and of CUDA that the driver supports; empty if not available."""
    cuda = _text(pynvml.nvmlSystemGetCudaDriverVersion_v2)
    return (
        _text(pynvml.nvmlSystemGetDriverVersion),
        _text(pynvml.nvmlSystemGetNVMLVersion),
        f"{int(cuda) // 1000}.{int(cuda) % 1000 // 10}" if cuda else "",
    )


def _text(query: Callable[[], object]) -> str:
    with suppress(pynvml.NVMLError):
        return str(query())
    return ""


def gpu_handles() -> Iterator[tuple[int, Handle | str]]:
    """Iterate over index and handle of all GPUs; an error text replaces a missing handle. Raises NVMLError."""
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            yield index, pynvml.nvmlDeviceGetHandleByIndex(index)
        except pynvml.NVMLError as error:
            yield index, str(error)


def gpu_uuid(handle: Handle) -> str:
    """Return the UUID, as in GPU-5d1c…. Raises NVMLError, also if the GPU is lost."""
    return str(pynvml.nvmlDeviceGetUUID(handle))


def read_gpu(handle: Handle, uuid: str, index: int) -> Gpu:
    """Read all data of a GPU. Raises GpuLostError."""
    queries = _Queries(handle)
    ask = queries.ask
    memory: Any = ask(pynvml.nvmlDeviceGetMemoryInfo)
    utilization: Any = ask(pynvml.nvmlDeviceGetUtilizationRates)
    pci: Any = ask(pynvml.nvmlDeviceGetPciInfo)
    gpu = Gpu(
        uuid=uuid,
        index=index,
        minor_number=ask(pynvml.nvmlDeviceGetMinorNumber),
        name=ask(pynvml.nvmlDeviceGetName) or "",
        pci_bus_id=_pci_text(pci.busId) if pci else "",
        memory_total_bytes=memory.total if memory else 0,
        memory_used_bytes=memory.used if memory else 0,
        utilization_percent=utilization.gpu if utilization else None,
        temperature_celsius=ask(pynvml.nvmlDeviceGetTemperature, pynvml.NVML_TEMPERATURE_GPU),
        power_milliwatts=ask(pynvml.nvmlDeviceGetPowerUsage),
        mig_mode=_mig_mode(queries),
        processes=_processes(queries),
    )
    problems = [*_recovery_problems(queries), *queries.query_errors]
    if not problems:
        return gpu
    return gpu.model_copy(update={"health": GpuHealth.UNHEALTHY, "health_message": "; ".join(problems)})


def _pci_text(bus_id: str | bytes) -> str:
    return bus_id.decode("ascii", "replace") if isinstance(bus_id, bytes) else bus_id


def _mig_mode(queries: _Queries) -> MigMode:
    answer = queries.ask(pynvml.nvmlDeviceGetMigMode)
    if answer is None:
        return MigMode.UNSUPPORTED
    current, _pending = answer
    return MigMode.ENABLED if current == pynvml.NVML_DEVICE_MIG_ENABLE else MigMode.DISABLED


def _recovery_problems(queries: _Queries) -> list[str]:
    """Return the recovery action that the driver requests (field NVML_FI_DEV_GET_GPU_RECOVERY_ACTION).

    Unlike observed XIDs it survives a restart of the daemon. Source: NVIDIA, "GPU Memory Error Management", "Recovery
    action flag".
    """
    values: Any = queries.ask(pynvml.nvmlDeviceGetFieldValues, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if not values or values[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return []
    action = int(values[0].value.uiVal)
    if action == pynvml.NVML_GPU_RECOVERY_ACTION_NONE:
        return []
    return [f"the driver requests recovery: {_RECOVERY_ACTIONS.get(action, f'action {action}')}"]


def _processes(queries: _Queries) -> tuple[GpuProcess, ...]:
    """Return the processes of a GPU; one that computes and draws appears once."""
    found: dict[int, GpuProcess] = {}
    for query in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
        for process in queries.ask(query) or []:
            used = None if process.usedGpuMemory is None else int(process.usedGpuMemory)
            pid = int(process.pid)
            found.setdefault(pid, GpuProcess(pid=pid, name=process_name(pid), used_memory_bytes=used))
    return tuple(found[pid] for pid in sorted(found))
