"""Checks a ContainerSpec and its parts, and converts them to records."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from datetime import timedelta

from gpudock.v1 import container_pb2

from gpudock_server.model.engine import RESERVED_LABEL_PREFIX, HostCapacity
from gpudock_server.model.image_reference import is_image_reference
from gpudock_server.model.spec import (
    ContainerSpec,
    GpuRequest,
    HealthCheck,
    PortRequest,
    Protocol,
    RestartPolicy,
    RestartPolicyKind,
    RevisionPolicy,
    SnapshotPolicy,
)
from gpudock_server.rpc.containers.mount_requests import mounts
from gpudock_server.rpc.containers.spec_messages import RESTART_POLICIES, SNAPSHOT_POLICIES
from gpudock_server.rpc.port_messages import PROTOCOLS
from gpudock_server.rpc.validation import fields
from gpudock_server.rpc.validation.fields import UNKNOWN_HOST
from gpudock_server.rpc.validation.violations import Violations

MAX_STOP_TIMEOUT = timedelta(hours=24)

_MIB = 1024 * 1024
_MIN_MEMORY_BYTES = 6 * _MIB
_MIN_SHM_BYTES = 4096
# Enough for a shell and its commands; with fewer, an exec session cannot start.
_MIN_PIDS = 16
# PID_MAX_LIMIT of the kernel.
_MAX_PIDS = 4_194_304
_MIN_CPUS = 0.01
# The largest number of CPUs that Linux supports; used if the capacity of the node is unknown.
_MAX_CPUS = 8192
_MAX_GPUS = 16
_MAX_UUID_BYTES = 96
_MAX_MODEL_BYTES = 96
_MAX_PORTS = 32
_MAX_LABELS = 64
_MAX_LABEL_BYTES = 1024
_MAX_IMAGE_BYTES = 512
_MAX_HOSTNAME = 63
_MAX_KEPT = 10_000
_MIN_KEPT = timedelta(seconds=1)
# One etcd transaction takes 1.5 MiB: the record of a container, the result and the arguments of an operation, each with
# a spec, must fit into it.
_MAX_SPEC_BYTES = 256 * 1024
_DEFAULT_CHECK = HealthCheck(command=())
_MIN_CHECK = timedelta(milliseconds=1)
# The engine stores nanoseconds in 63 bits; this is the largest number of whole seconds.
_MAX_CHECK = timedelta(seconds=9_223_372_036)

# RFC 952 as amended by RFC 1123, section 2.1.
_HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*", re.ASCII)
_LABEL_KEY = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?", re.ASCII)

PROTOCOL_OF: Mapping[int, Protocol] = {value: protocol for protocol, value in PROTOCOLS.items()}
_SNAPSHOT_POLICY_OF: Mapping[int, SnapshotPolicy | None] = {value: kind for kind, value in SNAPSHOT_POLICIES.items()}
_POLICY_OF: Mapping[int, RestartPolicyKind] = {value: kind for kind, value in RESTART_POLICIES.items()}


def spec(
    violations: Violations, message: container_pb2.ContainerSpec, host: HostCapacity = UNKNOWN_HOST
) -> ContainerSpec:
    """Convert a spec and check it against the capacity of a host. The result is only valid without violations."""
    entrypoint, command = _program(violations, message)
    found = ContainerSpec(
        image=_image(violations, message.image),
        entrypoint=entrypoint,
        command=command,
        env=fields.environment(violations, "env", message.env),
        working_dir=fields.absolute_path(violations, "working_dir", message.working_dir) if message.working_dir else "",
        user=fields.user(violations, "user", message.user),
        hostname=_hostname(violations, message),
        tty=message.tty,
        stdin=message.stdin,
        labels=labels(violations, message.labels),
        gpus=gpus(violations.at("gpus"), message.gpus),
        cpus=cpus(violations, message.cpus, host),
        memory_bytes=memory(violations, message.memory_bytes, host),
        shm_size_bytes=shm_size(violations, message.shm_size_bytes, host, memory_bytes=message.memory_bytes),
        pids_limit=_pids_limit(violations, message.pids_limit),
        mounts=mounts(violations, message.mounts, host),
        ports=ports(violations, message.ports),
        restart_policy=_restart_policy(violations.at("restart_policy"), message.restart_policy),
        stop_signal=fields.signal(violations, "stop_signal", message.stop_signal) if message.stop_signal else "",
        stop_timeout=fields.duration(violations, "stop_timeout", message.stop_timeout, timedelta(0), MAX_STOP_TIMEOUT)
        if message.HasField("stop_timeout")
        else None,
        health_check=_health_check(violations.at("health_check"), message.health_check)
        if message.HasField("health_check")
        else None,
        revision_policy=_revision_policy(violations.at("revision_policy"), message.revision_policy),
    )
    if not violations.any and (length := len(found.model_dump_json().encode())) > _MAX_SPEC_BYTES:
        violations.add("", f"is {length} bytes as JSON; must be at most {_MAX_SPEC_BYTES}")
    return found


def _program(violations: Violations, message: container_pb2.ContainerSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The entrypoint and the command. A single empty string clears the entrypoint of the image."""
    entrypoint, command = fields.arguments(violations, ("entrypoint", message.entrypoint), ("command", message.command))
    if len(entrypoint) > 1 and not entrypoint[0]:
        violations.add("entrypoint", "must name a program; only a single empty string clears the image's entrypoint", 0)
    # If the image has an entrypoint, this would be its argument; but the image is not known here.
    if not any(entrypoint) and command and not command[0]:
        violations.add("command", "must name a program; to pass an empty argument first, set `entrypoint`", 0)
    return entrypoint, command


def gpus(violations: Violations, message: container_pb2.GpuRequest) -> GpuRequest:
    """Convert the GPU request of a spec."""
    uuids = tuple(message.uuids)
    fields.in_range(violations, "count", message.count, 0, _MAX_GPUS)
    fields.size(violations, "min_memory_bytes", message.min_memory_bytes)
    fields.text(violations, "model", message.model, max_bytes=_MAX_MODEL_BYTES)
    if len(uuids) > _MAX_GPUS:
        violations.add("uuids", f"must have at most {_MAX_GPUS} entries")
    elif uuids:
        _pinned_gpus(violations, message, uuids)
    return GpuRequest(count=message.count, uuids=uuids, model=message.model, min_memory_bytes=message.min_memory_bytes)


def _pinned_gpus(violations: Violations, message: container_pb2.GpuRequest, uuids: tuple[str, ...]) -> None:
    if message.count not in (0, len(uuids)):
        violations.add("count", f"is {message.count}; must be 0 or {len(uuids)}, the number of `uuids`")
    for field in ("model", "min_memory_bytes"):
        if getattr(message, field):
            violations.add(field, "must be unset if `uuids` is set")
    for index, uuid in enumerate(uuids):
        if not uuid:
            violations.add("uuids", "must not be empty", index)
        elif len(uuid.encode()) > _MAX_UUID_BYTES:
            violations.add("uuids", f"must have at most {_MAX_UUID_BYTES} bytes", index)
        elif uuid in uuids[:index]:
            violations.add("uuids", f"duplicates uuids[{uuids.index(uuid)}]", index)


def cpus(violations: Violations, value: float, host: HostCapacity = UNKNOWN_HOST) -> float:
    """Check a CPU limit; 0 is no limit."""
    maximum = host.cpus or _MAX_CPUS
    if not math.isfinite(value) or value < 0 or 0 < value < _MIN_CPUS or value > maximum:
        source = ", the number of CPUs of this node" if host.cpus else ""
        violations.add("cpus", f"is {value:g}; must be 0 or {_MIN_CPUS} to {maximum}{source}")
    # -0.0 becomes 0.0.
    return value or 0.0


def memory(violations: Violations, value: int, host: HostCapacity = UNKNOWN_HOST) -> int:
    """Check a memory limit; 0 is no limit."""
    return fields.host_memory(violations, "memory_bytes", value, host, minimum=_MIN_MEMORY_BYTES)


def shm_size(violations: Violations, value: int, host: HostCapacity = UNKNOWN_HOST, *, memory_bytes: int = 0) -> int:
    """Check the size of /dev/shm, which counts towards the memory limit; 0 is the default of the engine."""
    if 0 < memory_bytes < value:
        violations.add("shm_size_bytes", f"is {value}; must be at most memory_bytes ({memory_bytes})")
        return value
    return fields.host_memory(violations, "shm_size_bytes", value, host, minimum=_MIN_SHM_BYTES)


def _pids_limit(violations: Violations, value: int) -> int:
    if value and not _MIN_PIDS <= value <= _MAX_PIDS:
        violations.add("pids_limit", f"must be 0 or {_MIN_PIDS} to {_MAX_PIDS}")
    return value


def _image(violations: Violations, value: str) -> str:
    if not value:
        violations.add("image", "is required")
    elif len(value.encode()) > _MAX_IMAGE_BYTES:
        violations.add("image", f"must have at most {_MAX_IMAGE_BYTES} bytes")
    elif not is_image_reference(value):
        violations.add("image", "must be `repository[:tag]`, `repository@sha256:...` or an image id")
    return value


def _hostname(violations: Violations, message: container_pb2.ContainerSpec) -> str:
    value = message.hostname
    if message.HasField("hostname") and (len(value) > _MAX_HOSTNAME or not _HOSTNAME.fullmatch(value)):
        violations.add("hostname", f"must be a host name as in RFC 1123, of at most {_MAX_HOSTNAME} characters")
    return value


def labels(violations: Violations, values: Mapping[str, str], field: str = "labels") -> dict[str, str]:
    """Check the labels of a container or a volume."""
    found = dict(values)
    if len(found) > _MAX_LABELS:
        violations.add(field, f"must have at most {_MAX_LABELS} entries")
        return found
    for key, value in found.items():
        if not _LABEL_KEY.fullmatch(key):
            violations.add(field, "a key must match ^[A-Za-z0-9]([A-Za-z0-9._/-]{0,126}[A-Za-z0-9])?$", key)
        elif key.startswith(RESERVED_LABEL_PREFIX):
            violations.add(field, f"keys that start with {RESERVED_LABEL_PREFIX} are reserved", key)
        if fields.NUL in value or len(value.encode()) > _MAX_LABEL_BYTES:
            violations.add(field, f"a value must have at most {_MAX_LABEL_BYTES} bytes and no NUL", key)
    return found


def ports(
    violations: Violations, messages: Iterable[container_pb2.PortRequest], field: str = "ports"
) -> tuple[PortRequest, ...]:
    """Convert the ports of a spec, or the ports that `field` adds to a spec."""
    requested = tuple(messages)
    if len(requested) > _MAX_PORTS:
        violations.add(field, f"must have at most {_MAX_PORTS} entries")
        return ()
    container_ports: dict[tuple[int, Protocol], int] = {}
    host_ports: dict[tuple[int, Protocol], int] = {}
    found = []
    for index, message in enumerate(requested):
        port_violations = violations.at(field, index)
        port = _port(port_violations, message)
        first = container_ports.setdefault((port.container_port, port.protocol), index)
        if first != index:
            port_violations.add("container_port", f"duplicates {field}[{first}]")
        first = host_ports.setdefault((port.host_port, port.protocol), index)
        if port.host_port and first != index:
            port_violations.add("host_port", f"duplicates {field}[{first}]")
        found.append(port)
    return tuple(found)


def _port(violations: Violations, message: container_pb2.PortRequest) -> PortRequest:
    return PortRequest(
        container_port=fields.in_range(violations, "container_port", message.container_port, 1, fields.MAX_PORT),
        protocol=fields.enum_value(violations, "protocol", message.protocol, PROTOCOL_OF, Protocol.TCP),
        host_port=fields.in_range(violations, "host_port", message.host_port, 0, fields.MAX_PORT),
    )


def _restart_policy(violations: Violations, message: container_pb2.RestartPolicy) -> RestartPolicy:
    kind = fields.enum_value(violations, "policy", message.policy, _POLICY_OF, RestartPolicyKind.NO)
    count = message.max_retry_count
    if count < 0:
        violations.add("max_retry_count", "must not be negative")
    elif count and kind is not RestartPolicyKind.ON_FAILURE:
        violations.add("max_retry_count", "is only for RESTART_POLICY_KIND_ON_FAILURE")
    return RestartPolicy(kind=kind, max_retry_count=count)


def snapshot_policy(violations: Violations, field: str, value: int) -> SnapshotPolicy | None:
    """Convert a snapshot policy; None means that the next level decides (call, container, node)."""
    return fields.enum_value(violations, field, value, _SNAPSHOT_POLICY_OF, None)


def _revision_policy(violations: Violations, message: container_pb2.RevisionPolicy) -> RevisionPolicy:
    return RevisionPolicy(
        snapshots=snapshot_policy(violations, "snapshots", message.snapshots),
        keep_revisions=fields.in_range(violations, "keep_revisions", message.keep_revisions, 0, _MAX_KEPT),
        keep_for=fields.duration(violations, "keep_for", message.keep_for, _MIN_KEPT, _MAX_CHECK)
        if message.HasField("keep_for")
        else None,
    )


def _health_check(violations: Violations, message: container_pb2.HealthCheck) -> HealthCheck:
    def span(field: str, default: timedelta) -> timedelta:
        if not message.HasField(field):  # type: ignore[arg-type]  # one of three literals, by name
            return default
        return fields.duration(violations, field, getattr(message, field), _MIN_CHECK, _MAX_CHECK) or default

    if message.retries < 0:
        violations.add("retries", "must not be negative")
    return HealthCheck(
        command=fields.program(violations, "command", message.command) if message.command else (),
        interval=span("interval", _DEFAULT_CHECK.interval),
        timeout=span("timeout", _DEFAULT_CHECK.timeout),
        start_period=span("start_period", _DEFAULT_CHECK.start_period),
        retries=message.retries or _DEFAULT_CHECK.retries,
    )
