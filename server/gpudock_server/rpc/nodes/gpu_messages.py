"""Converts GPUs to messages."""

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
    """A GPU with its holder; values that the driver does not report are absent."""
    gpu: Gpu = held.gpu
    return gpu_pb2.Gpu(
        uuid=gpu.uuid,
        index=gpu.index,
        minor_number=gpu.minor_number,
        name=gpu.name,
        pci_bus_id=gpu.pci_bus_id,
        memory_total_bytes=gpu.memory_total_bytes,
        memory_used_bytes=gpu.memory_used_bytes,
        utilization_percent=gpu.utilization_percent,
        temperature_celsius=gpu.temperature_celsius,
        power_milliwatts=gpu.power_milliwatts,
        mig_mode=_MIG_MODES[gpu.mig_mode],
        health=HEALTHS[gpu.health],
        health_message=gpu.health_message,
        processes=[_process(process) for process in gpu.processes],
        container=held.holder.container if held.holder else "",
        schedulable=gpu.schedulable,
        unschedulable_reason=unavailable_reason(gpu),
    )


def _process(process: GpuProcess) -> gpu_pb2.GpuProcess:
    return gpu_pb2.GpuProcess(pid=process.pid, name=process.name, used_memory_bytes=process.used_memory_bytes)
