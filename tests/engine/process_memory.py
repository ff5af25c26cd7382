"""The memory of a process of the host."""

from __future__ import annotations

from pathlib import Path


def memory(pid: int, field: str) -> int:
    """Bytes of a field of /proc/PID/status: VmRSS, the current size, or VmHWM, the peak since `reset_peak`."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def reset_peak(pid: int) -> int:
    """Reset the peak memory of a process (proc(5), clear_refs); its current size in bytes."""
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")
    return memory(pid, "VmRSS")
