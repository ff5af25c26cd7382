"""Receives a bulk transfer in a thread, block by block."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

# Short enough that a socket's buffer (208 KiB) does not fill up at any rate measured with an engine.
_GATHER_SLEEP_SECONDS = 0.0002


class ReceiveThread:
    """Fills blocks from a socket, in the order in which they are given.

    The event loop is woken only for whole blocks, and the thread sleeps between reads: being woken for each piece costs
    both more than the piece itself. The socket must be in blocking mode with SO_RCVTIMEO, which limits how long the
    thread waits for data.
    """

    def __init__(self, source: socket.socket, filled: Callable[[int | None], None]) -> None:
        """`filled` is called in the event loop once for each block, with the number of bytes received.

        It is 0 at the end of the stream and None if none arrived; fewer than the block's size means a timeout.
        """
        self._source = source
        self._filled = filled
        self._loop = asyncio.get_running_loop()
        self._blocks: SimpleQueue[memoryview | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def fill(self, block: memoryview) -> None:
        """Fill `block`, which must not be touched until `filled` is called."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="exec-receive", daemon=True)
            self._thread.start()
        self._blocks.put(block)

    def close(self) -> None:
        """Stop the thread. The socket must be shut down before, so that this does not wait for data."""
        if self._thread is not None:
            self._blocks.put(None)
            self._thread.join()

    def _run(self) -> None:
        in_bulk = True
        while (block := self._blocks.get()) is not None:
            # A block that is not full ends the bulk transfer; the next block is then returned at once without data.
            count = self._receive(block) if in_bulk else None
            in_bulk = count is None or count == len(block)
            # The event loop may be closed already.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._filled, count)

    def _receive(self, block: memoryview) -> int | None:
        received = 0
        while received < len(block):
            try:
                count = self._source.recv_into(block[received:])
            except BlockingIOError:
                return received or None
            except OSError:
                # The engine resets the connection if it has not read all input: that is a normal end.
                count = 0
            if not count:
                break
            received += count
            if received < len(block):
                # Not a wait for an event: data gathers in the socket, so that one wake-up reads many pieces.
                time.sleep(_GATHER_SLEEP_SECONDS)
        return received
