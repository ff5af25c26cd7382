"""Requests for watches: of what, and from when on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message
from gpudock.v1 import container_service_pb2, volume_service_pb2

from gpudock_server.ports import ContainerView, VolumeDetails
from gpudock_server.rpc import opaque_tokens
from gpudock_server.rpc.list_requests import container_filter, volume_filter
from gpudock_server.rpc.validation.violations import Violations

T = TypeVar("T")

_WatchMessage = container_service_pb2.WatchContainersRequest | volume_service_pb2.WatchVolumesRequest


@dataclass(frozen=True, slots=True)
class WatchRequest(Generic[T]):
    """A watch that is asked for: behind `resume` (empty: from now on, with what is there if `listing`)."""

    resume: str
    listing: bool
    scope: bytes
    matches: Callable[[T], bool]

    def token(self, resume: str) -> str:
        """What to give a caller who is to go on behind `resume`."""
        return opaque_tokens.encode_token(self.scope, resume)


def containers(request: container_service_pb2.WatchContainersRequest) -> WatchRequest[ContainerView]:
    """A watch of containers."""
    violations = Violations()
    matches = container_filter(violations, request.filter)
    return _watch_request(violations, request, container_scope(request.filter), matches)


def volumes(request: volume_service_pb2.WatchVolumesRequest) -> WatchRequest[VolumeDetails]:
    """A watch of volumes."""
    return _watch_request(Violations(), request, volume_scope(request.filter), volume_filter(request.filter))


def _watch_request(
    violations: Violations, request: _WatchMessage, scope: bytes, matches: Callable[[T], bool]
) -> WatchRequest[T]:
    resume = opaque_tokens.decode_token(scope, request.resume_token) if request.resume_token else ""
    # Nothing seals an empty one, which would begin with what is there, unasked.
    if resume is None or (request.resume_token and not resume):
        violations.add(
            "resume_token", "is not one that a watch or list with this filter gave out; a watch resumes with its own"
        )
    violations.raise_if_any()
    return WatchRequest(resume=resume or "", listing=not request.changes_only, scope=scope, matches=matches)


def container_scope(asked: container_service_pb2.ContainerFilter) -> bytes:
    """Names what the watches have in common that may take each other's tokens."""
    return _scope(container_service_pb2.WatchContainersRequest.DESCRIPTOR.full_name, asked)


def volume_scope(asked: volume_service_pb2.VolumeFilter) -> bytes:
    """As `container_scope`."""
    return _scope(volume_service_pb2.WatchVolumesRequest.DESCRIPTOR.full_name, asked)


def _scope(name: str, asked: Message) -> bytes:
    return name.encode() + b"\0" + asked.SerializeToString(deterministic=True)
