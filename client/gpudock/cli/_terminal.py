"""The terminal and the standard streams of the command."""

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
    """Put the terminal into raw mode, so that Ctrl-C is sent like any key; restore it afterwards."""
    before = termios.tcgetattr(fd)
    # TCSADRAIN keeps what was typed ahead.
    tty.setraw(fd, termios.TCSADRAIN)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def terminal_size() -> tuple[int, int] | None:
    """Return columns and rows of the terminal at stdout; None if stdout is no terminal."""
    try:
        size = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return None
    return (size.columns, size.lines) if size.columns and size.lines else None


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`; blocks while the reader is slow."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


class StdinPump(threading.Thread):
    """Sends stdin to an exec session, no faster than the session accepts it.

    It is a thread because asyncio cannot await files and terminals, and a daemon thread because only input ends a read.
    """

    def __init__(self, fd: int, session: ExecSession, loop: asyncio.AbstractEventLoop) -> None:
        """`loop` is the event loop of the session."""
        super().__init__(name="gpudock-stdin", daemon=True)
        self._fd = fd
        self._session = session
        self._loop = loop

    def run(self) -> None:
        """Read until the input or the command ends."""
        while data := self._read():
            if not self._run_in_loop(self._session.write(data)):
                return
        self._run_in_loop(self._session.close_stdin())

    def _read(self) -> bytes:
        try:
            return os.read(self._fd, _READ_BYTES)
        except OSError:  # the terminal was closed
            return b""

    def _run_in_loop(self, sending: Coroutine[Any, Any, None]) -> bool:
        """Return whether the session accepted it; False once the command has ended."""
        try:
            asyncio.run_coroutine_threadsafe(sending, self._loop).result()
        except (BrokenPipeError, concurrent.futures.CancelledError, RuntimeError):
            sending.close()
            return False
        return True
