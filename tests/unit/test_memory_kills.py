"""killed_by_oom: whether events of the engine show that the main process was killed for lack of memory."""

from __future__ import annotations

from typing import Any

import pytest
from gpudock_server.adapters.docker.oom_kills import killed_by_oom

SECOND = 1_000_000_000


def event(action: str, seconds: float, **attributes: str) -> dict[str, Any]:
    """Return an event of the engine."""
    return {"Action": action, "timeNano": round(seconds * SECOND), "Actor": {"Attributes": attributes}}


START, DIE = event("start", 1), event("die", 10.05)
OOM = event("oom", 9.95)


@pytest.mark.parametrize(
    ("events", "killed"),
    [
        ([START, OOM, DIE], True),
        ([START, DIE], False),
        ([START, OOM, event("kill", 9.97, signal="9"), DIE], False),
        ([START, OOM, event("kill", 9.97, signal="15"), DIE], True),
        ([START, event("kill", 9.9, signal="9"), OOM, DIE], True),
        ([START, event("oom", 7), DIE], False),
        ([START, event("oom", 7), OOM, DIE], True),
        ([event("oom", 9.5), event("die", 9.6), event("start", 9.7), DIE], False),
        ([START, DIE, event("start", 10.2), event("oom", 10.3), event("die", 10.4)], False),
        ([START, OOM], None),
        ([], None),
    ],
)
def test_only_an_exit_right_after_an_oom_event_counts(events: list[dict[str, Any]], killed: bool | None) -> None:  # noqa: FBT001 - a parameter of the test
    assert killed_by_oom(events, 10 * SECOND, SECOND) is killed


def test_the_time_between_event_and_exit_can_be_longer() -> None:
    events = [START, event("oom", 7), DIE]
    assert killed_by_oom(events, 10 * SECOND, 5 * SECOND) is True
