"""Check whether this process has the privileges to transfer a layer."""

from __future__ import annotations

import os
from pathlib import Path

# capabilities(7). Without SYS_ADMIN the trusted.* attributes are not listed and not copied, without any error: the
# deleted files of every opaque directory would reappear.
_NEEDED = {
    0: "CAP_CHOWN",
    1: "CAP_DAC_OVERRIDE",
    3: "CAP_FOWNER",
    4: "CAP_FSETID",
    21: "CAP_SYS_ADMIN",
    27: "CAP_MKNOD",
    31: "CAP_SETFCAP",
}
# user_namespaces(7): the initial namespace maps every id to itself.
_INITIAL_MAP = ["0", "0", "4294967295"]


def exchange_unavailable_reason() -> str:
    """Why this process cannot rename folders of the engine; empty if it can."""
    return "" if os.geteuid() == 0 else "the daemon does not run as root"


def copy_unavailable_reason() -> str:
    """Why this process cannot copy a layer with all its attributes; empty if it can."""
    if os.geteuid() != 0:
        return "the daemon does not run as root"
    # In its own user namespace a process has all capabilities, but cannot read trusted.* attributes.
    if Path("/proc/self/uid_map").read_text(encoding="ascii").split() != _INITIAL_MAP:
        return "the daemon runs in a user namespace, which hides trusted.* attributes"
    effective = effective_capabilities()
    missing = [name for bit, name in _NEEDED.items() if not effective >> bit & 1]
    return f"the daemon is missing the capabilities {', '.join(missing)}" if missing else ""


def effective_capabilities() -> int:
    """Return the effective capabilities of this process as a bit set: capabilities(7)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return int(value, 16)
    return 0
