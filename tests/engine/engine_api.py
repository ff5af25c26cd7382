"""Containers that tests create with the Engine API of the rig, without gpudock."""

from __future__ import annotations

import time
from collections.abc import Sequence

from gpudock_server.model.engine import EngineContainer, EngineState

from tests.engine.drift import docker_inspect
from tests.rig import Rig

_POLL_SECONDS = 0.02


def create_container(rig: Rig, image: str, command: Sequence[str] = ("sleep", "infinity"), *, name: str = "") -> str:
    """Create a container without starting it; returns its id. The engine chooses a name if `name` is empty."""
    request = {"Image": image, "Cmd": [*command]}
    query = {"name": name} if name else {}
    return str(rig.engine.call("POST", "/containers/create", query=query, send=request)["Id"])


def start_container(rig: Rig, container: str) -> None:
    """Start a container, given its id or name."""
    rig.engine.call("POST", f"/containers/{container}/start")


def run_in_container(rig: Rig, container: str, command: Sequence[str], *, wait: bool = True) -> None:
    """Run a command in a running container; with `wait`, until it has ended with exit code 0."""
    exec_id = rig.engine.call("POST", f"/containers/{container}/exec", send={"Cmd": [*command]})["Id"]
    rig.engine.call("POST", f"/exec/{exec_id}/start", send={"Detach": True})
    while wait:
        state = rig.engine.call("GET", f"/exec/{exec_id}/json")
        if not state["Running"]:
            assert state["ExitCode"] == 0
            return
        time.sleep(_POLL_SECONDS)


def engine_container(rig: Rig, container: str) -> EngineContainer:
    """A container as adapters of layers and snapshots see it; exit code, labels and GPUs are left out."""
    state = docker_inspect(rig, container)
    return EngineContainer(
        id=state["Id"],
        name=state["Name"],
        image_id=state["Image"],
        state=EngineState(state["State"]["Status"]),
        pid=state["State"]["Pid"],
        exit_code=0,
        oom_killed=False,
        error="",
        labels={},
        gpu_uuids=(),
        upper_dir=state["GraphDriver"]["Data"]["UpperDir"],
        storage_driver=state["GraphDriver"]["Name"],
    )
