"""Blocking reads of one card and of the machine, through pynvml, in the model's words.

Everything here may block for as long as the driver likes and belongs in the driver's own thread. Names and meanings are
those of nvml.h; pynvml raises NVMLError with the code in `value`, also for a symbol that an older library lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

import pynvml

from gpudock_server.model.gpu import Gpu, GpuHealth, GpuProcess, MigMode

T = TypeVar("T")
# An opaque pointer to a card; valid until nvmlShutdown.
Handle = Any

# Answers that mean "this card, driver or caller does not have that", and nothing about the card's health.
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
    pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_P2P: "end the processes that use it peer to peer",
    pynvml.NVML_GPU_RECOVERY_ACTION_DRAIN_AND_RESET: "drain and reset the GPU",
}


class GpuLostError(Exception):
    """The driver says that a card is gone from the bus."""


@dataclass
class _Queries:
    """Asks one card; remembers the answers that speak of a sick card instead of raising them."""

    handle: Handle
    query_errors: list[str] = field(default_factory=list)

    def ask(self, query: Callable[..., T], *arguments: object) -> T | None:
        """An answer, None where there is none. Raises GpuLostError."""
        try:
            return query(self.handle, *arguments)
        except pynvml.NVMLError as error:
            if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
                raise GpuLostError(str(error)) from error
            if error.value not in _NOT_OFFERED:
                self.query_errors.append(f"{query.__name__}: {error}")
            return None


def machine_versions() -> tuple[str, str, str]:
    """Versions of the driver, of NVML, and the newest CUDA that the driver serves; empty where not offered."""
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
    """Index and handle of every card; a text instead of a handle that could not be had. Raises NVMLError."""
    for index in range(pynvml.nvmlDeviceGetCount()):
        try:
            yield index, pynvml.nvmlDeviceGetHandleByIndex(index)
        except pynvml.NVMLError as error:
            yield index, str(error)


def gpu_uuid(handle: Handle) -> str:
    """The card's UUID, as in GPU-5d1c…. Raises NVMLError, also when the card is lost."""
    return str(pynvml.nvmlDeviceGetUUID(handle))


def read_gpu(handle: Handle, uuid: str, index: int) -> Gpu:
    """Everything that the card tells of itself. Raises GpuLostError."""
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
    """What the driver wants done before the card is used again (field NVML_FI_DEV_GET_GPU_RECOVERY_ACTION).

    It outlives the daemon, unlike what was seen of XIDs. NVIDIA, "GPU Memory Error Management", "Recovery action flag".
    """
    values: Any = queries.ask(pynvml.nvmlDeviceGetFieldValues, [pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION])
    if not values or values[0].nvmlReturn != pynvml.NVML_SUCCESS:
        return []
    action = int(values[0].value.uiVal)
    if action == pynvml.NVML_GPU_RECOVERY_ACTION_NONE:
        return []
    return [f"the driver asks for recovery: {_RECOVERY_ACTIONS.get(action, f'action {action}')}"]


def _processes(queries: _Queries) -> tuple[GpuProcess, ...]:
    """Every process once, though it may both compute and draw."""
    found: dict[int, GpuProcess] = {}
    for query in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
        for process in queries.ask(query) or []:
            used = None if process.usedGpuMemory is None else int(process.usedGpuMemory)
            pid = int(process.pid)
            found.setdefault(pid, GpuProcess(pid=pid, name=_process_name(pid), used_memory_bytes=used))
    return tuple(found[pid] for pid in sorted(found))


def _process_name(pid: int) -> str:
    """The kernel's name of a process (proc(5), comm); empty when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_bytes().decode(errors="replace").strip()
    return ""
