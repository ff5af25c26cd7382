"""Runs the `gpudock` command as a program of its own."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import sys
import termios
from typing import Any, NamedTuple

from tests.rig.patience import limit

DEADLINE = 60
"""Seconds after which a command hangs."""


class Ended(NamedTuple):
    """How a run of the command ended, and what it wrote."""

    code: int
    out: str
    err: str


async def spawn(address: str, *arguments: str, **streams: Any) -> asyncio.subprocess.Process:
    """Begin a run; what is not in `streams` is a pipe."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    command = (sys.executable, "-m", "gpudock.cli", "--address", address, *arguments)
    return await asyncio.create_subprocess_exec(*command, **(pipes | streams))


async def run(address: str, *arguments: str, given: bytes = b"") -> Ended:
    """Run it to its end, with `given` as its input."""
    return await ended(await spawn(address, *arguments), given)


async def ended(process: asyncio.subprocess.Process, given: bytes | None = None) -> Ended:
    """Wait for the end of a run."""
    out, err = await asyncio.wait_for(process.communicate(given), limit(DEADLINE))
    return Ended(process.returncode or 0, out.decode(), err.decode())


async def read_until(fd: int, mark: bytes) -> bytes:
    """What comes from a terminal, up to `mark` at least."""
    seen = b""
    async with asyncio.timeout(limit(DEADLINE)):
        while mark not in seen:
            seen += await asyncio.to_thread(os.read, fd, 1024)
    return seen


def set_size(fd: int, columns: int, rows: int) -> None:
    """Give a terminal a size."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
