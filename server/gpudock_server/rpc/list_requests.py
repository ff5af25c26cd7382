"""List requests: the page size, the page token, and the filter."""

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

from gpudock_server import tokens
from gpudock_server.core.nodes import HeldGpu, HeldPort
from gpudock_server.model.drift import Drift
from gpudock_server.model.gpu import GpuHealth
from gpudock_server.model.operation import Operation
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.spec import Protocol
from gpudock_server.model.volume import VolumeRevision
from gpudock_server.ports import ContainerView, RevisionView, VolumeDetails
from gpudock_server.rpc.containers import messages as container_messages
from gpudock_server.rpc.containers.spec_requests import PROTOCOL_OF
from gpudock_server.rpc.nodes import messages as node_messages
from gpudock_server.rpc.operations import messages as operation_messages
from gpudock_server.rpc.validation import fields
from gpudock_server.rpc.validation.violations import Violations

T = TypeVar("T")
K = TypeVar("K")

_DEFAULT_PAGE = 100
_LARGEST_PAGE = 1000


def _inverse(values: Mapping[K, int]) -> dict[int, K]:
    return {value: key for key, value in values.items()}


_CONTAINER_STATES = _inverse(container_messages.STATES)
_OPERATION_STATES = _inverse(operation_messages.STATES)
_OPERATION_KINDS = _inverse(operation_messages.KINDS)
_DRIFT_KINDS = _inverse(node_messages.DRIFT_KINDS)
_SEVERITIES = _inverse(node_messages.DRIFT_SEVERITIES)
# In these filters the value 0 means "any", or a default.
_GPU_HEALTHS: Mapping[int, GpuHealth | None] = {
    gpu_pb2.GPU_HEALTH_UNSPECIFIED: None,
    **{value: health for health, value in node_messages.GPU_HEALTHS.items()},
}
_PROTOCOLS: Mapping[int, Protocol] = {port_pb2.PORT_PROTOCOL_UNSPECIFIED: Protocol.TCP, **PROTOCOL_OF}
_RESOURCE_KINDS: Mapping[int, ResourceKind | None] = {
    operation_pb2.RESOURCE_KIND_UNSPECIFIED: None,
    **{value: kind for kind, value in operation_messages.RESOURCE_KINDS.items()},
}


@dataclass(frozen=True, slots=True)
class ListRequest(Generic[T]):
    """One page of a list: its maximum size, the position where the previous page ended (empty: first page), a filter.

    `scope` identifies the list: all of the request that must be the same for all its pages.
    """

    size: int
    resume: str
    scope: bytes
    matches: Callable[[T], bool]

    def token(self, resume: str) -> str:
        """The page token for the position `resume`; empty at the end of the list."""
        return tokens.encode_token(self.scope, resume) if resume else ""


def containers(request: container_service_pb2.ListContainersRequest) -> ListRequest[ContainerView]:
    """Check a ListContainersRequest."""
    violations = Violations()
    return _list_request(violations, request, container_filter(violations, request.filter))


def container_filter(
    violations: Violations, criteria: container_service_pb2.ContainerFilter
) -> Callable[[ContainerView], bool]:
    """A predicate for containers that match the filter."""
    states = fields.enum_values(violations.at("filter"), "states", criteria.states, _CONTAINER_STATES)
    labels = dict(criteria.labels)

    def matches(view: ContainerView) -> bool:
        head = view.container
        return (
            (not states or head.status.state in states)
            and criteria.owner in ("", head.owner)
            and criteria.node in ("", head.node)
            and all(key in head.spec.labels and value in ("", head.spec.labels[key]) for key, value in labels.items())
        )

    return matches


def revisions(request: container_service_pb2.ListContainerRevisionsRequest) -> ListRequest[RevisionView]:
    """Check a ListContainerRevisionsRequest."""
    violations = Violations()
    fields.name(violations, "name", request.name)
    return _list_request(violations, request, lambda _: True)


def volumes(request: volume_service_pb2.ListVolumesRequest) -> ListRequest[VolumeDetails]:
    """Check a ListVolumesRequest."""
    return _list_request(Violations(), request, volume_filter(request.filter))


def volume_filter(criteria: volume_service_pb2.VolumeFilter) -> Callable[[VolumeDetails], bool]:
    """A predicate for volumes that match the filter."""
    labels = dict(criteria.labels)

    def matches(details: VolumeDetails) -> bool:
        head = details.view.volume
        return (
            criteria.owner in ("", head.owner)
            and criteria.node in ("", head.node)
            and all(key in head.labels and value in ("", head.labels[key]) for key, value in labels.items())
        )

    return matches


def volume_revisions(request: volume_service_pb2.ListVolumeRevisionsRequest) -> ListRequest[VolumeRevision]:
    """Check a ListVolumeRevisionsRequest."""
    violations = Violations()
    fields.name(violations, "name", request.name)
    return _list_request(violations, request, lambda _: True)


def operations(request: operation_service_pb2.ListOperationsRequest) -> ListRequest[Operation]:
    """Check a ListOperationsRequest."""
    violations = Violations()
    criteria, target = request.filter, request.filter.target
    filter_violations = violations.at("filter")
    states = fields.enum_values(filter_violations, "states", criteria.states, _OPERATION_STATES)
    kinds = fields.enum_values(filter_violations, "kinds", criteria.kinds, _OPERATION_KINDS)
    if target.kind not in _RESOURCE_KINDS:
        filter_violations.at("target").add(
            "kind", f"is {target.kind}; must be one of {', '.join(map(str, _RESOURCE_KINDS))}"
        )

    def matches(record: Operation) -> bool:
        return (
            (not states or record.state in states)
            and (not kinds or record.kind in kinds)
            and _RESOURCE_KINDS[target.kind] in (None, record.target.kind)
            and target.name in ("", record.target.name)
            and target.uid in ("", record.target.uid)
            and criteria.node in ("", record.node)
        )

    return _list_request(violations, request, matches)


def gpus(request: node_service_pb2.ListGpusRequest) -> ListRequest[HeldGpu]:
    """Check a ListGpusRequest."""
    violations = Violations()
    criteria = request.filter
    healths = fields.enum_values(violations.at("filter"), "healths", criteria.healths, _GPU_HEALTHS)

    def matches(held: HeldGpu) -> bool:
        holder = held.holder.container if held.holder else ""
        return (
            (not healths or None in healths or held.gpu.health in healths)
            and criteria.model.casefold() in held.gpu.name.casefold()
            and (not criteria.HasField("claimed") or criteria.claimed == (held.holder is not None))
            and criteria.container in ("", holder)
        )

    return _list_request(violations, request, matches)


def ports(request: node_service_pb2.ListPortsRequest) -> ListRequest[HeldPort]:
    """Check a ListPortsRequest."""
    violations = Violations()
    criteria = request.filter
    protocols = fields.enum_values(violations.at("filter"), "protocols", criteria.protocols, _PROTOCOLS)

    def matches(held: HeldPort) -> bool:
        return (not protocols or held.key.protocol in protocols) and criteria.container in ("", held.holder.container)

    return _list_request(violations, request, matches)


def drift(request: node_service_pb2.ListDriftRequest) -> ListRequest[Drift]:
    """Check a ListDriftRequest."""
    violations = Violations()
    criteria = request.filter
    filter_violations = violations.at("filter")
    kinds = fields.enum_values(filter_violations, "kinds", criteria.kinds, _DRIFT_KINDS)
    severities = fields.enum_values(filter_violations, "severities", criteria.severities, _SEVERITIES)

    def matches(item: Drift) -> bool:
        return (
            (not kinds or item.kind in kinds)
            and (not severities or item.severity in severities)
            and criteria.container in ("", item.container)
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
    resume = tokens.decode_token(scope, request.page_token) if request.page_token else ""
    if resume is None:
        violations.add("page_token", "is not a page_token of this list; the filter must be the same for all pages")
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
    identity: Message = type(request)()
    identity.CopyFrom(request)
    identity.ClearField("page_token")
    # The pages of one list may have different sizes.
    identity.ClearField("page_size")
    return request.DESCRIPTOR.full_name.encode() + b"\0" + identity.SerializeToString(deterministic=True)
