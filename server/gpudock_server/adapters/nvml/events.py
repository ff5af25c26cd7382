"""Listening for XIDs: a thread that waits in nvmlEventSetWait."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress

import pynvml
import structlog

from gpudock_server.adapters.nvml.driver import Handle

_log = structlog.get_logger(__name__)
# How long a wait may take before the thread looks whether it shall end.
_SLICE_MILLISECONDS = 500


class XidListener:
    """Reports every XID of the cards that were added, from a thread of its own, until it is closed.

    `report` is called in that thread with a card's UUID and an XID; `lost` when the driver says that some card is gone.
    """

    def __init__(self, report: Callable[[str, int], None], lost: Callable[[], None]) -> None:
        self._report = report
        self._lost = lost
        self._closing = threading.Event()
        self._uuids: dict[int, str] = {}
        # Blocks; as every call of NVML but the wait, this runs in the driver's thread.
        self._set = pynvml.nvmlEventSetCreate()
        self._thread = threading.Thread(target=self._run, name="nvml-events", daemon=True)
        self._thread.start()

    def add(self, handle: Handle, uuid: str) -> None:
        """Listen to a card; one that is known, or has no such events, is left as it is."""
        if uuid in self._uuids.values():
            return
        self._uuids[_address(handle)] = uuid
        try:
            pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, self._set)
        except pynvml.NVMLError as error:
            _log.warning("gpu_has_no_xid_events", uuid=uuid, error=str(error))

    def close(self, timeout_seconds: float) -> bool:
        """End the thread; False if it hangs in the driver, and is left behind with its event set."""
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
        # Such an answer comes at once, and again at the next call.
        self._closing.wait(_SLICE_MILLISECONDS / 1000)

    def _report_xid(self, event: pynvml.c_nvmlEventData_t) -> None:
        xid = int(event.eventData)
        # By its handle, not by asking for the UUID: a card that fell off the bus no longer answers.
        uuid = self._uuids.get(_address(event.device))
        _log.warning("gpu_xid", uuid=uuid or "unknown", xid=xid)
        if uuid is not None:
            self._report(uuid, xid)


def _address(handle: Handle) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0
