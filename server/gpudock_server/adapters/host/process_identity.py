"""Which process it is, so that one that is gone is never taken for one that lives, nor the other way round."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
# Fields of /proc/<pid>/stat behind the name of the program, which may itself hold spaces and brackets: proc(5).
_STATE, _START_TICKS = 0, 19
_DEAD = frozenset("ZXx")


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, named once and for all.

    `boot_id` is the kernel's, followed by the PID namespace: a pid means something only there. `start_ticks` is when
    the process began, in clock ticks after the boot; a pid that was given out again has another.
    """

    boot_id: str
    pid: int
    start_ticks: int

    def is_gone(self) -> bool:
        """Whether it has certainly ended. False where that cannot be told, as for a process of another host."""
        if self.boot_id != _boot_id():
            return False
        fields = _stat(self.pid)
        return fields is None or fields[_STATE] in _DEAD or int(fields[_START_TICKS]) != self.start_ticks


def this_process() -> ProcessIdentity:
    """The process that asks. Raises OSError where there is no /proc."""
    return identify(os.getpid())


def identify(pid: int) -> ProcessIdentity:
    """The process that has this pid now. Raises ProcessLookupError."""
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
