"""Cards: what NVML shows of them, and who holds them."""

from __future__ import annotations

from gpudock.v1 import gpu_pb2

from gpudock_server.core.nodes import HeldGpu
from gpudock_server.core.placement.allocator import unavailable_reason
from gpudock_server.model.gpu import Gpu, GpuHealth, GpuProcess, MigMode

HEALTHS = {health: gpu_pb2.GpuHealth.Value(f"GPU_HEALTH_{health.name}") for health in GpuHealth}

_MIG_MODES = {
    MigMode.UNSUPPORTED: gpu_pb2.MIG_MODE_NOT_SUPPORTED,
    MigMode.DISABLED: gpu_pb2.MIG_MODE_DISABLED,
    MigMode.ENABLED: gpu_pb2.MIG_MODE_ENABLED,
}


def gpu_message(held: HeldGpu) -> gpu_pb2.Gpu:
    """A card with its holder; what its driver does not tell is absent."""
    card: Gpu = held.gpu
    return gpu_pb2.Gpu(
        uuid=card.uuid,
        index=card.index,
        minor_number=card.minor_number,
        name=card.name,
        pci_bus_id=card.pci_bus_id,
        memory_total_bytes=card.memory_total_bytes,
        memory_used_bytes=card.memory_used_bytes,
        utilization_percent=card.utilization_percent,
        temperature_celsius=card.temperature_celsius,
        power_milliwatts=card.power_milliwatts,
        mig_mode=_MIG_MODES[card.mig_mode],
        health=HEALTHS[card.health],
        health_message=card.health_message,
        processes=[_process(process) for process in card.processes],
        container=held.holder.container if held.holder else "",
        schedulable=card.schedulable,
        unschedulable_reason=unavailable_reason(card),
    )


def _process(process: GpuProcess) -> gpu_pb2.GpuProcess:
    return gpu_pb2.GpuProcess(pid=process.pid, name=process.name, used_memory_bytes=process.used_memory_bytes)
