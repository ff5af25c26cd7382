"""Errors about what containers are given of the node: GPUs, ports, host paths."""

from __future__ import annotations

from dataclasses import dataclass

from gpudock_server.errors.base import Code, GpudockError


@dataclass(eq=False)
class GpuExhausted(GpudockError):
    """Fewer GPUs that match the request are free than requested; none was claimed."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "GPU_EXHAUSTED"
    template = (
        "{requested} GPUs requested, {matching} that match are free (node: {total} in total, {free} free; unhealthy:"
        " {unhealthy})"
    )
    requested: int
    free: int
    matching: int
    total: int
    unhealthy: tuple[str, ...] = ()


@dataclass(eq=False)
class NoGpusShown(GpuExhausted):
    """The driver of this node shows no GPU at all. `detail` says why, such as that it does not answer."""

    template = "{requested} GPUs requested, and this node shows none: {detail}"
    detail: str = ""


@dataclass(eq=False)
class GpuNotFound(GpudockError):
    """The driver of this node shows no GPU with these UUIDs."""

    code = Code.NOT_FOUND
    reason = "GPU_NOT_FOUND"
    template = "GPU {uuids} not found on this node; available: {available}"
    uuids: tuple[str, ...]
    available: tuple[str, ...]


@dataclass(eq=False)
class GpuNotShown(GpuNotFound):
    """GPUs were requested by UUID, and the driver shows no GPU at all; see NoGpusShown."""

    template = "this node has no GPU {uuids}; it shows none: {detail}"
    detail: str


@dataclass(eq=False)
class GpuUnhealthy(GpudockError):
    """A GPU that was requested by UUID is unhealthy."""

    code = Code.FAILED_PRECONDITION
    reason = "GPU_UNHEALTHY"
    template = "GPU {uuid} is {health} and cannot be allocated: {detail}"
    uuid: str
    health: str
    detail: str


@dataclass(eq=False)
class GpuBusy(GpudockError):
    """A GPU that was requested by UUID is held by another container."""

    code = Code.FAILED_PRECONDITION
    reason = "GPU_BUSY"
    template = "GPU {uuid} is held by container {container!r}"
    uuid: str
    container: str


@dataclass(eq=False)
class PortExhausted(GpudockError):
    """Fewer ports of the port range are free than requested; none was claimed."""

    code = Code.RESOURCE_EXHAUSTED
    reason = "PORT_EXHAUSTED"
    template = "{requested} host ports requested, {free} free in {first}-{last}"
    requested: int
    free: int
    first: int
    last: int


@dataclass(eq=False)
class PortInUse(GpudockError):
    """A port that was requested by number is held by a container, or a program of the host listens on it."""

    code = Code.FAILED_PRECONDITION
    reason = "PORT_IN_USE"
    template = "host port {host_port}/{protocol} is in use by {holder}"
    host_port: int
    protocol: str
    holder: str


@dataclass(eq=False)
class PortForbidden(GpudockError):
    """The settings of the node do not let containers request this port by number."""

    code = Code.PERMISSION_DENIED
    reason = "PORT_FORBIDDEN"
    template = (
        "host port {host_port}/{protocol} is not allowed for containers; allowed: {allowed} (setting"
        " pinned_port_ranges adds ports)"
    )
    host_port: int
    protocol: str
    allowed: tuple[str, ...]


@dataclass(eq=False)
class HostPathForbidden(GpudockError):
    """A host path is outside the allow-list, has a symbolic link in it, or does not exist."""

    code = Code.PERMISSION_DENIED
    reason = "HOST_PATH_FORBIDDEN"
    template = (
        "host path {host_path!r} cannot be mounted: {detail}; it must exist, be in or below one of allowed_host_paths"
        " ({allowed}), and contain no symbolic link"
    )
    host_path: str
    allowed: tuple[str, ...]
    detail: str


@dataclass(eq=False)
class HostPathFailed(GpudockError):
    """The host could not bind a host path for a container."""

    code = Code.FAILED_PRECONDITION
    reason = "HOST_PATH_FAILED"
    template = "host path {host_path!r} could not be bound for the container: {detail}"
    host_path: str
    detail: str
