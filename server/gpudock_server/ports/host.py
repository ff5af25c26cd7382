"""What else the host has: cards, ports and processes."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Protocol

from gpudock_server.model.gpu import GpuSnapshot


class GpuInventory(Protocol):
    """The cards of this host. Raises nothing: a driver that is missing or dies is a snapshot without cards."""

    async def snapshot(self) -> GpuSnapshot:
        """The cards with their telemetry, as of now."""
        ...


class PortProbe(Protocol):
    """Tells whether a host port can be bound right now."""

    def __call__(self, protocol: str, port: int) -> Awaitable[bool]:
        """True when nothing listens on it."""
        ...


class ProcessControl(Protocol):
    """Signals to processes inside containers, by the pid that the engine shows for them."""

    def alive(self, pid: int, engine_id: str) -> bool:
        """Whether `pid` is a living process of that container."""
        ...

    def begun(self, pid: int, engine_id: str) -> bool:
        """Whether `pid`, which the engine started for a program, executes it; true as well once it is gone."""
        ...

    def signal(self, pid: int, engine_id: str, signal_number: int, *, session: bool = False) -> bool:
        """Send a signal to a process, or to its whole session; False when it is not there or not that container's."""
        ...
