"""Converts the spec of a container from its record to a message.

A record does not distinguish an explicit default (restart policy NO, a health check every 30 seconds) from an absent
value; such fields are left out. `spec_requests.spec` is the conversion in the other direction, with validation.
"""

from __future__ import annotations

from datetime import timedelta

from gpudock.v1 import container_pb2

from gpudock_server.model.spec import (
    ContainerSpec,
    GpuRequest,
    HealthCheck,
    Mount,
    PortRequest,
    RestartPolicy,
    RestartPolicyKind,
    RevisionPolicy,
    SnapshotPolicy,
    TmpfsMount,
)
from gpudock_server.rpc.port_messages import PROTOCOLS
from gpudock_server.rpc.timestamps import duration

RESTART_POLICIES = {
    kind: container_pb2.RestartPolicyKind.Value(f"RESTART_POLICY_KIND_{kind.name}") for kind in RestartPolicyKind
}
SNAPSHOT_POLICIES = {
    policy: container_pb2.SnapshotPolicy.Value(f"SNAPSHOT_POLICY_{policy.name}") for policy in SnapshotPolicy
}

_NODE_DEFAULT = container_pb2.SNAPSHOT_POLICY_UNSPECIFIED
_DEFAULT_CHECK = HealthCheck(command=())
_DEFAULT_MODE = TmpfsMount().mode


def spec_message(recorded: ContainerSpec) -> container_pb2.ContainerSpec:
    """The spec as a message."""
    return container_pb2.ContainerSpec(
        image=recorded.image,
        entrypoint=recorded.entrypoint,
        command=recorded.command,
        env=recorded.env,
        working_dir=recorded.working_dir,
        user=recorded.user,
        hostname=recorded.hostname or None,
        tty=recorded.tty,
        stdin=recorded.stdin,
        labels=recorded.labels,
        gpus=_gpus(recorded.gpus) if recorded.gpus != GpuRequest() else None,
        cpus=recorded.cpus,
        memory_bytes=recorded.memory_bytes,
        shm_size_bytes=recorded.shm_size_bytes,
        pids_limit=recorded.pids_limit,
        mounts=[_mount(mount) for mount in recorded.mounts],
        ports=[_port(port) for port in recorded.ports],
        restart_policy=_restart_policy(recorded.restart_policy) if recorded.restart_policy != RestartPolicy() else None,
        stop_signal=recorded.stop_signal,
        stop_timeout=duration(recorded.stop_timeout),
        health_check=_health_check(recorded.health_check) if recorded.health_check is not None else None,
        revision_policy=_revision_policy(recorded.revision_policy)
        if recorded.revision_policy != RevisionPolicy()
        else None,
    )


def _gpus(request: GpuRequest) -> container_pb2.GpuRequest:
    return container_pb2.GpuRequest(
        count=request.count,
        uuids=request.uuids,
        model=request.model,
        min_memory_bytes=request.min_memory_bytes,
    )


def _mount(mount: Mount) -> container_pb2.Mount:
    message = container_pb2.Mount(target=mount.target, read_only=mount.read_only)
    if mount.tmpfs is not None:
        mode = mount.tmpfs.mode if mount.tmpfs.mode != _DEFAULT_MODE else None
        message.tmpfs.CopyFrom(container_pb2.TmpfsMount(size_bytes=mount.tmpfs.size_bytes, mode=mode))
    elif mount.host_path:
        message.host_path = mount.host_path
    else:
        message.volume = mount.volume
    return message


def _port(request: PortRequest) -> container_pb2.PortRequest:
    return container_pb2.PortRequest(
        container_port=request.container_port, protocol=PROTOCOLS[request.protocol], host_port=request.host_port
    )


def _restart_policy(policy: RestartPolicy) -> container_pb2.RestartPolicy:
    return container_pb2.RestartPolicy(policy=RESTART_POLICIES[policy.kind], max_retry_count=policy.max_retry_count)


def _revision_policy(policy: RevisionPolicy) -> container_pb2.RevisionPolicy:
    return container_pb2.RevisionPolicy(
        snapshots=SNAPSHOT_POLICIES[policy.snapshots] if policy.snapshots is not None else _NODE_DEFAULT,
        keep_revisions=policy.keep_revisions,
        keep_for=duration(policy.keep_for),
    )


def _health_check(check: HealthCheck) -> container_pb2.HealthCheck:
    def unless_default(span: timedelta, default: timedelta) -> timedelta | None:
        return span if span != default else None

    return container_pb2.HealthCheck(
        command=check.command,
        interval=duration(unless_default(check.interval, _DEFAULT_CHECK.interval)),
        timeout=duration(unless_default(check.timeout, _DEFAULT_CHECK.timeout)),
        start_period=duration(unless_default(check.start_period, _DEFAULT_CHECK.start_period)),
        retries=check.retries if check.retries != _DEFAULT_CHECK.retries else 0,
    )
