"""Processes of this host, found in /proc; ports.ProcessControl for an engine on this host, not for one behind TCP."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_PROC: Final = Path("/proc")
# A session may fork while the process table is read; against SIGKILL that ends after a few rounds.
_MAX_KILL_ROUNDS: Final = 10
# Index of the session in /proc/PID/stat, counted from the state (field 3 in proc(5)).
_SESSION: Final = 3
_FLAGS: Final = 6
# PF_FORKNOEXEC of linux/sched.h: forked, and has executed no program since.
_FORKED: Final = 0x40
_DEAD: Final = frozenset({b"Z", b"X", b"x"})


class HostProcessControl:
    """Implements ports.ProcessControl.

    Pids are reused, so each process is first pinned with a pidfd, then checked, then signalled through the pidfd. Only
    processes whose control group names the engine container are signalled. Reads /proc, which takes a fraction of a
    millisecond per process. Raises nothing.
    """

    def alive(self, pid: int, engine_id: str) -> bool:
        """Whether `pid` is a running process of that container; zombies do not count."""
        with _open_pidfd(pid) as pidfd:
            return pidfd is not None and _is_alive_in(pid, engine_id)

    def has_begun(self, pid: int, engine_id: str) -> bool:
        """Whether `pid`, which the engine started for a program, no longer executes the container runtime.

        Until runc's process executes the program, it ignores most signals. Also true if `pid` does not exist or belongs
        to another container.
        """
        with _open_pidfd(pid) as pidfd:
            if pidfd is None or not _is_alive_in(pid, engine_id):
                return True
            return not any(int(flags) & _FORKED for flags in _stat_fields(pid)[_FLAGS : _FLAGS + 1])

    def signal(self, pid: int, engine_id: str, signal_number: int, *, session: bool = False) -> bool:
        """Send a signal to `pid`, or with `session` to all processes of the container in the session that `pid` leads.

        The leader may have ended already. False if no process was signalled: it does not exist, belongs to another
        container, or may not be signalled. Signal 0 only checks. SIGKILL to a session is repeated until all its
        processes have received it.
        """
        if not session:
            return _send(pid, engine_id, signal_number)
        sent: set[int] = set()
        for _ in range(_MAX_KILL_ROUNDS if signal_number == signal.SIGKILL else 1):
            # The leader first: a shell whose child is killed before it would execute its next line.
            members = sorted(_session_pids(pid) - sent, key=lambda member: member != pid)
            found = {member for member in members if _send(member, engine_id, signal_number)}
            if not found:
                break
            sent |= found
        return bool(sent)


def _send(pid: int, engine_id: str, signal_number: int) -> bool:
    with _open_pidfd(pid) as pidfd:
        if pidfd is None or not _is_alive_in(pid, engine_id):
            return False
        try:
            signal.pidfd_send_signal(pidfd, signal_number)
        except (ProcessLookupError, PermissionError):
            return False
        return True


def processes_in(folder: int, program: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """Yield pid and pidfd of each process in the open folder `folder` whose program's file name matches `program`.

    A process is in a folder if that is its working directory. The caller closes the pidfd.
    """
    here = os.fstat(folder)
    for pid in _all_pids():
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        # Read after the pidfd is open, so that the process cannot be a later one with the same pid.
        if _runs_in(here, program, pid):
            yield pid, pidfd
        else:
            os.close(pidfd)


def _runs_in(folder: os.stat_result, program: re.Pattern[str], pid: int) -> bool:
    process = _PROC / str(pid)
    try:
        directory, name = (process / "cwd").stat(), (process / "exe").readlink().name
    except OSError:
        return False
    return os.path.samestat(folder, directory) and program.match(name) is not None


def process_name(pid: int) -> str:
    """Return the kernel's name of a process (proc(5), comm); empty if it has ended."""
    return _read(pid, "comm").decode(errors="replace").strip()


@contextmanager
def _open_pidfd(pid: int) -> Iterator[int | None]:
    """Open a descriptor of the process that has `pid` now, and never of a later one; None if there is none."""
    try:
        pidfd = os.pidfd_open(pid)
    except (OSError, OverflowError):
        # The process has ended, or the number is not a valid pid.
        yield None
        return
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _is_alive_in(pid: int, engine_id: str) -> bool:
    """Whether `pid` is alive and in the control group of the container, with any cgroup driver and version.

    Zombies do not count: they accept signals but do not react. A container whose init does not reap has many of them.
    """
    return bool(engine_id) and engine_id.encode() in _read(pid, "cgroup") and _state(pid) not in _DEAD


def _session_pids(session: int) -> set[int]:
    """Return all pids of a session. The session id is not reused while one of its processes lives."""
    session_field = str(session).encode()
    return {pid for pid in _all_pids() if _stat_fields(pid)[_SESSION : _SESSION + 1] == [session_field]}


def _all_pids() -> Iterator[int]:
    return (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())


def _state(pid: int) -> bytes:
    return next(iter(_stat_fields(pid)), b"X")


def _stat_fields(pid: int) -> list[bytes]:
    """Return the fields of /proc/PID/stat from the third on; empty if the process does not exist."""
    # The second field is the program's name in parentheses, which may contain blanks and parentheses.
    return _read(pid, "stat").rpartition(b")")[2].split()


def _read(pid: int, name: str) -> bytes:
    try:
        return (_PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""
