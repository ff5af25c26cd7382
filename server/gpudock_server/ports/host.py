"""GPUs, ports, processes, memory and disk space of the host."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from typing import Protocol

from gpudock_server.model.gpu import GpuReport


class GpuInventory(Protocol):
    """The GPUs of this host. Raises nothing: without a driver the report has no GPUs."""

    async def snapshot(self) -> GpuReport:
        """Return the GPUs with their current telemetry."""
        ...


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """The filesystem of a path; sizes are None where this process cannot see the path."""

    path: str
    total_bytes: int | None
    free_bytes: int | None


class HostUsage(Protocol):
    """The memory and the disk space of this host."""

    async def memory_available_bytes(self) -> int:
        """Return the memory that can be used without swapping; 0 if unknown."""
        ...

    async def disk(self, path: str) -> DiskUsage:
        """Return the space of the filesystem of `path`."""
        ...


class PortProbe(Protocol):
    """Checks whether a host port is free."""

    def __call__(self, protocol: str, port: int) -> Awaitable[bool]:
        """Return whether the port can be bound now."""
        ...


class ProcessControl(Protocol):
    """Signals processes in containers by the pid that the engine reports."""

    def alive(self, pid: int, engine_id: str) -> bool:
        """Whether `pid` is a running process of that container."""
        ...

    def has_begun(self, pid: int, engine_id: str) -> bool:
        """Whether `pid`, which the engine started for a program, executes that program; also true if it is gone."""
        ...

    def signal(self, pid: int, engine_id: str, signal_number: int, *, session: bool = False) -> bool:
        """Signal a process, or its whole session; False if it does not exist or belongs to another container."""
        ...
