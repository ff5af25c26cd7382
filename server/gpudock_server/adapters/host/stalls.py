"""Detect child processes that hang: they make no progress for some time.

A tenant can make a program wait forever, for example by replacing a file with a FIFO just before it is opened. The
total time of the work cannot be limited, because it depends on the size of a tree; its progress can be observed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

T = TypeVar("T")

_PROC: Final = Path("/proc")
DEFAULT_STALL_SECONDS: Final = 120.0
_SAMPLES: Final = 8
_MAX_SAMPLE_SECONDS: Final = 5.0
# Fields of /proc/PID/stat counted from the third: state, session, utime, stime (proc(5)).
_STATE, _SESSION, _USER_TIME, _SYSTEM_TIME = 0, 3, 11, 12
# Running, and waiting for a disk. A process that waits for a disk cannot be killed.
_BUSY: Final = frozenset({b"R", b"D"})
_COUNTERS: Final = (b"rchar:", b"wchar:", b"syscr:", b"syscw:")


class StalledError(Exception):
    """A program made no progress; the message names it and the time."""


async def fail_if_stalled(work: Awaitable[T], pid: int, name: str, seconds: float) -> T:
    """Await `work`, which is done by the processes of the session `pid`.

    Raises StalledError, after cancelling `work`, if no process of the session makes progress for `seconds`; the caller
    kills the processes. Progress is CPU time, bytes read or written (/proc/PID/stat and io), or waiting for a disk.
    """
    working = asyncio.ensure_future(work)
    watching = asyncio.create_task(_stalled(pid, seconds))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        raise StalledError(f"{name} made no progress for {seconds:.0f} s")
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.wait({working, watching})


async def _stalled(pid: int, seconds: float) -> None:
    """Return when the session has made no progress for `seconds`."""
    between = min(seconds / _SAMPLES, _MAX_SAMPLE_SECONDS)
    clock = asyncio.get_running_loop().time
    before: frozenset[tuple[bytes, ...]] | None = None
    since = clock()
    while clock() - since < seconds:
        await asyncio.sleep(between)
        now = await asyncio.to_thread(_activity, pid)
        if now is None or now != before:
            before, since = now, clock()


def _activity(session: int) -> frozenset[tuple[bytes, ...]] | None:
    """Return the progress counters of all processes of a session; None if one of them is busy."""
    found = set()
    for entry in _PROC.iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError):
            fields = (entry / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[_SESSION]) != session:
                continue
            if fields[_STATE] in _BUSY:
                return None
            counters = [line for line in (entry / "io").read_bytes().splitlines() if line.startswith(_COUNTERS)]
            found.add((entry.name.encode(), fields[_USER_TIME], fields[_SYSTEM_TIME], *counters))
    return frozenset(found)
