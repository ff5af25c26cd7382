"""Conversion of keyword arguments to a ContainerSpec."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeAlias, TypedDict, cast

from google.protobuf.duration_pb2 import Duration

from gpudock._enums import enum_value
from gpudock.v1 import container_pb2 as pb
from gpudock.v1.container_service_pb2 import ContainerPort, ContainerSpecEdits
from gpudock.v1.port_pb2 import PORT_PROTOCOL_TCP

Gpus: TypeAlias = int | Sequence[str] | pb.GpuRequest
"""A number of GPUs, or their UUIDs, or a whole request."""
Port: TypeAlias = int | pb.PortRequest
"""A TCP port of the container, published at a port of the node's range, or a whole request."""
Seconds: TypeAlias = float | timedelta


class SpecOptions(TypedDict, total=False):
    """The fields of a ContainerSpec; a missing field, or None, means its default. protos/gpudock/v1 has the limits."""

    entrypoint: Sequence[str]
    command: Sequence[str]
    env: Mapping[str, str]
    working_dir: str
    user: str
    hostname: str
    tty: bool
    stdin: bool
    labels: Mapping[str, str]
    gpus: Gpus | None
    cpus: float
    memory_bytes: int
    shm_size_bytes: int
    pids_limit: int
    mounts: Iterable[pb.Mount]
    ports: Iterable[Port]
    restart_policy: str | pb.RestartPolicy | None
    stop_signal: str
    stop_timeout: Seconds | None
    health_check: pb.HealthCheck | None
    revision_policy: pb.RevisionPolicy | None


class EditOptions(TypedDict, total=False):
    """Single entries of a spec to add and to remove; other entries are unchanged.

    A mount is identified by its target, and a port by its number and protocol: adding an existing one replaces it.
    """

    set_env: Mapping[str, str]
    remove_env: Iterable[str]
    set_labels: Mapping[str, str]
    remove_labels: Iterable[str]
    add_mounts: Iterable[pb.Mount]
    remove_mounts: Iterable[str]
    add_ports: Iterable[Port]
    remove_ports: Iterable[int | ContainerPort]


class ChangeOptions(SpecOptions, EditOptions, total=False):
    """Whole fields of a spec, and entries to add and to remove."""


def split_options(options: ChangeOptions) -> tuple[SpecOptions, ContainerSpecEdits | None]:
    """Return the whole fields, and the edits as a message or None if there are none."""
    given = cast("dict[str, Any]", dict(options))
    edits = {name: given.pop(name) for name in EditOptions.__annotations__ if name in given}
    if "add_ports" in edits:
        edits["add_ports"] = _ports(edits["add_ports"])
    if "remove_ports" in edits:
        edits["remove_ports"] = [
            ContainerPort(container_port=port, protocol=PORT_PROTOCOL_TCP) if isinstance(port, int) else port
            for port in edits["remove_ports"]
        ]
    return cast("SpecOptions", given), ContainerSpecEdits(**edits) if edits else None


def spec_of(image: str | pb.ContainerSpec, options: SpecOptions) -> pb.ContainerSpec:
    """Return a new spec from an image or a spec, with its fields replaced by `options`."""
    spec = pb.ContainerSpec()
    if isinstance(image, pb.ContainerSpec):
        spec.CopyFrom(image)
    else:
        spec.image = image
    fields = cast("dict[str, Any]", dict(options))
    for name, convert in _CONVERSIONS.items():
        if fields.get(name) is not None:
            fields[name] = convert(fields[name])
    for name in fields:
        spec.ClearField(cast("Any", name))
    spec.MergeFrom(pb.ContainerSpec(**fields))
    return spec


def gpu_request(gpus: Gpus) -> pb.GpuRequest:
    """Return a request for a number of GPUs or for GPUs by UUID."""
    if isinstance(gpus, pb.GpuRequest):
        return gpus
    return pb.GpuRequest(count=gpus) if isinstance(gpus, int) else pb.GpuRequest(uuids=gpus)


def restart_policy(policy: str | pb.RestartPolicy) -> pb.RestartPolicy:
    """Return the policy of `no`, `always`, `unless-stopped`, `on-failure` or `on-failure:COUNT`; raises ValueError."""
    if isinstance(policy, pb.RestartPolicy):
        return policy
    word, colon, count = policy.partition(":")
    kind = enum_value(pb.RestartPolicyKind, word)
    if colon and kind != pb.RESTART_POLICY_KIND_ON_FAILURE:
        raise ValueError(f"{policy!r}: only on-failure takes a count, as in on-failure:3")
    if colon and not (count.isascii() and count.isdecimal()):
        raise ValueError(f"{policy!r}: {count!r} is not a count; give digits alone, as in on-failure:3")
    return pb.RestartPolicy(policy=kind, max_retry_count=int(count) if colon else 0)


def duration(value: Seconds) -> Duration:
    """Return a duration message for seconds or a timedelta."""
    message = Duration()
    message.FromTimedelta(value if isinstance(value, timedelta) else timedelta(seconds=value))
    return message


def _ports(ports: Iterable[Port]) -> list[pb.PortRequest]:
    return [
        pb.PortRequest(container_port=port, protocol=PORT_PROTOCOL_TCP) if isinstance(port, int) else port
        for port in ports
    ]


_CONVERSIONS: Mapping[str, Any] = {
    "gpus": gpu_request,
    "ports": _ports,
    "restart_policy": restart_policy,
    "stop_timeout": duration,
}
