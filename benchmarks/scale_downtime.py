"""The downtime while a container gets other GPUs: ScaleContainer compared with stop, create and start.

Downtime is the time from the end of the old process (State.FinishedAt) to the start of the new one (State.StartedAt),
by the engine's clock. The time before and after that does not count for either side.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence
from datetime import datetime

from gpudock.v1 import operation_pb2

from benchmarks.create_latency import device_requests, docker_gpus
from benchmarks.environment import Environment
from benchmarks.report import Row, Target, Unit, versus
from benchmarks.rounds import compare
from tests.calls import IDLE, IMAGE, Caller, scale_request
from tests.rig import RigError

_TARGET = Target(1.3)
FLAT = Target(1.2)
_MB = 1_000_000
BY_HAND = "docker stop && create && start"
_FLOOR = "engine API, stop + start"
_EMPTY, _MEDIUM, _LARGE = "empty layer", "100 MB", "1 GB"
_LAYERS = {_EMPTY: 0, _MEDIUM: 100 * _MB, _LARGE: 1000 * _MB}


async def measure_scale(environment: Environment) -> list[Row]:
    """Measure the transfer by exchange, whose time must not depend on the layer, then by copy and by commit.

    The new container gets 1 GPU if the old one had 2, and 2 if it had 1. With the docker command, the files are lost.
    """
    rows: list[Row] = []
    by_hand, floor = ScriptedReplacement(environment), ScriptedReplacement(environment)
    async with environment.daemon() as (caller, _):
        ways = {}
        for what, size in _LAYERS.items():
            container = _ScaledContainer(environment, caller, f"scaled-{size // _MB}")
            await container.make(size)
            ways[what] = container.downtime
        samples = await compare(
            environment.rounds(18), {**ways, BY_HAND: by_hand.by_command_line, _FLOOR: floor.by_engine_api}
        )
        for what in _LAYERS:
            name = f"scale downtime, {what}"
            rows.append(versus(samples, what, BY_HAND, name=name, unit=Unit.MS, target=_TARGET))
        rows += [
            versus(
                samples,
                _LARGE,
                _EMPTY,
                name="scale downtime, 1 GB",
                unit=Unit.MS,
                against="gpudock, empty layer",
                target=FLAT,
            ),
            versus(samples, _EMPTY, _FLOOR, name="scale downtime, empty layer", unit=Unit.MS),
        ]
    for method in ("copy", "commit"):
        rows += await _other_method(environment, method)
    return rows


async def _other_method(environment: Environment, method: str) -> list[Row]:
    rows = []
    async with environment.daemon("--layer-carry", method) as (caller, _):
        for what, size in _LAYERS.items():
            if environment.quick and what == _LARGE:
                continue
            container = _ScaledContainer(environment, caller, f"{method}-{size // _MB}")
            by_hand = ScriptedReplacement(environment)
            await container.make(size)
            # A commit moves the files into the image: they must be written again to be transferred again.
            ways = {method: container.downtime_of_new_files, BY_HAND: by_hand.by_command_line}
            samples = await compare(2 if environment.quick else 3, ways, warm_up=0)
            name = f"scale downtime by {method}, {what}"
            rows.append(versus(samples, method, BY_HAND, name=name, unit=Unit.MS))
    return rows


class _ScaledContainer:
    """A container of gpudock's that is scaled from 1 GPU to 2 and back, its layer transferred each time."""

    def __init__(self, environment: Environment, caller: Caller, name: str) -> None:
        self._environment = environment
        self._caller = caller
        self._name = name
        self._gpus = 1
        self._layer_bytes = 0

    async def make(self, layer_bytes: int) -> None:
        """Create the container with `layer_bytes` in its writable layer, synced to the disk."""
        await self._caller.create(self._name, self._gpus)
        self._layer_bytes = layer_bytes
        await self._fill()

    async def downtime_of_new_files(self) -> float:
        """Write the files of the layer again, then scale; returns the downtime in milliseconds."""
        await self._fill()
        return await self.downtime()

    async def _fill(self) -> None:
        await self._caller.shell(self._name, f"head -c {self._layer_bytes} /dev/zero >/data && sync")

    async def downtime(self) -> float:
        """Scale once; returns the downtime in milliseconds."""
        self._gpus = 3 - self._gpus
        old = (await self._caller.get(self._name)).status.engine_id
        finished: datetime | None = None
        new = ""
        async for answer in self._caller.containers.ScaleContainer(scale_request(self._name, self._gpus)):
            if answer.WhichOneof("event") == "result":
                new = answer.result.status.engine_id
            elif finished is None and has_started(answer.operation):
                # The old engine container is removed once the new one is verified; until then it can be inspected.
                finished = await self._environment.moment(old, "FinishedAt")
        if finished is None or new in ("", old):
            raise RigError("the scale did not replace the container")
        if int(await self._caller.shell(self._name, "stat -c %s /data")) != self._layer_bytes:
            raise RigError("the scale lost the container's files")
        return ms_between(finished, await self._environment.moment(new, "StartedAt"))


def has_started(operation: operation_pb2.Operation) -> bool:
    """Whether the new engine container was started."""
    return any(
        stage.name == "start" and stage.state == operation_pb2.OPERATION_STAGE_STATE_SUCCEEDED
        for stage in operation.stages
    )


class ScriptedReplacement:
    """An engine container that is replaced without gpudock, which loses its files."""

    _numbers = itertools.count()

    def __init__(self, environment: Environment, command: Sequence[str] = IDLE) -> None:
        self._environment = environment
        self._command = command
        self._current = ""
        self._gpus = 1

    async def by_command_line(self) -> float:
        """Stop, create and start by a script; returns the downtime in milliseconds."""
        old, new, gpu_uuids = await self._replacement()
        create = ["docker", "create", "--name", new, *docker_gpus(gpu_uuids), IMAGE, *self._command]
        await self._environment.docker.time_shell(f"docker stop {old} && {shlex.join(create)} && docker start {new}")
        return await self._downtime(old, new)

    async def by_engine_api(self) -> float:
        """The minimum downtime: create before the stop, without processes; returns the downtime in milliseconds."""
        old, new, gpu_uuids = await self._replacement()
        request = {"Image": IMAGE, "Cmd": list(self._command), "HostConfig": device_requests(gpu_uuids)}
        await self._environment.engine("POST", "/containers/create", query={"name": new}, send=request)
        await self._environment.engine("POST", f"/containers/{old}/stop")
        await self._environment.engine("POST", f"/containers/{new}/start")
        return await self._downtime(old, new)

    async def _replacement(self) -> tuple[str, str, list[str]]:
        """The name of the old container, which runs, the name of the new one, and the GPUs of the new one."""
        if not self._current:
            self._current = f"by-hand-{next(self._numbers)}"
            options = docker_gpus(self._gpu_uuids())
            await self._environment.docker.time("run", "-d", "--name", self._current, *options, IMAGE, *self._command)
        self._gpus = 3 - self._gpus
        return self._current, f"by-hand-{next(self._numbers)}", self._gpu_uuids()

    def _gpu_uuids(self) -> list[str]:
        return self._environment.rig.gpus.uuids[-self._gpus :]

    async def _downtime(self, old: str, new: str) -> float:
        taken = ms_between(
            await self._environment.moment(old, "FinishedAt"), await self._environment.moment(new, "StartedAt")
        )
        await self._environment.discard(old)
        self._current = new
        return taken


def ms_between(earlier: datetime, later: datetime) -> float:
    """Milliseconds between two times."""
    return (later - earlier).total_seconds() * 1e3
