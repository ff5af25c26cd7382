"""The terminal and the standard streams that the command itself has."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import sys
import termios
import threading
import tty
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from gpudock import ExecSession

_READ_BYTES = 64 * 1024


@contextmanager
def raw_mode(fd: int) -> Iterator[None]:
    """Hand every key to the program at the other side, Ctrl-C too; afterwards the terminal is as it was."""
    before = termios.tcgetattr(fd)
    # What was typed ahead is kept.
    tty.setraw(fd, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def terminal_size() -> tuple[int, int] | None:
    """Columns and rows of the terminal that output goes to; None if it goes somewhere else."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return None
    return (size.columns, size.lines) if size.columns and size.lines else None


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`; waits while whoever reads it is slow."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


class StdinPump(threading.Thread):
    """Sends stdin to a session, no faster than it is taken.

    A thread, since files and terminals cannot be awaited; a daemon, since nothing ends a read but input.
    """

    def __init__(self, fd: int, session: ExecSession, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is the one that the session lives in."""
        super().__init__(name="gpudock-stdin", daemon=True)
        self._fd = fd
        self._session = session
        self._loop = loop

    def run(self) -> None:
        """Read to the end of input, or of the command."""
        while data := self._read():
            if not self._run_in_loop(self._session.write(data)):
                return
        self._run_in_loop(self._session.close_stdin())

    def _read(self) -> bytes:
        try:
            return os.read(self._fd, _READ_BYTES)
        except OSError:  # the terminal was hung up
            return b""

    def _run_in_loop(self, sending: Coroutine[Any, Any, None]) -> bool:
        """Whether it was taken; not so when the command has ended."""
        try:
            asyncio.run_coroutine_threadsafe(sending, self._loop).result()
        except (BrokenPipeError, concurrent.futures.CancelledError, RuntimeError):
            sending.close()
            return False
        return True
