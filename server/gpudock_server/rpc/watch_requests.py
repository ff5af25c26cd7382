"""Watch requests: the filter, and the position to resume from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message
from gpudock.v1 import container_service_pb2, volume_service_pb2

from gpudock_server import tokens
from gpudock_server.ports import ContainerView, VolumeDetails
from gpudock_server.rpc.list_requests import container_filter, volume_filter
from gpudock_server.rpc.validation.violations import Violations

T = TypeVar("T")

_WatchMessage = container_service_pb2.WatchContainersRequest | volume_service_pb2.WatchVolumesRequest


@dataclass(frozen=True, slots=True)
class WatchRequest(Generic[T]):
    """A watch of the objects that match, from the position `resume`.

    If `resume` is empty, the watch starts now, and with `listing` it first sends the objects that exist.
    """

    resume: str
    listing: bool
    scope: bytes
    matches: Callable[[T], bool]

    def token(self, resume: str) -> str:
        """The resume token for the position `resume`."""
        return tokens.encode_token(self.scope, resume)


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
    resume = tokens.decode_token(scope, request.resume_token) if request.resume_token else ""
    # A valid token never has an empty position, which would start with a list of all objects.
    if resume is None or (request.resume_token and not resume):
        violations.add("resume_token", "is not a resume_token of a watch or list with this filter")
    violations.raise_if_any()
    return WatchRequest(resume=resume or "", listing=not request.changes_only, scope=scope, matches=matches)


def container_scope(criteria: container_service_pb2.ContainerFilter) -> bytes:
    """Identifies the watches that accept each other's resume tokens: those with this filter."""
    return _scope(container_service_pb2.WatchContainersRequest.DESCRIPTOR.full_name, criteria)


def volume_scope(criteria: volume_service_pb2.VolumeFilter) -> bytes:
    """As `container_scope`, for volumes."""
    return _scope(volume_service_pb2.WatchVolumesRequest.DESCRIPTOR.full_name, criteria)


def _scope(name: str, criteria: Message) -> bytes:
    return name.encode() + b"\0" + criteria.SerializeToString(deterministic=True)
