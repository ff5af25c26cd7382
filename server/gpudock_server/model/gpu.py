"""GPUs as the driver reports them."""

from __future__ import annotations

from enum import StrEnum

from gpudock_server.model.record import Record


class GpuHealth(StrEnum):
    """UNHEALTHY: the driver reported an error that needs an operator. LOST: the GPU fell off the bus."""

    HEALTHY = "HEALTHY"
    UNHEALTHY = "UNHEALTHY"
    LOST = "LOST"


class MigMode(StrEnum):
    """Multi-Instance GPU: whether the GPU is partitioned. UNSUPPORTED: the GPU has no such mode."""

    UNSUPPORTED = "UNSUPPORTED"
    DISABLED = "DISABLED"
    ENABLED = "ENABLED"


class GpuProcess(Record):
    """A process that uses a GPU; `pid` is that of the host. `used_memory_bytes` is None if it is not reported."""

    pid: int
    name: str
    used_memory_bytes: int | None = None


class Gpu(Record):
    """One GPU. Fields that its driver does not report are None."""

    uuid: str
    index: int
    minor_number: int | None = None
    name: str = ""
    pci_bus_id: str = ""
    memory_total_bytes: int = 0
    memory_used_bytes: int = 0
    utilization_percent: int | None = None
    temperature_celsius: int | None = None
    power_milliwatts: int | None = None
    mig_mode: MigMode = MigMode.UNSUPPORTED
    health: GpuHealth = GpuHealth.HEALTHY
    health_message: str = ""
    processes: tuple[GpuProcess, ...] = ()

    @property
    def schedulable(self) -> bool:
        """Whether the GPU can be allocated."""
        return self.health is GpuHealth.HEALTHY and self.mig_mode is not MigMode.ENABLED


class GpuReport(Record):
    """The inventory at one moment. Without a driver it has no GPUs, and `message` says why."""

    gpus: tuple[Gpu, ...] = ()
    driver_version: str = ""
    nvml_version: str = ""
    cuda_driver_version: str = ""
    message: str = ""
