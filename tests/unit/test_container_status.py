"""The status of a container, from its record and from what the engine shows."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from gpudock_server.core.containers import status as observation
from gpudock_server.core.containers.status import has_just_restarted, observed_status, status_after_start
from gpudock_server.model.container import Container, ContainerState, ContainerStatus, Placement
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.record import now
from gpudock_server.model.spec import ContainerSpec

STARTED, ENDED = datetime(2024, 1, 1, tzinfo=UTC), datetime(2024, 1, 2, tzinfo=UTC)
C, E = ContainerState, EngineState
HELD = Placement(gpu_uuids=("GPU-0",))


def recorded(state: ContainerState, **status: Any) -> Container:
    """Return a container with this recorded status."""
    return Container(
        name="a",
        uid="u",
        node="n",
        owner="",
        generation=1,
        revision=1,
        spec=ContainerSpec(image="i"),
        status=ContainerStatus(state=state, placement=HELD, holds_resources=True, **status),
        create_time=STARTED,
        update_time=STARTED,
    )


def shown(state: EngineState, **fields: Any) -> EngineContainer:
    """Return an engine container in this state."""
    base = EngineContainer(
        id="e",
        name="e",
        image_id="i",
        state=state,
        pid=0,
        exit_code=0,
        oom_killed=False,
        error="",
        labels={},
        gpu_uuids=(),
        start_time=None if state is E.CREATED else STARTED,
        finish_time=ENDED if state in (E.EXITED, E.DEAD) else None,
    )
    return replace(base, **fields)


@pytest.mark.parametrize(
    ("before", "engine", "after"),
    [
        (C.RUNNING, E.RUNNING, C.RUNNING),
        (C.STOPPED, E.RUNNING, C.RUNNING),
        (C.RUNNING, E.PAUSED, C.PAUSED),
        (C.RUNNING, E.RESTARTING, C.RESTARTING),
        (C.RUNNING, E.EXITED, C.EXITED),
        (C.PAUSED, E.EXITED, C.EXITED),
        (C.RUNNING, E.DEAD, C.EXITED),
        (C.STOPPED, E.EXITED, C.STOPPED),
        (C.EXITED, E.EXITED, C.EXITED),
        (C.CREATING, E.CREATED, C.STOPPED),
        (C.EXITED, E.CREATED, C.EXITED),
        (C.FAILED, E.EXITED, C.EXITED),
    ],
)
def test_the_state_follows_the_engine(before: ContainerState, engine: EngineState, after: ContainerState) -> None:
    status = observed_status(recorded(before), shown(engine))
    assert status.state is after
    # The allocation comes from the record.
    assert (status.placement, status.holds_resources) == (HELD, True)


def test_a_container_without_its_engine_container_is_failed() -> None:
    status = observed_status(recorded(C.RUNNING, health="healthy", exit_code=3), None)
    assert (status.state, status.health, status.exit_code) == (C.FAILED, "", 3)
    assert status.message == "its engine container is gone; it was removed outside gpudock"
    assert (status.placement, status.holds_resources) == (HELD, True)


@pytest.mark.parametrize(
    ("before", "engine_container", "exit_code", "oom_killed"),
    [
        (recorded(C.RUNNING), shown(E.EXITED, exit_code=3), 3, False),
        (recorded(C.RUNNING), shown(E.EXITED, exit_code=137, oom_killed=True), 137, True),
        # A running process has no exit code.
        (recorded(C.EXITED, exit_code=3, oom_killed=True), shown(E.RUNNING, exit_code=0), None, False),
        (recorded(C.EXITED, exit_code=3, oom_killed=True), shown(E.PAUSED), None, False),
        # While restarting, the engine shows the end of the last run.
        (recorded(C.RUNNING), shown(E.RESTARTING, exit_code=4, oom_killed=True), 4, True),
        # An engine container that was never started has no exit code; the record keeps the last one.
        (recorded(C.STOPPED, exit_code=5, oom_killed=True), shown(E.CREATED), 5, True),
        # The engine does not know which process was killed.
        (recorded(C.RUNNING), shown(E.EXITED, oom_killed=None), 0, True),
        (recorded(C.EXITED, oom_killed=False, finish_time=ENDED), shown(E.EXITED, oom_killed=None), 0, False),
        (recorded(C.EXITED, oom_killed=False, finish_time=STARTED), shown(E.EXITED, oom_killed=None), 0, True),
    ],
)
def test_how_the_last_run_ended(
    before: Container, engine_container: EngineContainer, exit_code: int | None, *, oom_killed: bool
) -> None:
    status = observed_status(before, engine_container)
    assert (status.exit_code, status.oom_killed) == (exit_code, oom_killed)


def test_health_times_and_restarts_follow_the_engine() -> None:
    running = observed_status(
        recorded(C.STOPPED, finish_time=ENDED), shown(E.RUNNING, health="healthy", restart_count=0)
    )
    assert (running.health, running.start_time, running.finish_time, running.restart_count) == (
        "healthy",
        STARTED,
        None,
        0,
    )
    ended = observed_status(
        recorded(C.RUNNING), shown(E.EXITED, health="healthy", restart_count=2, error="no such file")
    )
    assert (ended.health, ended.finish_time, ended.restart_count) == ("", ENDED, 2)
    assert ended.message == "no such file"
    fresh = observed_status(recorded(C.STOPPED, start_time=STARTED, finish_time=ENDED), shown(E.CREATED))
    assert (fresh.start_time, fresh.finish_time) == (STARTED, ENDED)


@pytest.mark.parametrize(
    ("state", "count", "ago", "restarting"),
    [
        (E.RUNNING, 1, 0.999, True),
        (E.RUNNING, 1, -0.999, True),
        (E.RUNNING, 1, 1, False),
        (E.RUNNING, 1, -1, False),
        (E.RUNNING, 0, 0.2, False),
        (E.EXITED, 1, 0.2, False),
    ],
)
def test_a_process_that_was_restarted_within_a_second_counts_as_restarting(
    monkeypatch: pytest.MonkeyPatch, state: EngineState, count: int, ago: float, *, restarting: bool
) -> None:
    moment = now()
    monkeypatch.setattr(observation, "now", lambda: moment)
    engine_container = shown(state, restart_count=count, start_time=moment - timedelta(seconds=ago))
    assert has_just_restarted(engine_container) is restarting
    if restarting:
        status = observed_status(recorded(C.RUNNING, exit_code=7), engine_container)
        assert (status.state, status.exit_code) == (C.RESTARTING, 7)
    assert not has_just_restarted(replace(engine_container, start_time=None))


def test_the_status_after_a_start() -> None:
    container = recorded(C.STOPPED)
    watched = status_after_start(container, shown(E.EXITED, exit_code=3), 3)
    assert (watched.state, watched.exit_code) == (C.EXITED, 3)
    running = status_after_start(container, shown(E.RUNNING), None)
    assert running.state is C.RUNNING
    # The end of the process is recorded later, from its event.
    for engine_container in (
        shown(E.EXITED, exit_code=3, error="e"),
        shown(E.RESTARTING, restart_count=2, error="e"),
        shown(E.RUNNING, restart_count=1, start_time=now()),
    ):
        status = status_after_start(container, engine_container, None)
        assert (status.state, status.exit_code, status.restart_count) == (C.RUNNING, None, 0)
        assert (status.message, status.finish_time) == ("", None)
    assert status_after_start(container, shown(E.PAUSED), None).state is C.PAUSED
    assert status_after_start(container, None, None).state is C.FAILED


@pytest.mark.parametrize(
    ("before", "engine_container", "message"),
    [
        (recorded(C.RUNNING), shown(E.EXITED, exit_code=3), ""),
        (
            recorded(C.RUNNING),
            shown(E.RESTARTING, exit_code=3, restart_count=2),
            "process exited with code 3; restarting by restart policy (restarts so far: 2)",
        ),
        (
            recorded(C.RESTARTING, exit_code=3),
            shown(E.RUNNING, restart_count=2),
            "restarted by restart policy (restarts so far: 2); previous exit code 3",
        ),
        (
            recorded(C.RESTARTING),
            shown(E.RUNNING, restart_count=2),
            "restarted by restart policy (restarts so far: 2)",
        ),
        (recorded(C.RUNNING, restart_count=2, message="as it was"), shown(E.RUNNING, restart_count=2), "as it was"),
        (recorded(C.RUNNING, message="old"), shown(E.RUNNING), ""),
        (recorded(C.STOPPED, message="why"), shown(E.EXITED), "why"),
        (recorded(C.EXITED, message="old"), shown(E.EXITED), ""),
        (recorded(C.CREATING, message="old"), shown(E.CREATED), ""),
    ],
)
def test_the_message_of_a_status(before: Container, engine_container: EngineContainer, message: str) -> None:
    assert observed_status(before, engine_container).message == message
