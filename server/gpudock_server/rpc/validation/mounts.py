"""What is mounted into a container, and where."""

from __future__ import annotations

import re
from collections.abc import Iterable

from gpudock.v1 import container_pb2

from gpudock_server.model.spec import Mount, TmpfsMount
from gpudock_server.rpc.validation import fields
from gpudock_server.rpc.validation.violations import Violations

_MAX_MOUNTS = 64
_MAX_MODE = 0o7777
# NVIDIA's container toolkit can be configured to read a mount of /dev/null below this folder as a device request.
# The toolkit compares text, so `…-devicesall` counts as well.
_DEVICE_REQUESTS = ("/var/run/nvidia-container-devices", "/run/nvidia-container-devices")
_VOLUME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}", re.ASCII)


def mounts(violations: Violations, messages: Iterable[container_pb2.Mount], field: str = "mounts") -> tuple[Mount, ...]:
    """Check the mounts of a spec, or those that `field` adds to it, each at another target."""
    asked = tuple(messages)
    if len(asked) > _MAX_MOUNTS:
        violations.add(field, f"must have at most {_MAX_MOUNTS} entries")
        return ()
    targets: dict[str, int] = {}
    for index, message in enumerate(asked):
        first = targets.setdefault(message.target, index)
        if first != index:
            violations.at(field, index).add("target", f"is mounted twice, first in {field}[{first}]")
    return tuple(_mount(violations.at(field, index), message) for index, message in enumerate(asked))


def _mount(violations: Violations, message: container_pb2.Mount) -> Mount:
    tmpfs: TmpfsMount | None = None
    match message.WhichOneof("source"):
        case "volume" if not _VOLUME.fullmatch(message.volume):
            violations.add("volume", "must match ^[A-Za-z0-9][A-Za-z0-9_.-]{0,254}$")
        case "host_path":
            fields.absolute_path(violations, "host_path", message.host_path)
        case "tmpfs":
            tmpfs = _tmpfs(violations.at("tmpfs"), message.tmpfs)
            if message.read_only:
                violations.add("read_only", "is not for tmpfs")
        case None:
            violations.add("source", "one of `volume`, `host_path` and `tmpfs` is required")
        case _:
            pass
    return Mount(
        volume=message.volume,
        host_path=message.host_path,
        tmpfs=tmpfs,
        target=_target(violations, message.target),
        read_only=message.read_only,
    )


def _tmpfs(violations: Violations, message: container_pb2.TmpfsMount) -> TmpfsMount:
    fields.size(violations, "size_bytes", message.size_bytes)
    if not message.HasField("mode"):
        return TmpfsMount(size_bytes=message.size_bytes)
    if not 0 <= message.mode <= _MAX_MODE:
        violations.add("mode", f"must be 0 to {_MAX_MODE} (octal {_MAX_MODE:o})")
    return TmpfsMount(size_bytes=message.size_bytes, mode=message.mode)


def _target(violations: Violations, value: str) -> str:
    if not value.startswith("/") or any(part in ("", ".", "..") for part in value[1:].split("/")):
        violations.add("target", "must be an absolute path other than `/`, without `.`, `..` or empty parts")
    elif value.startswith(_DEVICE_REQUESTS):
        violations.add(
            "target", f"must not begin with {_DEVICE_REQUESTS[0]}: gpudock alone gives devices to containers"
        )
    return fields.text(violations, "target", value, most_bytes=fields.MAX_PATH_BYTES)
