"""Drift in the Python client and the command."""

from __future__ import annotations

import re

import pytest
from gpudock import Client
from gpudock.cli._text import moment_text
from gpudock.v1 import drift_pb2, node_service_pb2

from tests.clients.command import run
from tests.clients.scripted_server import Context, ScriptedServer, reply_with


def restart_policy_drift(container: str) -> drift_pb2.Drift:
    """Return a drift of a restart policy."""
    return drift_pb2.Drift(
        kind=drift_pb2.DRIFT_KIND_RESTART_POLICY_CHANGED,
        severity=drift_pb2.DRIFT_SEVERITY_WARNING,
        remedy=drift_pb2.DRIFT_REMEDY_RETRIED,
        container=container,
        message=f"the restart policy of {container} was changed outside gpudock",
        plan="it will be retried",
    )


async def test_drift_is_listed_in_pages_with_the_requested_filter(server: ScriptedServer, client: Client) -> None:
    async def page(request: node_service_pb2.ListDriftRequest, _: Context) -> node_service_pb2.ListDriftResponse:
        if request.page_token:
            return node_service_pb2.ListDriftResponse(drift=[restart_policy_drift("b")])
        return node_service_pb2.ListDriftResponse(drift=[restart_policy_drift("a")], next_page_token="more")  # noqa: S106 - a page token

    server.on("ListDrift", page)
    listing = client.node.drift(kinds=["restart-policy-changed"], severities=["warning", "error"], container="x")
    assert [drift.container for drift in await listing] == ["a", "b"]
    for request in server.requests["ListDrift"]:
        assert list(request.filter.kinds) == [drift_pb2.DRIFT_KIND_RESTART_POLICY_CHANGED]
        severities = [drift_pb2.DRIFT_SEVERITY_WARNING, drift_pb2.DRIFT_SEVERITY_ERROR]
        assert list(request.filter.severities) == severities
        assert request.filter.container == "x"
    with pytest.raises(ValueError, match="warning"):
        client.node.drift(severities=["unknown"])


async def test_each_drift_is_one_line(server: ScriptedServer) -> None:
    server.on("ListDrift", reply_with(node_service_pb2.ListDriftResponse(drift=[restart_policy_drift("train")])))
    shown = await run(server.address, "drift", "--severity", "warning", "--container", "train")
    row = re.split(r"\s{2,}", shown.out.splitlines()[1])
    assert row[:3] == ["WARNING", "restart-policy-changed", "train"]
    assert row[-4:] == ["retried", "-", "the restart policy of train was changed outside gpudock", "it will be retried"]
    assert shown.err == ""
    sent = server.requests["ListDrift"][-1].filter
    assert (list(sent.severities), sent.container) == ([drift_pb2.DRIFT_SEVERITY_WARNING], "train")


async def test_a_drift_that_is_repaired_later_shows_the_time(server: ScriptedServer) -> None:
    drift = restart_policy_drift("train")
    drift.due_time.FromSeconds(1_700_000_000)
    server.on("ListDrift", reply_with(node_service_pb2.ListDriftResponse(drift=[drift])))
    assert moment_text(drift.due_time) in (await run(server.address, "drift")).out


async def test_a_failed_comparison_is_reported_with_the_list(server: ScriptedServer) -> None:
    answer = node_service_pb2.ListDriftResponse(
        drift=[restart_policy_drift("train")], trouble="the engine does not answer"
    )
    server.on("ListDrift", reply_with(answer))
    shown = await run(server.address, "drift")
    assert "not up to date: the engine does not answer" in shown.err
    assert "train" in shown.out
