"""ports.ProcessControl on this host's /proc: for an engine that runs here, not for one behind TCP elsewhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
# Between two looks at the process table a session may have forked; it cannot win for ever against SIGKILL.
_KILL_ROUNDS: Final = 10
# Where in /proc/PID/stat, counted from the state (field 3 of proc(5)), the session and the kernel's flags stand.
_SESSION: Final = 3
_FLAGS: Final = 6
# PF_FORKNOEXEC of linux/sched.h: forked, and has not executed a program since.
_FORKED: Final = 0x40
_DEAD: Final = frozenset({b"Z", b"X", b"x"})


class LocalProcesses:
    """Implements ports.ProcessControl.

    A pid is only a number: the process that had it may be gone and another may have it. So each is pinned by a
    pidfd first, then looked at, and signalled through the pidfd. Only processes whose control group names the engine
    container are touched. Reads /proc, a fraction of a millisecond a process; raises nothing.
    """

    def alive(self, pid: int, engine_id: str) -> bool:
        """Whether `pid` is a living process of that container; a zombie is not."""
        with _pinned(pid) as pidfd:
            return pidfd is not None and _lives(pid, engine_id)

    def begun(self, pid: int, engine_id: str) -> bool:
        """Whether `pid`, which was started to execute a program, no longer executes the container runtime.

        runc's process, which turns into the program at the last moment, ignores most signals. True as well for one
        that is gone, or not of that container.
        """
        with _pinned(pid) as pidfd:
            if pidfd is None or not _lives(pid, engine_id):
                return True
            return not any(int(flags) & _FORKED for flags in _fields(pid)[_FLAGS : _FLAGS + 1])

    def signal(self, pid: int, engine_id: str, signal_number: int, *, session: bool = False) -> bool:
        """Send a signal to `pid`, or with `session` to every process of the container in the session that `pid` leads.

        The leader itself may be gone already. False when nothing was signalled: not there, not that container's, or
        not ours to signal; signal 0 only asks. SIGKILL to a session is repeated until no process of it is left that
        has not been sent it.
        """
        if not session:
            return _send(pid, engine_id, signal_number)
        sent: set[int] = set()
        for _ in range(_KILL_ROUNDS if signal_number == signal.SIGKILL else 1):
            # The leader first: a shell whose child is killed before it would go on to its next line.
            members = sorted(_members(pid) - sent, key=lambda member: member != pid)
            found = {member for member in members if _send(member, engine_id, signal_number)}
            if not found:
                break
            sent |= found
        return bool(sent)


def _send(pid: int, engine_id: str, signal_number: int) -> bool:
    with _pinned(pid) as pidfd:
        if pidfd is None or not _lives(pid, engine_id):
            return False
        try:
            signal.pidfd_send_signal(pidfd, signal_number)
        except (ProcessLookupError, PermissionError):
            return False
        return True


@contextmanager
def _pinned(pid: int) -> Iterator[int | None]:
    """A descriptor that names the process `pid` is now, and never a later one; None when there is none."""
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, OverflowError):
        # Gone, or no number that a process can have.
        yield None
        return
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _lives(pid: int, engine_id: str) -> bool:
    """Whether the control group of `pid` is the container's, whichever driver and version name it, and it is alive.

    A zombie takes signals and heeds none; a container whose first process reaps nobody is full of them.
    """
    return bool(engine_id) and engine_id.encode() in _read(pid, "cgroup") and _state(pid) not in _DEAD


def _members(session: int) -> set[int]:
    """All processes of a session. Its number is not given to another while one of them lives."""
    pids = (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())
    wanted = str(session).encode()
    return {pid for pid in pids if _fields(pid)[_SESSION : _SESSION + 1] == [wanted]}


def _state(pid: int) -> bytes:
    return next(iter(_fields(pid)), b"X")


def _fields(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat from the third on; empty when it is gone."""
    # The second is the program's name in parentheses, which may itself contain blanks and parentheses.
    return _read(pid, "stat").rpartition(b")")[2].split()


def _read(pid: int, name: str) -> bytes:
    try:
        return (_PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""
