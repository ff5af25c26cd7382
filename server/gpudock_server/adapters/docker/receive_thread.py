"""A flow of bytes, received block by block in a thread, one block ahead of whoever takes them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

# Seconds. In so much time a socket's buffer (208 KiB) is far from full at any pace that an engine has been seen at.
_GATHER_SLEEP_SECONDS = 0.0002


class ReceiveThread:
    """Fills blocks from a socket, in the order in which they are given.

    The loop hears of whole blocks only, and the thread takes what has gathered in the kernel now and then: to be woken
    for each piece costs both sides more than the piece. The socket must be blocking, with a limit of time
    (SO_RCVTIMEO), which is how long the thread waits for what is to come.
    """

    def __init__(self, source: socket.socket, filled: Callable[[int | None], None]) -> None:
        """`filled` is called in the loop, once for each block: with how many bytes came, 0 at the end, None for none.

        Fewer than asked for says that the time was over.
        """
        self._source = source
        self._filled = filled
        self._loop = asyncio.get_running_loop()
        self._blocks: SimpleQueue[memoryview | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def fill(self, block: memoryview) -> None:
        """Fill `block`, which nobody else touches until it is told."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="flow", daemon=True)
            self._thread.start()
        self._blocks.put(block)

    def close(self) -> None:
        """End the thread. The socket must have been shut down, so that this does not wait for anything to come."""
        if self._thread is not None:
            self._blocks.put(None)
            self._thread.join()

    def _run(self) -> None:
        lasts = True
        while (block := self._blocks.get()) is not None:
            # What comes alone is not to wait here: behind a block that came short, the next is given back at once.
            count = self._receive(block) if lasts else None
            lasts = count is None or count == len(block)
            # Of a loop that has ended, nobody waits for it.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._filled, count)

    def _receive(self, block: memoryview) -> int | None:
        came = 0
        while came < len(block):
            try:
                count = self._source.recv_into(block[came:])
            except BlockingIOError:
                return came or None
            except OSError:
                # A reset is an end like any other: it is how an engine hangs up on input that nobody has read.
                count = 0
            if not count:
                break
            came += count
            if came < len(block):
                # Not to wait for anything, but to let more come: whoever sleeps in the receive is woken for each piece.
                time.sleep(_GATHER_SLEEP_SECONDS)
        return came
