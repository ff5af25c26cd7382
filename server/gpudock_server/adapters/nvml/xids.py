"""Which of the driver's error reports (XIDs) mean that a card must not be handed out.

Source: NVIDIA, "Analyzing Xid Errors with the Xid Catalog" (docs.nvidia.com/deploy/xid-errors), the column "Resolution
Bucket (Immediate Action)". Fatal here is what asks for RESET_GPU or RESTART_BM, and 48 and 74, of which it says that "a
GPU reset or node reboot is needed to clear this error". Not fatal, on purpose:

- 13, 31, 43, 45, 68 and their like (RESTART_APP, IGNORE): a program's own fault; the card stays healthy;
- 63 (row remapped) and 92 (many corrected errors): IGNORE;
- 94 (contained memory error): RESTART_APP, "applications can continue to be run until the reset can be performed";
- 109 (context switch timeout): the catalogue says RESET_GPU, NVIDIA's own Kubernetes device plugin counts it among
  application errors (internal/rm/health.go). A tenant's program can cause it, and must not take a card out of service
  by that; where a reset is really needed, the driver's recovery action says so;
- 155 (NVLink defined by software): also raised when a link goes down as intended.

Drivers from R565 on tell the action themselves (see `recovery_action` in driver.py); this table is for what is older.
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
    """What an XID means for people, as in "XID 79: fell off the bus"; empty when it is not fatal to the card."""
    meaning = FATAL_XIDS.get(xid)
    return f"XID {xid}: {meaning}" if meaning else ""
