"""Requests for lists: which page, and what is to be on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message
from gpudock.v1 import (
    container_service_pb2,
    gpu_pb2,
    node_service_pb2,
    operation_pb2,
    operation_service_pb2,
    port_pb2,
    volume_service_pb2,
)

from gpudock_server.core.nodes import HeldGpu, HeldPort
from gpudock_server.model.container import ContainerState
from gpudock_server.model.drift import Drift, DriftKind, DriftSeverity
from gpudock_server.model.gpu import GpuHealth
from gpudock_server.model.operation import Operation, OperationKind, OperationState
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.spec import Protocol
from gpudock_server.model.volume import VolumeRevision
from gpudock_server.ports import ContainerView, RevisionView, VolumeDetails
from gpudock_server.rpc import opaque_tokens
from gpudock_server.rpc.containers import messages as container_messages
from gpudock_server.rpc.containers.spec_requests import PROTOCOL_OF
from gpudock_server.rpc.nodes import drift_messages, gpu_messages
from gpudock_server.rpc.operations import messages as operation_messages
from gpudock_server.rpc.validation import fields
from gpudock_server.rpc.validation.violations import Violations

T = TypeVar("T")

_DEFAULT_PAGE = 100
_LARGEST_PAGE = 1000

_CONTAINER_STATES: Mapping[int, ContainerState] = {value: state for state, value in container_messages.STATES.items()}
_OPERATION_STATES: Mapping[int, OperationState] = {value: state for state, value in operation_messages.STATES.items()}
_OPERATION_KINDS: Mapping[int, OperationKind] = {value: kind for kind, value in operation_messages.KINDS.items()}
_DRIFT_KINDS: Mapping[int, DriftKind] = {value: kind for kind, value in drift_messages.KINDS.items()}
_SEVERITIES: Mapping[int, DriftSeverity] = {value: one for one, value in drift_messages.SEVERITIES.items()}
# In these filters the value 0 has a meaning of its own.
_GPU_HEALTHS: Mapping[int, GpuHealth | None] = {
    gpu_pb2.GPU_HEALTH_UNSPECIFIED: None,
    **{value: health for health, value in gpu_messages.HEALTHS.items()},
}
_PROTOCOLS: Mapping[int, Protocol] = {port_pb2.PORT_PROTOCOL_UNSPECIFIED: Protocol.TCP, **PROTOCOL_OF}
_RESOURCE_KINDS: Mapping[int, ResourceKind | None] = {
    operation_pb2.RESOURCE_KIND_UNSPECIFIED: None,
    **{value: kind for kind, value in operation_messages.RESOURCE_KINDS.items()},
}


@dataclass(frozen=True, slots=True)
class ListRequest(Generic[T]):
    """A page that is asked for: its size, where the one before it ended (empty: the first), and what belongs on it.

    `scope` names everything that has to be the same for all pages of one list.
    """

    size: int
    resume: str
    scope: bytes
    matches: Callable[[T], bool]

    def token(self, resume: str) -> str:
        """What to give a caller who is to go on at `resume`; empty where there is no more."""
        return opaque_tokens.encode_token(self.scope, resume) if resume else ""


def containers(request: container_service_pb2.ListContainersRequest) -> ListRequest[ContainerView]:
    """A page of containers."""
    violations = Violations()
    return _list_request(violations, request, container_filter(violations, request.filter))


def container_filter(
    violations: Violations, asked: container_service_pb2.ContainerFilter
) -> Callable[[ContainerView], bool]:
    """Whether a container is one of those asked for."""
    states = fields.enum_values(violations.at("filter"), "states", asked.states, _CONTAINER_STATES)
    labels = dict(asked.labels)

    def matches(view: ContainerView) -> bool:
        head = view.container
        return (
            (not states or head.status.state in states)
            and asked.owner in ("", head.owner)
            and asked.node in ("", head.node)
            and all(key in head.spec.labels and value in ("", head.spec.labels[key]) for key, value in labels.items())
        )

    return matches


def revisions(request: container_service_pb2.ListContainerRevisionsRequest) -> ListRequest[RevisionView]:
    """A page of a container's revisions."""
    violations = Violations()
    fields.name(violations, "name", request.name)
    return _list_request(violations, request, lambda _: True)


def volumes(request: volume_service_pb2.ListVolumesRequest) -> ListRequest[VolumeDetails]:
    """A page of volumes."""
    return _list_request(Violations(), request, volume_filter(request.filter))


def volume_filter(asked: volume_service_pb2.VolumeFilter) -> Callable[[VolumeDetails], bool]:
    """Whether a volume is one of those asked for."""
    labels = dict(asked.labels)

    def matches(seen: VolumeDetails) -> bool:
        head = seen.view.volume
        return (
            asked.owner in ("", head.owner)
            and asked.node in ("", head.node)
            and all(key in head.labels and value in ("", head.labels[key]) for key, value in labels.items())
        )

    return matches


def volume_revisions(request: volume_service_pb2.ListVolumeRevisionsRequest) -> ListRequest[VolumeRevision]:
    """A page of a volume's revisions."""
    violations = Violations()
    fields.name(violations, "name", request.name)
    return _list_request(violations, request, lambda _: True)


def operations(request: operation_service_pb2.ListOperationsRequest) -> ListRequest[Operation]:
    """A page of operations."""
    violations = Violations()
    asked, target = request.filter, request.filter.target
    here = violations.at("filter")
    states = fields.enum_values(here, "states", asked.states, _OPERATION_STATES)
    kinds = fields.enum_values(here, "kinds", asked.kinds, _OPERATION_KINDS)
    if target.kind not in _RESOURCE_KINDS:
        here.at("target").add("kind", f"{target.kind} is not a kind of object")

    def matches(record: Operation) -> bool:
        return (
            (not states or record.state in states)
            and (not kinds or record.kind in kinds)
            and _RESOURCE_KINDS[target.kind] in (None, record.target.kind)
            and target.name in ("", record.target.name)
            and target.uid in ("", record.target.uid)
            and asked.node in ("", record.node)
        )

    return _list_request(violations, request, matches)


def gpus(request: node_service_pb2.ListGpusRequest) -> ListRequest[HeldGpu]:
    """A page of cards."""
    violations = Violations()
    asked = request.filter
    healths = fields.enum_values(violations.at("filter"), "healths", asked.healths, _GPU_HEALTHS)

    def matches(held: HeldGpu) -> bool:
        holder = held.holder.container if held.holder else ""
        return (
            (not healths or None in healths or held.gpu.health in healths)
            and asked.model.casefold() in held.gpu.name.casefold()
            and (not asked.HasField("claimed") or asked.claimed == (held.holder is not None))
            and asked.container in ("", holder)
        )

    return _list_request(violations, request, matches)


def ports(request: node_service_pb2.ListPortsRequest) -> ListRequest[HeldPort]:
    """A page of claimed ports."""
    violations = Violations()
    asked = request.filter
    protocols = fields.enum_values(violations.at("filter"), "protocols", asked.protocols, _PROTOCOLS)

    def matches(held: HeldPort) -> bool:
        return (not protocols or held.key.protocol in protocols) and asked.container in ("", held.holder.container)

    return _list_request(violations, request, matches)


def drift(request: node_service_pb2.ListDriftRequest) -> ListRequest[Drift]:
    """A page of findings."""
    violations = Violations()
    asked = request.filter
    here = violations.at("filter")
    kinds = fields.enum_values(here, "kinds", asked.kinds, _DRIFT_KINDS)
    severities = fields.enum_values(here, "severities", asked.severities, _SEVERITIES)

    def matches(found: Drift) -> bool:
        return (
            (not kinds or found.kind in kinds)
            and (not severities or found.severity in severities)
            and asked.container in ("", found.container)
        )

    return _list_request(violations, request, matches)


_ListMessage = (
    container_service_pb2.ListContainersRequest
    | container_service_pb2.ListContainerRevisionsRequest
    | operation_service_pb2.ListOperationsRequest
    | node_service_pb2.ListGpusRequest
    | node_service_pb2.ListPortsRequest
    | node_service_pb2.ListDriftRequest
    | volume_service_pb2.ListVolumesRequest
    | volume_service_pb2.ListVolumeRevisionsRequest
)


def _list_request(violations: Violations, request: _ListMessage, matches: Callable[[T], bool]) -> ListRequest[T]:
    scope = _scope(request)
    resume = opaque_tokens.decode_token(scope, request.page_token) if request.page_token else ""
    if resume is None:
        violations.add("page_token", "is not one that this list gave out; a list has the same filter on all its pages")
    if request.page_size < 0:
        violations.add("page_size", "must not be negative")
    violations.raise_if_any()
    return ListRequest(
        size=min(request.page_size or _DEFAULT_PAGE, _LARGEST_PAGE),
        resume=resume or "",
        scope=scope,
        matches=matches,
    )


def _scope(request: _ListMessage) -> bytes:
    same: Message = type(request)()
    same.CopyFrom(request)
    same.ClearField("page_token")
    # Pages may be of different sizes.
    same.ClearField("page_size")
    return request.DESCRIPTOR.full_name.encode() + b"\0" + same.SerializeToString(deterministic=True)
