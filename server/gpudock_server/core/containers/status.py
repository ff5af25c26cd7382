"""Derives a container's status from what the engine reports."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from gpudock_server.model.container import STOPPED_STATES, Container, ContainerState, ContainerStatus
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.record import now

# A process that the restart policy started less than this ago may be part of a crash loop. Until then the container
# stays RESTARTING, so that a crash loop is not reported as RUNNING for an instant at each restart.
RESTART_SETTLE_TIME = timedelta(seconds=1)


def observed_status(container: Container, engine_container: EngineContainer | None) -> ContainerStatus:
    """The status of `container` by its engine container; None: the engine has none.

    The GPUs and ports in the status come from the record, not from the engine, and stay unchanged.
    """
    status = container.status
    if engine_container is None:
        return status.model_copy(
            update={
                "state": ContainerState.FAILED,
                "message": "its engine container is gone; it was removed outside gpudock",
                "health": "",
            }
        )
    state = _state(container, engine_container)
    exit_code = _exit_code(status, engine_container, state)
    return status.model_copy(
        update={
            "state": state,
            "exit_code": exit_code,
            "oom_killed": _oom_killed(status, engine_container, state),
            "health": engine_container.health if engine_container.running else "",
            "message": engine_container.error or _message(status, engine_container, state, exit_code),
            "restart_count": engine_container.restart_count,
            "start_time": engine_container.start_time or status.start_time,
            "finish_time": engine_container.finish_time
            or (None if engine_container.start_time else status.finish_time),
        }
    )


def status_after_start(
    container: Container, engine_container: EngineContainer | None, exit_code: int | None
) -> ContainerStatus:
    """The status of `container` after an operation started its process.

    `exit_code`: the exit code of the process, if it exited while the operation watched it. None: it was not watched, or
    did not exit; the container is then RUNNING, even if the process has exited since. The engine reports that exit in
    an event, which is recorded after the operation. The result of the operation thus does not depend on timing.
    """
    if exit_code is not None:
        return observed_status(
            container.with_status(state=ContainerState.EXITED, exit_code=exit_code), engine_container
        )
    if engine_container is None or (engine_container.alive and not engine_container.restart_count):
        return observed_status(container, engine_container)
    first_run = replace(engine_container, state=EngineState.RUNNING, restart_count=0, error="", finish_time=None)
    return observed_status(container, first_run)


def _state(container: Container, engine_container: EngineContainer) -> ContainerState:
    if engine_container.state is EngineState.PAUSED:
        return ContainerState.PAUSED
    if engine_container.state is EngineState.RESTARTING or has_just_restarted(engine_container):
        return ContainerState.RESTARTING
    if engine_container.running:
        return ContainerState.RUNNING
    if container.status.state in STOPPED_STATES:
        return container.status.state
    # A container that was never started has not exited.
    return ContainerState.STOPPED if engine_container.state is EngineState.CREATED else ContainerState.EXITED


def has_just_restarted(engine_container: EngineContainer) -> bool:
    """Whether the restart policy started it less than RESTART_SETTLE_TIME ago, so that it may exit again soon."""
    if (
        engine_container.state is not EngineState.RUNNING
        or not engine_container.restart_count
        or engine_container.start_time is None
    ):
        return False
    # The absolute value: if the engine's clock is ahead of this host's clock, the time since the start is negative.
    return abs(now() - engine_container.start_time) < RESTART_SETTLE_TIME


def _exit_code(status: ContainerStatus, engine_container: EngineContainer, state: ContainerState) -> int | None:
    """The exit code of the last run; None while a process is running."""
    if state in (ContainerState.RUNNING, ContainerState.PAUSED):
        return None
    # The engine forgets the exit code at a restart, and a successor that was never started has none.
    return (
        status.exit_code
        if engine_container.alive or engine_container.start_time is None
        else engine_container.exit_code
    )


def _oom_killed(status: ContainerStatus, engine_container: EngineContainer, state: ContainerState) -> bool:
    """Whether the last run was killed for lack of memory; False while a process is running."""
    if state in (ContainerState.RUNNING, ContainerState.PAUSED):
        return False
    if engine_container.alive or engine_container.start_time is None:
        return status.oom_killed
    if engine_container.oom_killed is None:
        # The engine no longer knows which process was killed. The recorded value is kept if it is for the same exit.
        return status.oom_killed if status.finish_time == engine_container.finish_time else True
    return engine_container.oom_killed


def _message(
    status: ContainerStatus, engine_container: EngineContainer, state: ContainerState, exit_code: int | None
) -> str:
    """The message of the status if the engine reports no error."""
    exited = "" if exit_code is None else f"process exited with code {exit_code}; "
    match state:
        case ContainerState.RESTARTING:
            return f"{exited}restarting by restart policy (restarts so far: {engine_container.restart_count})"
        case ContainerState.RUNNING if engine_container.restart_count:
            if status.exit_code is None and status.restart_count == engine_container.restart_count:
                return status.message
            previous = "" if status.exit_code is None else f"; previous exit code {status.exit_code}"
            return f"restarted by restart policy (restarts so far: {engine_container.restart_count}){previous}"
        case ContainerState.STOPPED if status.state is ContainerState.STOPPED:
            # If gpudock stopped the container on its own, the message says why, and stays until the next start.
            return status.message
        case _:
            return ""
