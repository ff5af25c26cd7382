"""Requests for watches: of what, and from when on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message
from gpudock.v1 import container_service_pb2, volume_service_pb2

from gpudock_server.ports import ContainerView, VolumeSeen
from gpudock_server.rpc import page_token
from gpudock_server.rpc.validation.listing import container_filter, volume_filter
from gpudock_server.rpc.validation.violations import Violations

T = TypeVar("T")

_WatchRequest = container_service_pb2.WatchContainersRequest | volume_service_pb2.WatchVolumesRequest


@dataclass(frozen=True, slots=True)
class Watching(Generic[T]):
    """A watch that is asked for: behind `resume` (empty: from now on, with what is there if `listing`)."""

    resume: str
    listing: bool
    scope: bytes
    wanted: Callable[[T], bool]

    def token(self, resume: str) -> str:
        """What to give a caller who is to go on behind `resume`."""
        return page_token.sealed(self.scope, resume)


def containers(request: container_service_pb2.WatchContainersRequest) -> Watching[ContainerView]:
    """A watch of containers."""
    violations = Violations()
    wanted = container_filter(violations, request.filter)
    return _watching(violations, request, container_scope(request.filter), wanted)


def volumes(request: volume_service_pb2.WatchVolumesRequest) -> Watching[VolumeSeen]:
    """A watch of volumes."""
    return _watching(Violations(), request, volume_scope(request.filter), volume_filter(request.filter))


def _watching(violations: Violations, request: _WatchRequest, scope: bytes, wanted: Callable[[T], bool]) -> Watching[T]:
    resume = page_token.opened(scope, request.resume_token) if request.resume_token else ""
    # Nothing seals an empty one, which would begin with what is there, unasked.
    if resume is None or (request.resume_token and not resume):
        violations.add(
            "resume_token", "is not one that a watch or list with this filter gave out; a watch resumes with its own"
        )
    violations.raise_any()
    return Watching(resume=resume or "", listing=not request.changes_only, scope=scope, wanted=wanted)


def container_scope(asked: container_service_pb2.ContainerFilter) -> bytes:
    """Names what the watches have in common that may take each other's tokens."""
    return _scope(container_service_pb2.WatchContainersRequest.DESCRIPTOR.full_name, asked)


def volume_scope(asked: volume_service_pb2.VolumeFilter) -> bytes:
    """As `container_scope`."""
    return _scope(volume_service_pb2.WatchVolumesRequest.DESCRIPTOR.full_name, asked)


def _scope(name: str, asked: Message) -> bytes:
    return name.encode() + b"\0" + asked.SerializeToString(deterministic=True)
