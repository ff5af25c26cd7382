"""Checks and converts the mounts of a spec."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gpudock.v1 import container_pb2

from gpudock_server.model.engine import HostCapacity
from gpudock_server.model.spec import Mount, TmpfsMount
from gpudock_server.rpc.validation import fields
from gpudock_server.rpc.validation.fields import UNKNOWN_HOST
from gpudock_server.rpc.validation.violations import Violations

_MAX_MOUNTS = 64
_MAX_MODE = 0o7777
# NVIDIA's container toolkit can be configured to read a mount of /dev/null below these directories as a device request.
# The toolkit compares prefixes of text, so `…-devicesall` counts too.
_DEVICE_REQUESTS = ("/var/run/nvidia-container-devices", "/run/nvidia-container-devices")
# Kernel file systems of a container, and what the kernel shows in them.
_KERNEL_FILESYSTEMS = {
    "/proc": "its processes",
    "/sys": "devices and control groups",
    "/dev": "devices; mount at /dev/shm",
}
# Directories of an image's programs. With an empty file system over them, nothing in the container starts.
_PROGRAMS = frozenset(
    f"{above}{name}" for above in ("/", "/usr/") for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
) | {"/usr"}
_SHM = "/dev/shm"  # noqa: S108 - a directory in the container
_ENGINE_MANAGED_FILES = frozenset({"/etc/hosts", "/etc/hostname", "/etc/resolv.conf"})
# Files that runc allows to be mounted over, so that lxcfs can show a container its own limits.
_PROC_FILES = frozenset(
    f"/proc/{name}"
    for name in ("cpuinfo", "diskstats", "loadavg", "meminfo", "slabinfo", "stat", "swaps", "uptime", "net/dev")
)
_VOLUME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}", re.ASCII)


def mounts(
    violations: Violations,
    messages: Iterable[container_pb2.Mount],
    host: HostCapacity = UNKNOWN_HOST,
    field: str = "mounts",
) -> tuple[Mount, ...]:
    """Convert the mounts of a spec, or the mounts that `field` adds to a spec; each needs another target."""
    requested = tuple(messages)
    if len(requested) > _MAX_MOUNTS:
        violations.add(field, f"must have at most {_MAX_MOUNTS} entries")
        return ()
    targets: dict[str, int] = {}
    for index, message in enumerate(requested):
        first = targets.setdefault(message.target, index)
        if first != index:
            violations.at(field, index).add("target", f"duplicates {field}[{first}]")
    return tuple(_mount(violations.at(field, index), message, host) for index, message in enumerate(requested))


def _mount(violations: Violations, message: container_pb2.Mount, host: HostCapacity) -> Mount:
    tmpfs: TmpfsMount | None = None
    match message.WhichOneof("source"):
        case "volume" if not _VOLUME.fullmatch(message.volume):
            violations.add("volume", "must match ^[A-Za-z0-9][A-Za-z0-9_.-]{0,254}$")
        case "host_path":
            fields.absolute_path(violations, "host_path", message.host_path)
        case "tmpfs":
            tmpfs = _tmpfs(violations.at("tmpfs"), message.tmpfs, host)
            if message.read_only:
                violations.add("read_only", "must be unset for tmpfs")
        case None:
            violations.add("source", "one of `volume`, `host_path` and `tmpfs` is required")
        case _:
            pass
    return Mount(
        volume=message.volume,
        host_path=message.host_path,
        tmpfs=tmpfs,
        target=_target(violations, message.target, message.WhichOneof("source")),
        read_only=message.read_only,
    )


def _tmpfs(violations: Violations, message: container_pb2.TmpfsMount, host: HostCapacity) -> TmpfsMount:
    fields.host_memory(violations, "size_bytes", message.size_bytes, host)
    if not message.HasField("mode"):
        return TmpfsMount(size_bytes=message.size_bytes)
    if not 0 <= message.mode <= _MAX_MODE:
        violations.add("mode", f"must be 0 to {_MAX_MODE} (octal {_MAX_MODE:o})")
    return TmpfsMount(size_bytes=message.size_bytes, mode=message.mode)


def _target(violations: Violations, value: str, source: str | None) -> str:
    if not value.startswith("/") or any(part in ("", ".", "..") for part in value[1:].split("/")):
        violations.add("target", "must be an absolute path other than `/`, without `.`, `..` or empty parts")
    elif value.startswith(_DEVICE_REQUESTS):
        violations.add("target", f"must not start with {_DEVICE_REQUESTS[0]}; request GPUs with `gpus`")
    elif reason := _target_conflict(value, source):
        violations.add("target", f"must not be {value}, {reason}")
    return fields.text(violations, "target", value, max_bytes=fields.MAX_PATH_BYTES)


def _target_conflict(target: str, source: str | None) -> str:
    """What a mount of this source at `target` would hide that a container needs; empty if nothing."""
    from_host = source == "host_path"
    if source == "tmpfs" and target in _PROGRAMS:
        return "which holds the image's programs or libraries; an empty file system there hides them"
    if target in _ENGINE_MANAGED_FILES:
        # A directory cannot be mounted on a file; mounting a file of the host is a common use.
        return "" if from_host else "which the engine creates for each container"
    if target == "/etc":
        return "which holds files that the engine creates for each container; mount below it"
    if from_host and target in _PROC_FILES:
        return ""
    root = "/" + target.split("/")[1]
    if root not in _KERNEL_FILESYSTEMS or target == _SHM or target.startswith(f"{_SHM}/"):
        return ""
    return f"{'where' if target == root else f'below {root}, where'} the kernel shows {_KERNEL_FILESYSTEMS[root]}"
