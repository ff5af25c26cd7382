"""GpuInventory with NVML: never blocks the event loop, never hangs, never raises."""

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
    """The GPUs that the NVIDIA driver reports.

    - A report is at most `cache_seconds` old, and never older than the last XID; concurrent callers share one read.
    - If the driver does not answer within `timeout_seconds`, the last known GPUs are reported, all UNHEALTHY.
    - Without a driver there are no GPUs; loading it is retried every `retry_seconds`.

    `start` and `close` may be awaited in any state.
    """

    def __init__(
        self, *, timeout_seconds: float = 5.0, cache_seconds: float = 1.0, retry_seconds: float = 10.0
    ) -> None:
        self._timeout = timeout_seconds
        self._cache = cache_seconds
        self._retry = retry_seconds
        self._thread: DriverThread | None = None
        # Used by the driver thread only:
        self._session: NvmlSession | None = None
        self._unavailable_reason = ""
        self._retried_at = float("-inf")
        # Used by the event loop only:
        self._reading: Future[tuple[GpuReport, int]] | None = None
        self._reading_since = 0.0
        self._last = GpuReport(message="the GPU inventory is not started")
        self._last_at = float("-inf")
        self._last_changes = -1

    async def start(self) -> None:
        """Load the driver and listen for XIDs; returns after at most `timeout_seconds`."""
        if self._thread is None:
            self._thread = DriverThread("nvml")
            self._thread.start()
            await self.snapshot()

    async def close(self) -> None:
        """End the threads; a thread that hangs in the driver is abandoned after a second."""
        thread, self._thread, self._reading = self._thread, None, None
        if thread is None:
            return
        closing = thread.submit(self._close_session)
        thread.end()
        with suppress(TimeoutError):
            await _result(closing, _CLOSE_SECONDS)
            thread.join(_CLOSE_SECONDS)  # it has nothing left to do

    async def snapshot(self) -> GpuReport:
        """Return the current GPUs; see the class."""
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
        except Exception as error:  # noqa: BLE001 - a defect here must not break what works without GPUs
            _log.exception("GPU inventory failed")
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

    # ---- in the driver thread ----

    def _read(self) -> tuple[GpuReport, int]:
        """Read the GPUs; returns the report and the number of changes that it includes (-1 without a driver)."""
        session = self._session or self._open_session()
        if session is None:
            return GpuReport(message=self._unavailable_reason), -1
        changes = session.changes
        try:
            return session.read(), changes
        except DriverUnavailableError as error:
            _log.warning("NVIDIA driver unavailable", error=str(error))
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
    """Return the result of a call in another thread. Raises TimeoutError; the call then continues."""
    if future.done():
        return future.result()
    waiting = asyncio.wrap_future(future)
    try:
        async with asyncio.timeout(timeout_seconds):
            return await asyncio.shield(waiting)
    finally:
        # Does not cancel the running call; without this, a call that ends after the event loop would log an error.
        waiting.cancel()


class DriverThread:
    """Runs calls one after the other in a thread.

    Not a ThreadPoolExecutor: Python joins its threads at exit, so a driver that hangs would keep the daemon from
    ending. This is a daemon thread, which is abandoned instead.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start to run calls."""
        self._thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run `call` after those before it; the future cannot be cancelled."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                result = call()
            except BaseException as error:  # noqa: BLE001 - the future raises it
                future.set_exception(error)
            else:
                future.set_result(result)

        self._calls.put(run)
        return future

    def end(self) -> None:
        """End the thread after the submitted calls; does not wait."""
        self._calls.put(None)

    def join(self, timeout_seconds: float) -> None:
        """Wait for the end of the thread."""
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
