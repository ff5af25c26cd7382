"""Converts requests of VolumeService to commands of core."""

from __future__ import annotations

import re
from collections.abc import Mapping

from gpudock.v1 import volume_pb2
from gpudock.v1 import volume_service_pb2 as pb

from gpudock_server.core.volumes.commands import Adopt, Create, Delete, Resize
from gpudock_server.model.volume import VolumeBackendKind
from gpudock_server.rpc.containers.spec_requests import labels
from gpudock_server.rpc.validation import fields
from gpudock_server.rpc.validation.violations import Violations
from gpudock_server.rpc.volumes.messages import BACKENDS

_BACKENDS: Mapping[int, VolumeBackendKind | None] = {
    volume_pb2.VOLUME_BACKEND_UNSPECIFIED: None,
    **{value: kind for kind, value in BACKENDS.items()},
}
_ENGINE_VOLUME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,254}", re.ASCII)
# No supported filesystem can be smaller.
_MIN_BYTES = 1 << 20


def get(request: pb.GetVolumeRequest) -> str:
    """The name in a GetVolumeRequest."""
    violations = Violations()
    name = fields.name(violations, "name", request.name)
    violations.raise_if_any()
    return name


def create(request: pb.CreateVolumeRequest) -> Create:
    """Convert a CreateVolumeRequest."""
    violations = _check_creation(request)
    command = Create(
        name=request.name,
        size_bytes=request.size_bytes,
        owner=request.owner,
        labels=labels(violations, request.labels),
        backend=_backend(violations, request.backend),
    )
    violations.raise_if_any()
    return command


def adopt(request: pb.AdoptVolumeRequest) -> Adopt:
    """Convert an AdoptVolumeRequest."""
    violations = _check_creation(request)
    if request.engine_volume and not _ENGINE_VOLUME.fullmatch(request.engine_volume):
        violations.add("engine_volume", "must match ^[A-Za-z0-9][A-Za-z0-9_.-]{0,254}$, or be empty")
    command = Adopt(
        name=request.name,
        engine_volume=request.engine_volume or request.name,
        size_bytes=request.size_bytes,
        owner=request.owner,
        labels=labels(violations, request.labels),
        backend=_backend(violations, request.backend),
    )
    violations.raise_if_any()
    return command


def resize(request: pb.ResizeVolumeRequest) -> Resize:
    """Convert a ResizeVolumeRequest."""
    violations = fields.check_mutation(request)
    if request.size_bytes == 0:
        violations.add("size_bytes", "is required")
    else:
        fields.size(violations, "size_bytes", request.size_bytes, minimum=_MIN_BYTES)
    violations.raise_if_any()
    return Resize(name=request.name, size_bytes=request.size_bytes, etag=request.etag)


def delete(request: pb.DeleteVolumeRequest) -> Delete:
    """Convert a DeleteVolumeRequest."""
    fields.check_mutation(request).raise_if_any()
    return Delete(name=request.name, etag=request.etag, force=request.force)


def _check_creation(
    request: pb.CreateVolumeRequest | pb.AdoptVolumeRequest,
) -> Violations:
    violations = Violations()
    fields.name(violations, "name", request.name)
    fields.owner(violations, "owner", request.owner)
    fields.optional_uuid(violations, "request_id", request.request_id)
    fields.size(violations, "size_bytes", request.size_bytes, minimum=_MIN_BYTES)
    if request.size_bytes and request.backend == volume_pb2.VOLUME_BACKEND_PLAIN:
        violations.add("backend", "must not be PLAIN if size_bytes is set")
    return violations


def _backend(violations: Violations, value: int) -> VolumeBackendKind | None:
    return fields.enum_value(violations, "backend", value, _BACKENDS, None)
