"""What the options of an engine volume make the engine mount.

The `local` driver calls mount(2) with `type`, `device` and `o` at every start of a container that has the volume. With
them a volume can be any folder or disk of the host, and a container with that volume owns the host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_LOCAL: Final = "local"
_KNOWN_OPTIONS: Final = frozenset({"type", "device", "o", "size"})
# Filesystems that have nothing of this host in them.
_HARMLESS_FILESYSTEMS: Final = frozenset({"tmpfs", "nfs", "nfs4", "cifs", "smb3"})
# With one of these mount(2) ignores the type, and takes the device for a folder of the host.
_BIND_FLAGS: Final = frozenset({"bind", "rbind", "move", "remount"})
_GENERATED_NAME: Final = re.compile(r"[0-9a-f]{64}")
_ANONYMOUS_LABEL: Final = "com.docker.volume.anonymous"


def hazard(driver: str, options: Mapping[str, str]) -> str:
    """What of the host a volume with these options is; empty where it is nothing of the host.

    Volumes of another driver are what their plugin makes of them.
    """
    if driver != _LOCAL or not options:
        return ""
    if unknown := sorted(options.keys() - _KNOWN_OPTIONS):
        return f"its option {unknown[0]!r} is not known to be harmless"
    kind, device = options.get("type", ""), options.get("device", "")
    if _BIND_FLAGS & {flag.strip().lower() for flag in options.get("o", "").split(",")}:
        return f"it is a bind mount of {device!r} on the host"
    if kind in _HARMLESS_FILESYSTEMS or not (kind or device):
        return ""
    return f"it mounts {device!r} of the host with filesystem type {kind!r}"


def is_anonymous(name: str, labels: Mapping[str, str]) -> bool:
    """Whether the engine made a volume for one container, by itself."""
    return _GENERATED_NAME.fullmatch(name) is not None or _ANONYMOUS_LABEL in labels
