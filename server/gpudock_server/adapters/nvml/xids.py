"""The error reports of the driver (XIDs) after which a GPU must not be allocated.

Source: NVIDIA, "Analyzing Xid Errors with the Xid Catalog" (docs.nvidia.com/deploy/xid-errors), the column "Resolution
Bucket (Immediate Action)". Fatal are those with RESET_GPU or RESTART_BM, and 48 and 74, of which it says that "a GPU
reset or node reboot is needed to clear this error". Not fatal, on purpose:

- 13, 31, 43, 45, 68 and similar (RESTART_APP, IGNORE): an error of a program; the GPU stays healthy;
- 63 (row remapped) and 92 (many corrected errors): IGNORE;
- 94 (contained memory error): RESTART_APP, "applications can continue to be run until the reset can be performed";
- 109 (context switch timeout): the catalog says RESET_GPU, but NVIDIA's Kubernetes device plugin counts it as an
  application error (internal/rm/health.go). A tenant's program can cause it, and must not be able to take a GPU out of
  service; if a reset is needed, the driver's recovery action says so;
- 155 (NVLink defined by software): also raised when a link goes down as intended.

Drivers since R565 report the action themselves (see `_recovery_problems` in driver.py); this table is for older ones.
"""

from __future__ import annotations

FATAL_XIDS = {
    46: "GPU stopped processing",
    48: "double bit ECC error",
    62: "internal micro-controller halt",
    64: "memory row remapping failed",
    74: "NVLink error",
    79: "fell off the bus",
    95: "uncontained memory error",
    110: "security fault",
    119: "timeout of a call to the GPU system processor",
    120: "error of the GPU system processor",
    136: "link training failed",
    140: "unrecovered ECC error",
    143: "GPU initialization error",
    156: "resource retirement, a reset is needed",
    158: "GPU fatal timeout",
}


def fatal_xid_message(xid: int) -> str:
    """Return a message such as "XID 79: fell off the bus"; empty if the XID is not fatal."""
    meaning = FATAL_XIDS.get(xid)
    return f"XID {xid}: {meaning}" if meaning else ""
