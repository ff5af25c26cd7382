"""From the call until the container runs: CreateContainer beside `docker run -d`."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.environment import Arena, Stopwatch
from benchmarks.report import ResourceRef, Row, Unit, versus
from benchmarks.rounds import Measure, compare
from tests.calls import IDLE, IMAGE, Caller

_TARGET = ResourceRef(1.15)
_AT_ONCE = 8


def docker_gpus(uuids: Sequence[str]) -> list[str]:
    """How the command line asks for these cards."""
    return ["--gpus", f'"device={",".join(uuids)}"'] if uuids else []


def device_requests(uuids: Sequence[str]) -> dict[str, Any]:
    """How the engine's API is asked for these cards, as part of HostConfig."""
    if not uuids:
        return {}
    return {"DeviceRequests": [{"Driver": "nvidia", "DeviceIDs": list(uuids), "Capabilities": [["gpu"]]}]}


async def creating(arena: Arena) -> list[Row]:
    """One after the other with 0 and 1 cards, then eight at once.

    gpudock's client holds an open connection; `docker run` is a new process each time. The engine's own API, called
    without a command line, is shown to tell that cost apart.
    """
    rows: list[Row] = []
    async with arena.daemon() as (caller, _):
        for gpus in (0, 1):
            ways = _ways(arena, caller, gpus)
            samples = await compare(arena.rounds(24), ways)
            name = f"create to running, {gpus} GPU"
            rows += [
                versus(samples, "gpudock", "docker run -d", name=name, unit=Unit.MS, target=_TARGET),
                versus(samples, "gpudock", "engine API", name=name, unit=Unit.MS, against="engine API, create + start"),
            ]
        at_once = await compare(arena.rounds(8), _ways_at_once(arena, caller))
        name = f"{_AT_ONCE} creates at once, 1 GPU each"
        rows.append(versus(at_once, "gpudock", f"{_AT_ONCE} docker run -d", name=name, unit=Unit.MS))
    return rows


def _ways(arena: Arena, caller: Caller, gpus: int) -> dict[str, Measure]:
    numbers = itertools.count()
    uuids = arena.rig.gpus.uuids[-gpus:] if gpus else []

    async def ours() -> float:
        name = f"bench-{next(numbers)}"
        watch = Stopwatch()
        await caller.create(name, gpus)
        taken = watch.ms
        await caller.delete(name)
        return taken

    async def theirs() -> float:
        name = f"docker-{next(numbers)}"
        taken = await arena.docker.time("run", "-d", "--name", name, *docker_gpus(uuids), IMAGE, *IDLE)
        await arena.discard(name)
        return taken

    async def bare() -> float:
        request = {"Image": IMAGE, "Cmd": list(IDLE), "HostConfig": device_requests(uuids)}
        watch = Stopwatch()
        made = (await arena.engine("POST", "/containers/create", send=request))["Id"]
        await arena.engine("POST", f"/containers/{made}/start")
        taken = watch.ms
        await arena.discard(made)
        return taken

    return {"gpudock": ours, "docker run -d": theirs, "engine API": bare}


def _ways_at_once(arena: Arena, caller: Caller) -> dict[str, Measure]:
    names = [f"many-{number}" for number in range(_AT_ONCE)]

    async def ours() -> float:
        watch = Stopwatch()
        await asyncio.gather(*(caller.create(name, 1) for name in names))
        taken = watch.ms
        await asyncio.gather(*(caller.delete(name) for name in names))
        return taken

    async def theirs() -> float:
        cards = arena.rig.gpus.uuids
        commands = [
            ["run", "-d", "--name", name, *docker_gpus([card]), IMAGE, *IDLE]
            for name, card in zip(names, cards, strict=True)
        ]
        taken = await arena.docker.time_at_once(commands)
        await asyncio.gather(*(arena.discard(name) for name in names))
        return taken

    return {"gpudock": ours, f"{_AT_ONCE} docker run -d": theirs}
