"""What a container's status is, given what the engine shows."""

from __future__ import annotations

from gpudock_server.model.container import Container, ContainerState, ContainerStatus
from gpudock_server.model.engine import EngineContainer, EngineState


def observed(container: Container, seen: EngineContainer | None) -> ContainerStatus:
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
    # Why it was stopped, where gpudock did that on its own, is true for as long as it is stopped.
    told = status.message if state is status.state is ContainerState.STOPPED else ""
    return status.model_copy(
        update={
            "state": state,
            "exit_code": None if seen.running or seen.start_time is None else seen.exit_code,
            "oom_killed": seen.oom_killed,
            "health": seen.health if seen.running else "",
            "message": seen.error or told,
            "restart_count": seen.restart_count,
            "start_time": seen.start_time,
            "finish_time": seen.finish_time,
        }
    )


def _state(container: Container, seen: EngineContainer) -> ContainerState:
    if seen.state is EngineState.PAUSED:
        return ContainerState.PAUSED
    if seen.running:
        return ContainerState.RUNNING
    if container.status.state is ContainerState.STOPPED or seen.state is EngineState.CREATED:
        return ContainerState.STOPPED
    return ContainerState.EXITED
