"""Changes made with the docker command, which the daemon must notice."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from gpudock.v1 import container_pb2

from tests.calls import IMAGE
from tests.faults.invariants import gpus_of
from tests.rig import HttpStatusError, Rig
from tests.rig.patience import limit
from tests.stateful.model import State
from tests.stateful.modelled_host import ModelledHost
from tests.stateful.observation import EngineView

# The daemon must notice an event, and repair what it should, within so many seconds of an idle machine.
_NOTICED_S = 20.0


async def run_docker_action(host: ModelledHost, name: str, action: str) -> None:
    """Change an engine container of the daemon, and wait until the daemon has noticed it."""
    expected, engine = host.containers[name].copy(), host.rig.engine
    inspected = _inspected(host, name)
    where = f"/containers/{inspected['Id']}"
    match action:
        case "rm":
            engine.call("DELETE", where, query={"force": "1"})
            expected.state, expected.holds, expected.gpus = State.FAILED, False, 0
        case "stop" | "kill":
            engine.call("POST", f"{where}/{action}")
            expected.state = State.EXITED
        case "pause":
            engine.call("POST", f"{where}/pause")
            expected.state = State.PAUSED
        case "start":
            return await _start(host, name, where)
        case "rename":
            engine.call("POST", f"{where}/rename", query={"name": f"renamed-{name}"})
            await _until(lambda: _inspected(host, name)["Name"] == inspected["Name"])
        case "limit":
            engine.call("POST", f"{where}/update", send={"NanoCpus": 700_000_000})
            nano_cpus = round(expected.spec.cpus * 1e9) or engine.call("GET", "/info")["NCPU"] * 1_000_000_000
            await _until(lambda: _inspected(host, name)["HostConfig"]["NanoCpus"] == nano_cpus)
    expected_state = f"CONTAINER_STATE_{expected.state}"
    async with asyncio.timeout(limit(_NOTICED_S)):
        while container_pb2.ContainerState.Name((await host.caller.get(name)).status.state) != expected_state:
            await asyncio.sleep(0.02)
    host.containers[name] = expected
    return None


def _inspected(host: ModelledHost, name: str) -> Any:
    return EngineView.read(host.rig, host.node).by_name[name][0]


async def _start(host: ModelledHost, name: str, where: str) -> None:
    """Start an engine container: the daemon claims its GPUs and ports if they are free, else it stops the container."""
    inspected = _inspected(host, name)
    spec = host.containers[name].spec
    if len(gpus_of(inspected)) != spec.gpus or bool(inspected["HostConfig"]["PortBindings"]) != spec.port:
        return None  # the spec was changed since the last start
    try:
        host.rig.engine.call("POST", f"{where}/start")
    except HttpStatusError:
        return None  # another container has its port
    runs, stopped = host.containers[name].copy(), host.containers[name].copy()
    runs.state, runs.holds, runs.gpus = State.RUNNING, True, spec.gpus
    async with asyncio.timeout(limit(_NOTICED_S)):
        while True:
            with contextlib.suppress(AssertionError):
                return await host.settle(name, runs, stopped)
            await asyncio.sleep(0.05)


async def _until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(limit(_NOTICED_S)):
        while not await asyncio.to_thread(holds):
            await asyncio.sleep(0.05)


@contextlib.contextmanager
def foreign_container(rig: Rig, engine_volume: str) -> Iterator[str]:
    """An engine container that the daemon does not manage and that refers to a volume; yields its name."""
    name = f"foreign-{engine_volume}"
    send = {"Image": IMAGE, "HostConfig": {"Binds": [f"{engine_volume}:/theirs"]}}
    rig.engine.call("POST", "/containers/create", query={"name": name}, send=send)
    try:
        yield name
    finally:
        rig.engine.call("DELETE", f"/containers/{name}", query={"force": "1"})
