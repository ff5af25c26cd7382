"""ListDrift over a channel: its filters, pages and comparison times."""

from __future__ import annotations

from typing import Any

import grpc.aio
import pytest
from gpudock.v1 import drift_pb2, node_service_pb2
from gpudock_server.errors import EngineUnavailable
from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy

from tests.rpc.in_memory_server import InMemoryServer


def _finding(kind: DriftKind, container: str, remedy: DriftRemedy) -> Drift:
    return Drift(kind=kind, remedy=remedy, container=container, message=f"{container} differs", plan="what is done")


FINDINGS = (
    _finding(DriftKind.CONTAINER_GONE, "a", DriftRemedy.REPAIRED),
    _finding(DriftKind.CLAIM_CONFLICT, "b", DriftRemedy.REPORTED),
    _finding(DriftKind.CONTAINER_RENAMED, "b", DriftRemedy.RETRIED),
    _finding(DriftKind.RESTART_POLICY_CHANGED, "c", DriftRemedy.REPAIRED),
)


def compared(server: InMemoryServer) -> None:
    """Record a complete comparison that found all of FINDINGS."""
    with server.drift.full_pass() as note:
        for finding in FINDINGS:
            note(finding)


def _aborted(server: InMemoryServer) -> None:
    with server.drift.full_pass() as note:
        note(_finding(DriftKind.CONTAINER_GONE, "d", DriftRemedy.REPAIRED))
        raise EngineUnavailable(call="list containers", detail="it does not answer")


async def listed(server: InMemoryServer, page_size: int = 0, **filters: Any) -> list[list[tuple[str, str]]]:
    """Return the pages of a list, with container and kind of each drift."""
    request = node_service_pb2.ListDriftRequest(page_size=page_size, filter=node_service_pb2.DriftFilter(**filters))
    pages = []
    while True:
        answer = await server.nodes.ListDrift(request)
        kind = drift_pb2.DriftKind.Name
        pages.append([(drift.container, kind(drift.kind).removeprefix("DRIFT_KIND_")) for drift in answer.drift])
        if not answer.next_page_token:
            return pages
        request.page_token = answer.next_page_token


async def test_drift_is_listed_by_container_and_kind(server: InMemoryServer) -> None:
    before = await server.nodes.ListDrift(node_service_pb2.ListDriftRequest())
    assert not before.HasField("compare_time"), "compared before the first comparison"
    compared(server)
    answer = await server.nodes.ListDrift(node_service_pb2.ListDriftRequest())
    assert answer.HasField("compare_time")
    assert [(drift.container, drift.message, drift.plan) for drift in answer.drift] == [
        (name, f"{name} differs", "what is done") for name in "abbc"
    ]
    assert all(drift.HasField("since_time") for drift in answer.drift)


async def test_drift_is_filtered(server: InMemoryServer) -> None:
    compared(server)
    assert await listed(server, container="b") == [[("b", "CLAIM_CONFLICT"), ("b", "CONTAINER_RENAMED")]]
    kinds = [drift_pb2.DRIFT_KIND_CONTAINER_GONE, drift_pb2.DRIFT_KIND_RESTART_POLICY_CHANGED]
    assert await listed(server, kinds=kinds) == [[("a", "CONTAINER_GONE"), ("c", "RESTART_POLICY_CHANGED")]]
    for severity, found in (
        (drift_pb2.DRIFT_SEVERITY_INFO, ["a", "c"]),
        (drift_pb2.DRIFT_SEVERITY_WARNING, ["b"]),
        (drift_pb2.DRIFT_SEVERITY_ERROR, ["b"]),
    ):
        assert [name for name, _ in (await listed(server, severities=[severity]))[0]] == found
    assert await listed(server, container="b", kinds=kinds) == [[]]


async def test_pages_are_filled_with_matching_drift(server: InMemoryServer) -> None:
    compared(server)
    assert [len(page) for page in await listed(server, page_size=3)] == [3, 1]
    two = await listed(server, page_size=1, severities=[drift_pb2.DRIFT_SEVERITY_INFO])
    assert two == [[("a", "CONTAINER_GONE")], [("c", "RESTART_POLICY_CHANGED")]]


async def test_a_comparison_that_was_aborted_leaves_the_list_and_says_why(server: InMemoryServer) -> None:
    compared(server)
    with pytest.raises(EngineUnavailable):
        _aborted(server)
    answer = await server.nodes.ListDrift(node_service_pb2.ListDriftRequest())
    assert [drift.container for drift in answer.drift] == list("abbc")
    assert "it does not answer" in answer.trouble
    assert answer.HasField("trouble_time")


async def test_invalid_filters_are_refused(server: InMemoryServer) -> None:
    filters = node_service_pb2.DriftFilter(kinds=[0, 99], severities=[0])  # type: ignore[list-item]  # an invalid value
    request = node_service_pb2.ListDriftRequest(filter=filters, page_size=-1, page_token="nonsense")  # noqa: S106 - a page token
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await server.nodes.ListDrift(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    for said in (
        "filter.kinds: has the unknown values 0, 99",
        "filter.severities: has the unknown values 0",
        "page_token: is not",
        "page_size: must",
    ):
        assert said in str(refused.value.details())
