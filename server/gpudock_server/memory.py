"""What the C library does with memory that was freed."""

from __future__ import annotations

import ctypes
from typing import Final

# https://sourceware.org/glibc/manual/latest/html_node/Malloc-Tunable-Parameters.html
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_MIB: Final = 1024 * 1024
# Ample for the buffers of a few messages of exec output, half a megabyte each.
_MMAP_THRESHOLD_BYTES: Final = 4 * _MIB
_TRIM_THRESHOLD_BYTES: Final = 16 * _MIB


def set_malloc_thresholds() -> None:
    """Have glibc keep what is freed, up to 16 MiB of each of its arenas, for what is asked for next.

    By default it gives a large block back to the kernel and asks for it anew, zeroed page by page, for every message of
    a stream: half of what such a stream costs. Another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
