"""What a container's status is, given what the engine shows."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from gpudock_server.model.container import STOPPED_STATES, Container, ContainerState, ContainerStatus
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.record import now

# A process that the restart policy started less than this ago may be the next one of a crash loop. Until then the
# container stays RESTARTING, so that a loop of short runs is not shown as RUNNING for an instant at each turn.
RESTART_SETTLE_TIME = timedelta(seconds=1)


def observed_status(container: Container, seen: EngineContainer | None) -> ContainerStatus:
    """The status of `container` whose engine container was `seen`; None is "the engine says there is none".

    What it holds is not observed but recorded, and stays as it is.
    """
    status = container.status
    if seen is None:
        return status.model_copy(
            update={
                "state": ContainerState.FAILED,
                "message": "its engine container is gone; it was removed outside gpudock",
                "health": "",
            }
        )
    state = _state(container, seen)
    exit_code = _exit_code(status, seen, state)
    return status.model_copy(
        update={
            "state": state,
            "exit_code": exit_code,
            "oom_killed": _oom_killed(status, seen, state),
            "health": seen.health if seen.running else "",
            "message": seen.error or _message(status, seen, state, exit_code),
            "restart_count": seen.restart_count,
            "start_time": seen.start_time or status.start_time,
            "finish_time": seen.finish_time or (None if seen.start_time else status.finish_time),
        }
    )


def status_after_start(container: Container, seen: EngineContainer | None, exit_code: int | None) -> ContainerStatus:
    """The status of `container` whose process an operation has started.

    `exit_code` is with what the process ended while the operation watched it. None is "it was not watched, or did not
    end": then the container is RUNNING, also if the process has ended since. The engine reports that end in an event,
    which is recorded after the operation, so what the operation reports does not depend on how quick the process was.
    """
    if exit_code is not None:
        return observed_status(container.with_status(state=ContainerState.EXITED, exit_code=exit_code), seen)
    if seen is None or (seen.alive and not seen.restart_count):
        return observed_status(container, seen)
    first_run = replace(seen, state=EngineState.RUNNING, restart_count=0, error="", finish_time=None)
    return observed_status(container, first_run)


def _state(container: Container, seen: EngineContainer) -> ContainerState:
    if seen.state is EngineState.PAUSED:
        return ContainerState.PAUSED
    if seen.state is EngineState.RESTARTING or has_just_restarted(seen):
        return ContainerState.RESTARTING
    if seen.running:
        return ContainerState.RUNNING
    if container.status.state in STOPPED_STATES:
        return container.status.state
    # One that was never started has not ended either.
    return ContainerState.STOPPED if seen.state is EngineState.CREATED else ContainerState.EXITED


def has_just_restarted(seen: EngineContainer) -> bool:
    """Whether its restart policy started it so short a time ago that it may be about to end again."""
    if seen.state is not EngineState.RUNNING or not seen.restart_count or seen.start_time is None:
        return False
    # The absolute value: where the engine's clock is ahead of this one's, the time since the start is negative.
    return abs(now() - seen.start_time) < RESTART_SETTLE_TIME


def _exit_code(status: ContainerStatus, seen: EngineContainer, state: ContainerState) -> int | None:
    """That of the run that ended last, while no other one counts as running."""
    if state in (ContainerState.RUNNING, ContainerState.PAUSED):
        return None
    # The engine forgets the exit code when it starts the process again, and a successor that was not started has none.
    return status.exit_code if seen.alive or seen.start_time is None else seen.exit_code


def _oom_killed(status: ContainerStatus, seen: EngineContainer, state: ContainerState) -> bool:
    """Whether the run that ended last was ended for memory, while no other one counts as running."""
    if state in (ContainerState.RUNNING, ContainerState.PAUSED):
        return False
    if seen.alive or seen.start_time is None:
        return status.oom_killed
    if seen.oom_killed is None:
        # The engine has forgotten which process it was. What was found out when it still knew stands.
        return status.oom_killed if status.finish_time == seen.finish_time else True
    return seen.oom_killed


def _message(status: ContainerStatus, seen: EngineContainer, state: ContainerState, exit_code: int | None) -> str:
    """For people; where the engine itself has no error to show."""
    ended = "" if exit_code is None else f"its process ended with exit code {exit_code}; "
    match state:
        case ContainerState.RESTARTING:
            return f"{ended}the restart policy starts it again (restarts so far: {seen.restart_count})"
        case ContainerState.RUNNING if seen.restart_count:
            if status.exit_code is None and status.restart_count == seen.restart_count:
                return status.message
            before = "" if status.exit_code is None else f"; the run before ended with exit code {status.exit_code}"
            return f"started again by its restart policy (restarts so far: {seen.restart_count}){before}"
        case ContainerState.STOPPED if status.state is ContainerState.STOPPED:
            # Why it was stopped, where gpudock did that without being asked, is true for as long as it is stopped.
            return status.message
        case _:
            return ""
