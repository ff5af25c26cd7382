"""Converts requests of ContainerService to commands of core."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

from google.protobuf.duration_pb2 import Duration
from gpudock.v1 import container_service_pb2 as pb
from gpudock.v1 import registry_auth_pb2

from gpudock_server.core.containers.commands import (
    Clone,
    Create,
    Delete,
    DeleteRevision,
    FilesPolicy,
    Pause,
    PullPolicy,
    Restart,
    Rollback,
    Scale,
    ScaleStrategy,
    Start,
    Stop,
    Unpause,
    Update,
)
from gpudock_server.model.engine import HostCapacity, RegistryAuth
from gpudock_server.rpc.containers.spec_change_request import SPEC_FIELDS, spec_change
from gpudock_server.rpc.containers.spec_requests import (
    MAX_STOP_TIMEOUT,
    cpus,
    gpus,
    memory,
    shm_size,
    snapshot_policy,
    spec,
)
from gpudock_server.rpc.validation import fields
from gpudock_server.rpc.validation.fields import UNKNOWN_HOST
from gpudock_server.rpc.validation.violations import Violations

_PULL_POLICIES: Mapping[int, PullPolicy] = {
    pb.PullPolicy.Value(f"PULL_POLICY_{policy.name}"): policy for policy in PullPolicy
}
_STRATEGIES: Mapping[int, ScaleStrategy] = {
    pb.ScaleStrategy.Value(f"SCALE_STRATEGY_{strategy.name}"): strategy for strategy in ScaleStrategy
}
_FILES_POLICIES: Mapping[int, FilesPolicy | None] = {
    pb.FilesPolicy.Value(f"FILES_POLICY_{policy.name}"): policy for policy in FilesPolicy
}
# A revision has ten digits in etcd keys.
_MAX_REVISION = 9_999_999_999
_CLONE_FIELDS = tuple(name for name in SPEC_FIELDS if name != "image")
_MIN_STALL_TIMEOUT = timedelta(milliseconds=1)
_MAX_STALL_TIMEOUT = timedelta(days=1)
_SCALABLE = ("gpus", "cpus", "memory_bytes", "shm_size_bytes")


def get(request: pb.GetContainerRequest) -> str:
    """The name in a GetContainerRequest."""
    violations = Violations()
    name = fields.name(violations, "name", request.name)
    violations.raise_if_any()
    return name


def create(request: pb.CreateContainerRequest, host: HostCapacity = UNKNOWN_HOST) -> Create:
    """Convert a CreateContainerRequest; `host` is the capacity that its limits are checked against."""
    violations = Violations()
    fields.owner(violations, "owner", request.owner)
    if not request.HasField("spec"):
        violations.add("spec", "is required")
    fields.optional_uuid(violations, "request_id", request.request_id)
    command = Create(
        name=fields.name(violations, "name", request.name),
        # For an absent spec, one violation is enough: those of its fields are dropped.
        spec=spec(violations.at("spec") if request.HasField("spec") else Violations(), request.spec, host),
        owner=request.owner,
        pull_policy=fields.enum_value(
            violations, "pull_policy", request.pull_policy, _PULL_POLICIES, PullPolicy.MISSING
        ),
        create_only=request.create_only,
        registry_auth=_registry_auth(violations.at("registry_auth"), request.registry_auth),
        pull_stall_seconds=_pull_stall_timeout(violations, request),
    )
    violations.raise_if_any()
    return command


def start(request: pb.StartContainerRequest) -> Start:
    """Convert a StartContainerRequest."""
    violations = fields.check_mutation(request)
    command = Start(
        name=request.name,
        gpus=gpus(violations.at("gpus"), request.gpus) if request.HasField("gpus") else None,
        snapshots=snapshot_policy(violations, "snapshots", request.snapshots),
        etag=request.etag,
    )
    violations.raise_if_any()
    return command


def stop(request: pb.StopContainerRequest) -> Stop:
    """Convert a StopContainerRequest."""
    violations = fields.check_mutation(request)
    timeout = _timeout(violations, request.timeout) if request.HasField("timeout") else None
    violations.raise_if_any()
    return Stop(name=request.name, keep_resources=request.keep_resources, timeout=timeout, etag=request.etag)


def restart(request: pb.RestartContainerRequest) -> Restart:
    """Convert a RestartContainerRequest."""
    violations = fields.check_mutation(request)
    command = Restart(
        name=request.name,
        timeout=_timeout(violations, request.timeout) if request.HasField("timeout") else None,
        snapshots=snapshot_policy(violations, "snapshots", request.snapshots),
        etag=request.etag,
    )
    violations.raise_if_any()
    return command


def pause(request: pb.PauseContainerRequest) -> Pause:
    """Convert a PauseContainerRequest."""
    fields.check_mutation(request).raise_if_any()
    return Pause(name=request.name, etag=request.etag)


def unpause(request: pb.UnpauseContainerRequest) -> Unpause:
    """Convert an UnpauseContainerRequest."""
    fields.check_mutation(request).raise_if_any()
    return Unpause(name=request.name, etag=request.etag)


def delete(request: pb.DeleteContainerRequest) -> Delete:
    """Convert a DeleteContainerRequest."""
    fields.check_mutation(request).raise_if_any()
    return Delete(name=request.name, force=request.force, etag=request.etag)


def scale(request: pb.ScaleContainerRequest, host: HostCapacity = UNKNOWN_HOST) -> Scale:
    """Convert a ScaleContainerRequest."""
    violations = fields.check_mutation(request)
    given = {field for field in _SCALABLE if request.HasField(field)}  # type: ignore[arg-type]  # literals, by name
    if not given:
        violations.add("gpus", f"at least one of {', '.join(_SCALABLE)} is required")
    command = Scale(
        name=request.name,
        gpus=gpus(violations.at("gpus"), request.gpus) if "gpus" in given else None,
        cpus=cpus(violations, request.cpus, host) if "cpus" in given else None,
        memory_bytes=memory(violations, request.memory_bytes, host) if "memory_bytes" in given else None,
        shm_size_bytes=shm_size(violations, request.shm_size_bytes, host, memory_bytes=request.memory_bytes)
        if "shm_size_bytes" in given
        else None,
        strategy=fields.enum_value(violations, "strategy", request.strategy, _STRATEGIES, ScaleStrategy.AUTO),
        snapshots=snapshot_policy(violations, "snapshots", request.snapshots),
        etag=request.etag,
    )
    violations.raise_if_any()
    return command


def update(request: pb.UpdateContainerRequest, host: HostCapacity = UNKNOWN_HOST) -> Update:
    """Convert an UpdateContainerRequest."""
    violations = fields.check_mutation(request)
    change = spec_change(violations, request, SPEC_FIELDS, host)
    if not request.update_mask.paths and not change.fields:
        violations.add("update_mask", "is required if `spec` and `edits` are empty")
    command = Update(
        name=request.name,
        change=change,
        files=fields.enum_value(violations, "files", request.files, _FILES_POLICIES, None),
        pull_policy=fields.enum_value(
            violations, "pull_policy", request.pull_policy, _PULL_POLICIES, PullPolicy.MISSING
        ),
        registry_auth=_registry_auth(violations.at("registry_auth"), request.registry_auth),
        pull_stall_seconds=_pull_stall_timeout(violations, request),
        snapshots=snapshot_policy(violations, "snapshots", request.snapshots),
        etag=request.etag,
    )
    violations.raise_if_any()
    return command


def clone(request: pb.CloneContainerRequest, host: HostCapacity = UNKNOWN_HOST) -> Clone:
    """Convert a CloneContainerRequest."""
    violations = Violations()
    fields.owner(violations, "owner", request.owner)
    fields.optional_uuid(violations, "request_id", request.request_id)
    if request.spec.image and not request.update_mask.paths:
        violations.add(
            "spec.image", "must be unset: a clone has the image of its source; change it later with UpdateContainer"
        )
    command = Clone(
        name=fields.name(violations, "name", request.name),
        source=fields.name(violations, "source", request.source),
        revision=fields.in_range(violations, "revision", request.revision, 0, _MAX_REVISION),
        change=spec_change(violations, request, _CLONE_FIELDS, host),
        owner=request.owner,
        create_only=request.create_only,
    )
    violations.raise_if_any()
    return command


def rollback(request: pb.RollbackContainerRequest) -> Rollback:
    """Convert a RollbackContainerRequest."""
    violations = fields.check_mutation(request)
    command = Rollback(
        name=request.name,
        revision=fields.in_range(violations, "revision", request.revision, 1, _MAX_REVISION),
        spec_only=request.spec_only,
        snapshots=snapshot_policy(violations, "snapshots", request.snapshots),
        etag=request.etag,
    )
    violations.raise_if_any()
    return command


def get_revision(request: pb.GetContainerRevisionRequest) -> tuple[str, int]:
    """The name and the revision number in a GetContainerRevisionRequest; 0 is the current revision."""
    violations = Violations()
    name = fields.name(violations, "name", request.name)
    revision = fields.in_range(violations, "revision", request.revision, 0, _MAX_REVISION)
    violations.raise_if_any()
    return name, revision


def delete_revision(request: pb.DeleteContainerRevisionRequest) -> DeleteRevision:
    """Convert a DeleteContainerRevisionRequest."""
    violations = fields.check_mutation(request)
    revision = fields.in_range(violations, "revision", request.revision, 1, _MAX_REVISION)
    violations.raise_if_any()
    return DeleteRevision(name=request.name, revision=revision, etag=request.etag)


def _timeout(violations: Violations, message: Duration) -> float | None:
    span = fields.duration(violations, "timeout", message, timedelta(0), MAX_STOP_TIMEOUT)
    return fields.whole_seconds(span)


def _pull_stall_timeout(
    violations: Violations,
    request: pb.CreateContainerRequest | pb.UpdateContainerRequest,
) -> float | None:
    if not request.HasField("pull_stall_timeout"):
        return None
    span = fields.duration(
        violations, "pull_stall_timeout", request.pull_stall_timeout, _MIN_STALL_TIMEOUT, _MAX_STALL_TIMEOUT
    )
    return None if span is None else span.total_seconds()


def _registry_auth(violations: Violations, message: registry_auth_pb2.RegistryAuth) -> RegistryAuth | None:
    if not message.ByteSize():
        return None
    if bool(message.username) != bool(message.password):
        missing = "username" if message.password else "password"
        violations.add(missing, "is required: `username` and `password` must be set together")
    if message.identity_token and (message.username or message.password):
        violations.add("identity_token", "must be unset if `username` or `password` is set")
    return RegistryAuth(
        username=message.username,
        password=message.password,
        identity_token=message.identity_token,
        server_address=message.server_address,
    )
