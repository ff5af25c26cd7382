"""The spec of a container as text."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator

from google.protobuf.duration_pb2 import Duration

from gpudock._enums import enum_name
from gpudock.cli._text import bytes_text, printable
from gpudock.v1.container_pb2 import (
    ContainerSpec,
    GpuRequest,
    HealthCheck,
    Mount,
    PortRequest,
    RestartPolicy,
    RestartPolicyKind,
    RevisionPolicy,
    SnapshotPolicy,
)
from gpudock.v1.port_pb2 import PortProtocol


def spec_rows(spec: ContainerSpec) -> Iterator[tuple[str, str]]:
    """Yield the name and the value of each field; the value is empty if the field is not set."""
    yield "image", spec.image
    yield "entrypoint", _words(spec.entrypoint)
    yield "command", _words(spec.command)
    yield "GPUs asked for", _gpus(spec.gpus) if spec.HasField("gpus") else ""
    yield "CPUs", f"{spec.cpus:g}" if spec.cpus else ""
    yield "memory", bytes_text(spec.memory_bytes) if spec.memory_bytes else ""
    yield "shm", bytes_text(spec.shm_size_bytes) if spec.shm_size_bytes else ""
    yield "pids limit", str(spec.pids_limit) if spec.pids_limit else ""
    yield "env", _lines(f"{name}={value}" for name, value in sorted(spec.env.items()))
    yield "mounts", _lines(map(_mount, spec.mounts))
    yield "publish", ", ".join(map(_port, spec.ports))
    yield "labels", _lines(f"{key}={value}" for key, value in sorted(spec.labels.items()))
    yield "user", printable(spec.user)
    yield "workdir", printable(spec.working_dir)
    yield "hostname", spec.hostname
    yield "tty", "yes" if spec.tty else ""
    yield "stdin", "open" if spec.stdin else ""
    yield "restart", _restart(spec.restart_policy) if spec.HasField("restart_policy") else ""
    yield "stop signal", printable(spec.stop_signal)
    yield "stop timeout", _span(spec.stop_timeout) if spec.HasField("stop_timeout") else ""
    yield "health check", _health_check(spec.health_check) if spec.HasField("health_check") else ""
    yield "history", _history(spec.revision_policy) if spec.HasField("revision_policy") else ""


def _lines(values: Iterable[str]) -> str:
    return "\n".join(map(printable, values))


def _words(words: Iterable[str]) -> str:
    return printable(shlex.join(words))


def _gpus(request: GpuRequest) -> str:
    if request.uuids:
        return ", ".join(request.uuids)
    model = f" of model {json.dumps(request.model)}" if request.model else ""
    memory = f" with {bytes_text(request.min_memory_bytes)} or more" if request.min_memory_bytes else ""
    return f"{request.count}{model}{memory}"


def _mount(mount: Mount) -> str:
    mode = ":ro" if mount.read_only else ""
    if not mount.HasField("tmpfs"):
        return f"{mount.volume or mount.host_path}:{mount.target}{mode}"
    size = f" {bytes_text(mount.tmpfs.size_bytes)}" if mount.tmpfs.size_bytes else ""
    permissions = f" mode {mount.tmpfs.mode:o}" if mount.tmpfs.HasField("mode") else ""
    return f"tmpfs:{mount.target}{size}{permissions}"


def _port(port: PortRequest) -> str:
    host = f"{port.host_port}:" if port.host_port else ""
    return f"{host}{port.container_port}/{enum_name(PortProtocol, port.protocol or 1).lower()}"


def _restart(policy: RestartPolicy) -> str:
    word = enum_name(RestartPolicyKind, policy.policy).lower().replace("_", "-")
    return f"{word}:{policy.max_retry_count}" if policy.max_retry_count else word


def _health_check(check: HealthCheck) -> str:
    if not check.command:
        return "off"
    spans = (
        ("every", check.interval, check.HasField("interval")),
        ("within", check.timeout, check.HasField("timeout")),
        ("after", check.start_period, check.HasField("start_period")),
    )
    given = [f"{word} {_span(span)}" for word, span, there in spans if there]
    retries = [f"{check.retries} failures make it unhealthy"] if check.retries else []
    return "; ".join([_words(check.command), *given, *retries])


def _history(policy: RevisionPolicy) -> str:
    parts = (
        f"files kept: {enum_name(SnapshotPolicy, policy.snapshots).lower()}" if policy.snapshots else "",
        f"{policy.keep_revisions} revisions" if policy.keep_revisions else "",
        f"for {_span(policy.keep_for)}" if policy.HasField("keep_for") else "",
    )
    return ", ".join(filter(None, parts)) or "settings of the node"


def _span(span: Duration) -> str:
    return f"{span.ToNanoseconds() / 1e9:g}s"
