"""Listen for XIDs in a thread that waits in nvmlEventSetWait."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress

import pynvml
import structlog

from gpudock_server.adapters.nvml.driver import Handle

_log = structlog.get_logger(__name__)
# Maximum time of a wait before the thread checks whether it must end.
_SLICE_MILLISECONDS = 500


class XidListener:
    """Reports the XIDs of all added GPUs from its own thread, until it is closed.

    That thread calls `report` with the UUID of a GPU and an XID, and `lost` if the driver reports that a GPU is lost.
    """

    def __init__(self, report: Callable[[str, int], None], lost: Callable[[], None]) -> None:
        self._report = report
        self._lost = lost
        self._closing = threading.Event()
        self._uuids: dict[int, str] = {}
        # Blocks. Like all NVML calls except the wait, it runs in the driver thread.
        self._set = pynvml.nvmlEventSetCreate()
        self._thread = threading.Thread(target=self._run, name="nvml-events", daemon=True)
        self._thread.start()

    def add(self, handle: Handle, uuid: str) -> None:
        """Listen to a GPU; does nothing if it was added before."""
        if uuid in self._uuids.values():
            return
        self._uuids[_address(handle)] = uuid
        try:
            pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, self._set)
        except pynvml.NVMLError as error:
            _log.warning("GPU has no XID events", uuid=uuid, error=str(error))

    def close(self, timeout_seconds: float) -> bool:
        """End the thread; False if it hangs in the driver and is abandoned with its event set."""
        self._closing.set()
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            return False
        with suppress(pynvml.NVMLError):
            pynvml.nvmlEventSetFree(self._set)
        return True

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                event = pynvml.nvmlEventSetWait_v2(self._set, _SLICE_MILLISECONDS)
            except pynvml.NVMLError as error:
                self._handle_wait_error(error)
                continue
            if event.eventType == pynvml.nvmlEventTypeXidCriticalError:
                self._report_xid(event)

    def _handle_wait_error(self, error: pynvml.NVMLError) -> None:
        if error.value == pynvml.NVML_ERROR_TIMEOUT:
            return
        if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
            self._lost()
        # Pause: such an error is returned immediately, also by the next call.
        self._closing.wait(_SLICE_MILLISECONDS / 1000)

    def _report_xid(self, event: pynvml.c_nvmlEventData_t) -> None:
        xid = int(event.eventData)
        # Look the handle up instead of querying the UUID: a GPU that fell off the bus does not answer.
        uuid = self._uuids.get(_address(event.device))
        _log.warning("GPU XID", uuid=uuid or "unknown", xid=xid)
        if uuid is not None:
            self._report(uuid, xid)


def _address(handle: Handle) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0
