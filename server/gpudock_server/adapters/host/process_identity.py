"""Identify processes uniquely, although the kernel reuses pids."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
# Fields of /proc/<pid>/stat after the program's name, which may contain spaces and parentheses: proc(5).
_STATE, _START_TICKS = 0, 19
_DEAD = frozenset("ZXx")


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """The unique identity of a process.

    `boot_id` is the boot id of the kernel and the PID namespace, in which `pid` is valid. `start_ticks` is the start
    time in clock ticks after the boot; a process that reuses the pid has another.
    """

    boot_id: str
    pid: int
    start_ticks: int

    def is_gone(self) -> bool:
        """Whether the process has certainly ended; False if that is unknown, as for a process of another host."""
        if self.boot_id != _boot_id():
            return False
        fields = _stat(self.pid)
        return fields is None or fields[_STATE] in _DEAD or int(fields[_START_TICKS]) != self.start_ticks


def this_process() -> ProcessIdentity:
    """Return the identity of this process. Raises OSError without /proc."""
    return identify(os.getpid())


def identify(pid: int) -> ProcessIdentity:
    """Return the identity of the process that has `pid` now. Raises ProcessLookupError."""
    fields = _stat(pid)
    if fields is None:
        raise ProcessLookupError(pid)
    return ProcessIdentity(_boot_id(), pid, int(fields[_START_TICKS]))


def _boot_id() -> str:
    namespace = (_PROC / "self/ns/pid").stat().st_ino
    return f"{(_PROC / 'sys/kernel/random/boot_id').read_text().strip()}/{namespace}"


def _stat(pid: int) -> list[str] | None:
    try:
        return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
