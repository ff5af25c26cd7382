"""Finds options of an engine volume that give access to the host.

The `local` driver calls mount(2) with `type`, `device` and `o` at every start of a container that has the volume. These
options can turn a volume into any folder or disk of the host, and a container with such a volume controls the host.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

_LOCAL: Final = "local"
_KNOWN_OPTIONS: Final = frozenset({"type", "device", "o", "size"})
# Filesystems without data of this host.
_HARMLESS_FILESYSTEMS: Final = frozenset({"tmpfs", "nfs", "nfs4", "cifs", "smb3"})
# With one of these mount(2) ignores the type and treats the device as a folder of the host.
_BIND_FLAGS: Final = frozenset({"bind", "rbind", "move", "remount"})
_GENERATED_NAME: Final = re.compile(r"[0-9a-f]{64}")
_ANONYMOUS_LABEL: Final = "com.docker.volume.anonymous"


def hazard(driver: str, options: Mapping[str, str]) -> str:
    """Why a volume with these options may give access to the host; empty if it does not.

    Volumes of other drivers are not checked: their plugin decides what they are.
    """
    if driver != _LOCAL or not options:
        return ""
    if unknown := sorted(options.keys() - _KNOWN_OPTIONS):
        return f"volume option {unknown[0]!r} is not on the list of safe options"
    kind, device = options.get("type", ""), options.get("device", "")
    if _BIND_FLAGS & {flag.strip().lower() for flag in options.get("o", "").split(",")}:
        return f"it is a bind mount of host path {device!r}"
    if kind in _HARMLESS_FILESYSTEMS or not (kind or device):
        return ""
    return f"it mounts host device {device!r} with filesystem type {kind!r}"


def is_anonymous(name: str, labels: Mapping[str, str]) -> bool:
    """Whether the engine itself created the volume, for one container."""
    return _GENERATED_NAME.fullmatch(name) is not None or _ANONYMOUS_LABEL in labels
