"""Runs the `gpudock` command in a process of its own."""

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
"""Seconds after which a command counts as hung."""


class CommandResult(NamedTuple):
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


async def spawn(address: str, *arguments: str, **streams: Any) -> asyncio.subprocess.Process:
    """Start the command; streams that are not in `streams` are pipes."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), asyncio.subprocess.PIPE)
    command = (sys.executable, "-m", "gpudock.cli", "--address", address, *arguments)
    return await asyncio.create_subprocess_exec(*command, **(pipes | streams))


async def run(address: str, *arguments: str, stdin: bytes = b"") -> CommandResult:
    """Run the command with this stdin; return its result."""
    return await wait_for_result(await spawn(address, *arguments), stdin)


async def wait_for_result(process: asyncio.subprocess.Process, stdin: bytes | None = None) -> CommandResult:
    """Wait until the command exits; return its result."""
    out, err = await asyncio.wait_for(process.communicate(stdin), limit(DEADLINE))
    return CommandResult(process.returncode or 0, out.decode(), err.decode())


async def read_until(fd: int, mark: bytes) -> bytes:
    """Read from a terminal until `mark` was read; return everything that was read."""
    output = b""
    async with asyncio.timeout(limit(DEADLINE)):
        while mark not in output:
            output += await asyncio.to_thread(os.read, fd, 1024)
    return output


def set_size(fd: int, columns: int, rows: int) -> None:
    """Set the size of a terminal."""
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
