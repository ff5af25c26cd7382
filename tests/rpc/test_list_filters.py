"""Filters of lists and watches: each condition alone, and all together."""

from __future__ import annotations

from typing import Any

import pytest
from gpudock.v1 import (
    container_pb2,
    container_service_pb2,
    gpu_pb2,
    node_service_pb2,
    operation_pb2,
    operation_service_pb2,
    port_pb2,
    volume_service_pb2,
)
from gpudock_server.core.nodes import HeldGpu, HeldPort
from gpudock_server.model.claims import Holder, PortKey
from gpudock_server.model.container import Container, ContainerState, ContainerStatus
from gpudock_server.model.gpu import Gpu, GpuHealth
from gpudock_server.model.operation import Operation, OperationKind, OperationState
from gpudock_server.model.resource import ResourceKind, ResourceRef
from gpudock_server.model.spec import ContainerSpec, Protocol
from gpudock_server.model.volume import Volume, VolumeState
from gpudock_server.ports import ContainerView, VolumeDetails, VolumeView
from gpudock_server.rpc import list_requests, watch_requests

from tests.rpc.fakes import LONG_AGO
from tests.rpc.request_examples import UUID, violations_of

CONTAINER = ContainerView(
    Container(
        name="a",
        uid=UUID,
        node="n1",
        owner="o1",
        generation=1,
        revision=1,
        spec=ContainerSpec(image="i", labels={"k": "v", "other": ""}),
        status=ContainerStatus(state=ContainerState.RUNNING),
        create_time=LONG_AGO,
        update_time=LONG_AGO,
    ),
    1,
    "",
)
VOLUME = VolumeDetails(
    VolumeView(
        Volume(
            name="a",
            uid=UUID,
            node="n1",
            owner="o1",
            generation=1,
            revision=1,
            state=VolumeState.READY,
            size_bytes=0,
            labels={"k": "v", "other": ""},
            create_time=LONG_AGO,
            update_time=LONG_AGO,
        ),
        1,
        "",
    ),
    (),
)
OPERATION = Operation(
    id=UUID,
    kind=OperationKind.STOP,
    target=ResourceRef(kind=ResourceKind.CONTAINER, name="a", uid=UUID),
    node="n1",
    state=OperationState.RUNNING,
    create_time=LONG_AGO,
    update_time=LONG_AGO,
)
HOLDER = Holder(container="a", uid=UUID, node="n1")
GPU = Gpu(uuid="GPU-0", index=0, name="NVIDIA A100", health=GpuHealth.UNHEALTHY)

# Filters by owner, node and labels, which containers and volumes both have.
SHARED_FILTERS: list[tuple[dict[str, Any], bool]] = [
    ({}, True),
    ({"owner": "o1"}, True),
    ({"owner": "o2"}, False),
    ({"node": "n1"}, True),
    ({"node": "n2"}, False),
    ({"labels": {"k": "v"}}, True),
    ({"labels": {"k": ""}}, True),
    ({"labels": {"k": "w"}}, False),
    ({"labels": {"l": ""}}, False),
    ({"labels": {"k": "v", "other": ""}}, True),
    ({"labels": {"k": "v", "missing": ""}}, False),
    ({"owner": "o1", "node": "n1", "labels": {"k": "v"}}, True),
    ({"owner": "o1", "node": "n2", "labels": {"k": "v"}}, False),
    ({"owner": "o2", "node": "n1", "labels": {"k": "v"}}, False),
]
RUNNING, STOPPED = container_pb2.CONTAINER_STATE_RUNNING, container_pb2.CONTAINER_STATE_STOPPED


@pytest.mark.parametrize(
    ("fields", "matches"),
    [
        *SHARED_FILTERS,
        ({"states": [RUNNING]}, True),
        ({"states": [STOPPED]}, False),
        ({"states": [STOPPED, RUNNING]}, True),
        ({"states": [STOPPED], "owner": "o1"}, False),
    ],
)
def test_containers_match_their_filter(fields: dict[str, Any], *, matches: bool) -> None:
    request = container_service_pb2.ContainerFilter(**fields)
    page = list_requests.containers(container_service_pb2.ListContainersRequest(filter=request))
    assert page.matches(CONTAINER) is matches
    watch = watch_requests.containers(container_service_pb2.WatchContainersRequest(filter=request))
    assert watch.matches(CONTAINER) is matches


@pytest.mark.parametrize(("fields", "matches"), SHARED_FILTERS)
def test_volumes_match_their_filter(fields: dict[str, Any], *, matches: bool) -> None:
    request = volume_service_pb2.VolumeFilter(**fields)
    assert list_requests.volumes(volume_service_pb2.ListVolumesRequest(filter=request)).matches(VOLUME) is matches
    assert watch_requests.volumes(volume_service_pb2.WatchVolumesRequest(filter=request)).matches(VOLUME) is matches


@pytest.mark.parametrize(
    ("fields", "matches"),
    [
        ({}, True),
        ({"states": [operation_pb2.OPERATION_STATE_RUNNING]}, True),
        ({"states": [operation_pb2.OPERATION_STATE_FAILED]}, False),
        ({"kinds": [operation_pb2.OPERATION_KIND_STOP_CONTAINER]}, True),
        ({"kinds": [operation_pb2.OPERATION_KIND_START_CONTAINER]}, False),
        ({"node": "n1"}, True),
        ({"node": "n2"}, False),
        ({"target": operation_pb2.ResourceRef(name="a")}, True),
        ({"target": operation_pb2.ResourceRef(name="b")}, False),
        ({"target": operation_pb2.ResourceRef(uid=UUID)}, True),
        ({"target": operation_pb2.ResourceRef(uid=UUID[::-1])}, False),
        ({"target": operation_pb2.ResourceRef(kind=operation_pb2.RESOURCE_KIND_CONTAINER)}, True),
        ({"target": operation_pb2.ResourceRef(kind=operation_pb2.RESOURCE_KIND_VOLUME)}, False),
        ({"target": operation_pb2.ResourceRef(kind=operation_pb2.RESOURCE_KIND_VOLUME, name="a")}, False),
        ({"states": [operation_pb2.OPERATION_STATE_FAILED], "node": "n1"}, False),
    ],
)
def test_operations_match_their_filter(fields: dict[str, Any], *, matches: bool) -> None:
    request = operation_service_pb2.OperationFilter(**fields)
    page = list_requests.operations(operation_service_pb2.ListOperationsRequest(filter=request))
    assert page.matches(OPERATION) is matches


@pytest.mark.parametrize(
    ("fields", "free", "held"),
    [
        ({}, True, True),
        ({"model": "a100"}, True, True),
        ({"model": "h100"}, False, False),
        ({"healths": [gpu_pb2.GPU_HEALTH_UNHEALTHY]}, True, True),
        ({"healths": [gpu_pb2.GPU_HEALTH_HEALTHY]}, False, False),
        ({"healths": [gpu_pb2.GPU_HEALTH_UNSPECIFIED]}, True, True),
        ({"claimed": True}, False, True),
        ({"claimed": False}, True, False),
        ({"container": "a"}, False, True),
        ({"container": "b"}, False, False),
        ({"claimed": False, "container": "a"}, False, False),
    ],
)
def test_gpus(fields: dict[str, Any], *, free: bool, held: bool) -> None:
    page = list_requests.gpus(node_service_pb2.ListGpusRequest(filter=node_service_pb2.GpuFilter(**fields)))
    assert page.matches(HeldGpu(GPU, None)) is free
    assert page.matches(HeldGpu(GPU, HOLDER)) is held


@pytest.mark.parametrize(
    ("fields", "tcp", "udp"),
    [
        ({}, True, True),
        ({"protocols": [port_pb2.PORT_PROTOCOL_TCP]}, True, False),
        ({"protocols": [port_pb2.PORT_PROTOCOL_UDP]}, False, True),
        ({"protocols": [port_pb2.PORT_PROTOCOL_UNSPECIFIED]}, True, False),
        ({"container": "a"}, True, True),
        ({"container": "b"}, False, False),
        ({"container": "b", "protocols": [port_pb2.PORT_PROTOCOL_TCP]}, False, False),
    ],
)
def test_ports_match_their_filter(fields: dict[str, Any], *, tcp: bool, udp: bool) -> None:
    page = list_requests.ports(node_service_pb2.ListPortsRequest(filter=node_service_pb2.PortFilter(**fields)))
    assert page.matches(HeldPort(PortKey(Protocol.TCP, 80), HOLDER)) is tcp
    assert page.matches(HeldPort(PortKey(Protocol.UDP, 80), HOLDER)) is udp


def test_an_invalid_filter_names_its_fields() -> None:
    nine: Any = [9]
    drift = node_service_pb2.ListDriftRequest(filter=node_service_pb2.DriftFilter(kinds=[999], severities=nine))  # type: ignore[list-item]  # no such value: refused
    assert set(violations_of(list_requests.drift, drift)) == {"filter.kinds", "filter.severities"}
    watch = container_service_pb2.WatchContainersRequest(
        filter=container_service_pb2.ContainerFilter(states=[99]),  # type: ignore[list-item]  # no such value: refused
        resume_token="x",  # noqa: S106 - not a token
    )
    assert set(violations_of(watch_requests.containers, watch)) == {"filter.states", "resume_token"}


@pytest.mark.parametrize(
    ("validate", "request_type"),
    [
        (list_requests.revisions, container_service_pb2.ListContainerRevisionsRequest),
        (list_requests.volume_revisions, volume_service_pb2.ListVolumeRevisionsRequest),
    ],
)
def test_revisions_are_listed_by_name_without_a_filter(validate: Any, request_type: Any) -> None:
    assert set(violations_of(validate, request_type(name="A", page_size=-1))) == {"name", "page_size"}
    page = validate(request_type(name="a", page_size=1000))
    assert (page.size, page.resume) == (1000, "")
    assert page.matches(object()) is True
    assert page.token("") == ""
    assert validate(request_type(name="a", page_token=page.token("place"))).resume == "place"


def test_a_watch_begins_with_a_list_or_after_a_token() -> None:
    request = container_service_pb2.WatchContainersRequest(filter=container_service_pb2.ContainerFilter(owner="o"))
    watch = watch_requests.containers(request)
    assert (watch.listing, watch.resume) == (True, "")
    assert watch.scope == watch_requests.container_scope(request.filter)
    request.changes_only = True
    assert not watch_requests.containers(request).listing
    request.resume_token = watch.token("place")
    assert watch_requests.containers(request).resume == "place"
    request.resume_token = watch.token("")
    assert set(violations_of(watch_requests.containers, request)) == {"resume_token"}
    other = volume_service_pb2.WatchVolumesRequest(
        filter=volume_service_pb2.VolumeFilter(owner="o"), resume_token=watch.token("place")
    )
    assert set(violations_of(watch_requests.volumes, other)) == {"resume_token"}
