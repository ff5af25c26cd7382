"""Drift as the Python client and the command line show it."""

from __future__ import annotations

import re

import pytest
from gpudock import Client
from gpudock.cli._text import moment_text
from gpudock.v1 import drift_pb2, node_service_pb2

from tests.clients.command import run
from tests.clients.scripted import Context, ScriptedServer, saying


def finding(container: str) -> drift_pb2.Drift:
    """A restart policy that could not be set back."""
    return drift_pb2.Drift(
        kind=drift_pb2.DRIFT_KIND_RESTART_POLICY_CHANGED,
        severity=drift_pb2.DRIFT_SEVERITY_WARNING,
        remedy=drift_pb2.DRIFT_REMEDY_RETRIED,
        container=container,
        message=f"the restart policy of {container} was changed outside gpudock",
        plan="it is tried again",
    )


async def test_findings_come_in_pages_and_by_what_was_asked(server: ScriptedServer, client: Client) -> None:
    async def page(request: node_service_pb2.ListDriftRequest, _: Context) -> node_service_pb2.ListDriftResponse:
        if request.page_token:
            return node_service_pb2.ListDriftResponse(drift=[finding("b")])
        return node_service_pb2.ListDriftResponse(drift=[finding("a")], next_page_token="more")  # noqa: S106 - of a page

    server.on("ListDrift", page)
    listing = client.node.drift(kinds=["restart-policy-changed"], severities=["warning", "error"], container="x")
    assert [one.container for one in await listing] == ["a", "b"]
    for request in server.requests["ListDrift"]:
        assert list(request.filter.kinds) == [drift_pb2.DRIFT_KIND_RESTART_POLICY_CHANGED]
        severities = [drift_pb2.DRIFT_SEVERITY_WARNING, drift_pb2.DRIFT_SEVERITY_ERROR]
        assert list(request.filter.severities) == severities
        assert request.filter.container == "x"
    with pytest.raises(ValueError, match="warning"):
        client.node.drift(severities=["dreadful"])


async def test_a_line_for_each_finding(server: ScriptedServer) -> None:
    server.on("ListDrift", saying(node_service_pb2.ListDriftResponse(drift=[finding("train")])))
    shown = await run(server.address, "drift", "--severity", "warning", "--container", "train")
    row = re.split(r"\s{2,}", shown.out.splitlines()[1])
    assert row[:3] == ["WARNING", "restart-policy-changed", "train"]
    assert row[-4:] == ["retried", "-", "the restart policy of train was changed outside gpudock", "it is tried again"]
    assert shown.err == ""
    asked = server.requests["ListDrift"][-1].filter
    assert (list(asked.severities), asked.container) == ([drift_pb2.DRIFT_SEVERITY_WARNING], "train")


async def test_a_finding_that_is_acted_on_later_shows_when(server: ScriptedServer) -> None:
    found = finding("train")
    found.due_time.FromSeconds(1_700_000_000)
    server.on("ListDrift", saying(node_service_pb2.ListDriftResponse(drift=[found])))
    assert moment_text(found.due_time) in (await run(server.address, "drift")).out


async def test_a_comparison_that_failed_is_said_beside_the_list(server: ScriptedServer) -> None:
    answer = node_service_pb2.ListDriftResponse(drift=[finding("train")], trouble="the engine does not answer")
    server.on("ListDrift", saying(answer))
    shown = await run(server.address, "drift")
    assert "not up to date: the engine does not answer" in shown.err
    assert "train" in shown.out
