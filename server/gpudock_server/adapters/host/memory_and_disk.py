"""ports.HostUsage: the memory and the disk space of this host."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from gpudock_server.ports import DiskUsage

_BYTES_PER_KB = 1024


class LocalHostUsage:
    """Implements ports.HostUsage for the host of this process."""

    async def memory_available_bytes(self) -> int:
        """MemAvailable of /proc/meminfo, see proc(5)."""
        return await asyncio.to_thread(_memory_available_bytes)

    async def disk(self, path: str) -> DiskUsage:
        """The filesystem of `path`."""
        return await asyncio.to_thread(_disk, path)


def _memory_available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * _BYTES_PER_KB
    return 0


def _disk(path: str) -> DiskUsage:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return DiskUsage(path, None, None)
    return DiskUsage(path, usage.total, usage.free)
