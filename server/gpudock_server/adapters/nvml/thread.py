"""One thread that makes the driver's blocking calls, and that nobody has to wait for."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class DriverThread:
    """Runs calls one after another.

    Not a ThreadPoolExecutor: Python joins an executor's threads at exit, and a driver that hangs would then keep the
    daemon from ending. This thread is a daemon thread, which is left behind instead.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to run calls."""
        self._thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Have `call` run after those before it; the future cannot be cancelled."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - whoever waits for the future gets it
                future.set_exception(error)
            else:
                future.set_result(result)

        self._calls.put(run)
        return future

    def end(self) -> None:
        """End after the calls that were submitted; does not wait."""
        self._calls.put(None)

    def join(self, timeout_seconds: float) -> None:
        """Wait until it has ended."""
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
