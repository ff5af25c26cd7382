"""GpuInventory over NVML: never blocks the event loop, never hangs, never raises."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

import structlog

from gpudock_server.adapters.nvml.session import DriverUnavailableError, NvmlSession, unhealthy
from gpudock_server.model.gpu import GpuReport
from gpudock_server.ports import GpuInventory

T = TypeVar("T")

_log = structlog.get_logger(__name__)
_CLOSE_SECONDS = 1.0


class NvmlInventory(GpuInventory):
    """The cards that the NVIDIA driver shows.

    - A snapshot is at most `cache_seconds` old, and never older than the last XID; 100 callers at once share one read.
    - A driver that does not answer within `timeout_seconds` gives the last known cards, all UNHEALTHY.
    - Without a driver there are no cards; it is looked for again every `retry_seconds`.

    `start` first, `close` at last; both may be awaited in any state.
    """

    def __init__(
        self, *, timeout_seconds: float = 5.0, cache_seconds: float = 1.0, retry_seconds: float = 10.0
    ) -> None:
        self._timeout = timeout_seconds
        self._cache = cache_seconds
        self._retry = retry_seconds
        self._thread: DriverThread | None = None
        # Of the driver's thread alone:
        self._session: NvmlSession | None = None
        self._unavailable_reason = ""
        self._retried_at = float("-inf")
        # Of the event loop alone:
        self._reading: Future[tuple[GpuReport, int]] | None = None
        self._reading_since = 0.0
        self._last = GpuReport(message="the GPU inventory was not started")
        self._last_at = float("-inf")
        self._last_changes = -1

    async def start(self) -> None:
        """Look for the driver, and begin to listen for XIDs; returns after `timeout_seconds` at the latest."""
        if self._thread is None:
            self._thread = DriverThread("nvml")
            self._thread.start()
            await self.snapshot()

    async def close(self) -> None:
        """End the threads; one that hangs in the driver is left behind after a second."""
        thread, self._thread, self._reading = self._thread, None, None
        if thread is None:
            return
        closing = thread.submit(self._close_session)
        thread.end()
        with suppress(TimeoutError):
            await _result(closing, _CLOSE_SECONDS)
            thread.join(_CLOSE_SECONDS)  # it has nothing more to do

    async def snapshot(self) -> GpuReport:
        """The cards as of now; see the class."""
        if self._thread is None or self._fresh():
            return self._last
        reading = self._reading
        if reading is None:
            self._reading_since = time.monotonic()
            reading = self._reading = self._thread.submit(self._read)
        waited = time.monotonic() - self._reading_since
        try:
            snapshot, changes = await _result(reading, max(0.0, self._timeout - waited))
        except TimeoutError:
            return self._stale_snapshot()
        except Exception as error:  # noqa: BLE001 - a defect in here must not take down what works without cards
            _log.exception("gpu_inventory_failed")
            snapshot, changes = GpuReport(message=f"the GPU inventory failed: {error}"), -1
        if self._reading is reading:
            self._reading = None
            self._last, self._last_changes, self._last_at = snapshot, changes, time.monotonic()
        return snapshot

    def _fresh(self) -> bool:
        session = self._session
        changes = session.changes if session is not None else -1
        return time.monotonic() - self._last_at < self._cache and changes == self._last_changes

    def _stale_snapshot(self) -> GpuReport:
        message = f"the NVIDIA driver has not answered for {time.monotonic() - self._reading_since:.0f} s"
        return self._last.model_copy(
            update={"gpus": tuple(unhealthy(gpu, message) for gpu in self._last.gpus), "message": message}
        )

    # ---- in the driver's thread ----

    def _read(self) -> tuple[GpuReport, int]:
        """A snapshot, and the count of changes that it surely shows (-1 without a driver)."""
        session = self._session or self._open_session()
        if session is None:
            return GpuReport(message=self._unavailable_reason), -1
        changes = session.changes
        try:
            return session.read(), changes
        except DriverUnavailableError as error:
            _log.warning("gpu_driver_gone", error=str(error))
            self._unavailable_reason = str(error)
            self._close_session()
            return GpuReport(message=self._unavailable_reason), -1

    def _open_session(self) -> NvmlSession | None:
        if time.monotonic() - self._retried_at < self._retry:
            return None
        self._retried_at = time.monotonic()
        try:
            self._session = NvmlSession()
        except DriverUnavailableError as error:
            self._unavailable_reason = str(error)
        return self._session

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close(_CLOSE_SECONDS)


async def _result(future: Future[T], timeout_seconds: float) -> T:
    """The result of a call in another thread. Raises TimeoutError, and the call goes on."""
    if future.done():
        return future.result()
    waiting = asyncio.wrap_future(future)
    try:
        async with asyncio.timeout(timeout_seconds):
            return await asyncio.shield(waiting)
    finally:
        # The future itself is running and does not take notice; without this, a call that ends after the event loop
        # did would complain of it.
        waiting.cancel()


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
