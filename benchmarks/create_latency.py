"""The time from the call until the container runs: CreateContainer compared with `docker run -d`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.environment import Environment, Stopwatch
from benchmarks.report import Row, Target, Unit, versus
from benchmarks.rounds import Measure, compare
from tests.calls import IDLE, IMAGE, Caller

_TARGET = Target(1.15)
_AT_ONCE = 8


def docker_gpus(uuids: Sequence[str]) -> list[str]:
    """The options of the docker command for these GPUs."""
    return ["--gpus", f'"device={",".join(uuids)}"'] if uuids else []


def device_requests(uuids: Sequence[str]) -> dict[str, Any]:
    """The part of HostConfig that requests these GPUs."""
    if not uuids:
        return {}
    return {"DeviceRequests": [{"Driver": "nvidia", "DeviceIDs": list(uuids), "Capabilities": [["gpu"]]}]}


async def measure_create(environment: Environment) -> list[Row]:
    """Measure creates one after the other, with 0 and 1 GPUs, then eight at once.

    gpudock's client has an open connection; `docker run` is a new process each time. The row of the engine's API shows
    the time without that process.
    """
    rows: list[Row] = []
    async with environment.daemon() as (caller, _):
        for gpus in (0, 1):
            ways = _ways(environment, caller, gpus)
            samples = await compare(environment.rounds(24), ways)
            name = f"create to running, {gpus} GPU"
            rows += [
                versus(samples, "gpudock", "docker run -d", name=name, unit=Unit.MS, target=_TARGET),
                versus(samples, "gpudock", "engine API", name=name, unit=Unit.MS, against="engine API, create + start"),
            ]
        at_once = await compare(environment.rounds(8), _ways_at_once(environment, caller))
        name = f"{_AT_ONCE} creates at once, 1 GPU each"
        rows.append(versus(at_once, "gpudock", f"{_AT_ONCE} docker run -d", name=name, unit=Unit.MS))
    return rows


def _ways(environment: Environment, caller: Caller, gpus: int) -> dict[str, Measure]:
    numbers = itertools.count()
    uuids = environment.rig.gpus.uuids[-gpus:] if gpus else []

    async def by_gpudock() -> float:
        name = f"bench-{next(numbers)}"
        watch = Stopwatch()
        await caller.create(name, gpus)
        taken = watch.ms
        await caller.delete(name)
        return taken

    async def by_docker() -> float:
        name = f"docker-{next(numbers)}"
        taken = await environment.docker.time("run", "-d", "--name", name, *docker_gpus(uuids), IMAGE, *IDLE)
        await environment.discard(name)
        return taken

    async def by_engine_api() -> float:
        request = {"Image": IMAGE, "Cmd": list(IDLE), "HostConfig": device_requests(uuids)}
        watch = Stopwatch()
        made = (await environment.engine("POST", "/containers/create", send=request))["Id"]
        await environment.engine("POST", f"/containers/{made}/start")
        taken = watch.ms
        await environment.discard(made)
        return taken

    return {"gpudock": by_gpudock, "docker run -d": by_docker, "engine API": by_engine_api}


def _ways_at_once(environment: Environment, caller: Caller) -> dict[str, Measure]:
    names = [f"many-{number}" for number in range(_AT_ONCE)]

    async def by_gpudock() -> float:
        watch = Stopwatch()
        await asyncio.gather(*(caller.create(name, 1) for name in names))
        taken = watch.ms
        await asyncio.gather(*(caller.delete(name) for name in names))
        return taken

    async def by_docker() -> float:
        gpu_uuids = environment.rig.gpus.uuids
        commands = [
            ["run", "-d", "--name", name, *docker_gpus([uuid]), IMAGE, *IDLE]
            for name, uuid in zip(names, gpu_uuids, strict=True)
        ]
        taken = await environment.docker.time_at_once(commands)
        await asyncio.gather(*(environment.discard(name) for name in names))
        return taken

    return {"gpudock": by_gpudock, f"{_AT_ONCE} docker run -d": by_docker}
