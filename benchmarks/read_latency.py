"""The latency of reads with a hundred containers, and the memory of the daemon."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from gpudock.v1 import container_service_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.environment import Environment, Stopwatch
from benchmarks.report import Row, Target, Unit, versus
from benchmarks.rounds import Measure, compare
from tests.calls import Caller
from tests.rig import Daemon, RigError

_CONTAINERS = 100
_AT_ONCE = 8
_P50 = Target(2.0, unit="ms")
# GRPC_EXPERIMENTS that README.md advises for much output; the command does not set it by itself.
_LEAN = "-event_engine_client"
_AS_IT_COMES = "gRPC as it comes"


async def measure_reads(environment: Environment) -> list[Row]:
    """Measure one caller with one call after the other over the unix socket; a health check is the cheapest call.

    The hundred containers were started and have ended. The memory is that of the daemon, without etcd.
    """
    async with environment.daemon() as (caller, daemon):
        idle = _resident_mb(daemon)
        await _create_many(caller)
        after = _resident_mb(daemon)

        async def get() -> None:
            await caller.get("many-50")

        async def list_all() -> None:
            answer = await caller.containers.ListContainers(
                container_service_pb2.ListContainersRequest(page_size=_CONTAINERS)
            )
            assert len(answer.containers) == _CONTAINERS  # noqa: S101 - the sample would be of another answer

        health = health_pb2_grpc.HealthStub(caller.channel)

        async def check() -> None:
            await health.Check(health_pb2.HealthCheckRequest())

        async def command(experiments: str) -> None:
            await _command(daemon.target, experiments, "get", "many-50")

        ways = {"gpudock": _timed(get), "grpc.health Check": _timed(check)}
        gets = await compare(environment.rounds(3000), ways, warm_up=20)
        lists = await _latencies(environment.rounds(180), list_all)
        ways = {_LEAN: _timed(partial(command, _LEAN)), _AS_IT_COMES: _timed(partial(command, ""))}
        commands = await compare(environment.rounds(60), ways)
    return [
        _latency_row("GetContainer, p50", gets.by_name["gpudock"], 50, _P50),
        _latency_row("GetContainer, p99", gets.by_name["gpudock"], 99),
        versus(gets, "gpudock", "grpc.health Check", name="GetContainer", unit=Unit.MS),
        _latency_row(f"ListContainers of {_CONTAINERS}, p50", lists, 50),
        _latency_row(f"ListContainers of {_CONTAINERS}, p99", lists, 99),
        versus(
            *(commands, _LEAN, _AS_IT_COMES),
            name="the command: gpudock get, GRPC_EXPERIMENTS=" + _LEAN,
            unit=Unit.MS,
            against="the same, gRPC as it comes",
        ),
        Row(name="daemon's memory (RSS), idle", unit=Unit.MB, samples={"gpudock": [idle]}),
        Row(name=f"daemon's memory (RSS), after {_CONTAINERS} creates", unit=Unit.MB, samples={"gpudock": [after]}),
    ]


async def _create_many(caller: Caller) -> None:
    turns = asyncio.Semaphore(_AT_ONCE)

    async def create(number: int) -> None:
        async with turns:
            await caller.create(f"many-{number}", command=["true"])

    await asyncio.gather(*(create(number) for number in range(_CONTAINERS)))


def _timed(call: Callable[[], Awaitable[None]]) -> Measure:
    async def measure() -> float:
        watch = Stopwatch()
        await call()
        return watch.ms

    return measure


async def _latencies(count: int, call: Callable[[], Awaitable[None]]) -> list[float]:
    measure = _timed(call)
    return [await measure() for _ in range(count)]


def _latency_row(name: str, samples: Sequence[float], percent: int, target: Target | None = None) -> Row:
    return Row(name=name, unit=Unit.MS, samples={"gpudock": samples}, percent=percent, target=target)


async def _command(target: str, experiments: str, *words: str) -> None:
    """Run the `gpudock` command as a process, until its end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gpudock.cli", "--address", target, *words),
        stdout=asyncio.subprocess.DEVNULL,
        env=os.environ | {"GRPC_EXPERIMENTS": experiments},
    )
    if await process.wait():
        raise RigError(f"gpudock {' '.join(words)} ended with {process.returncode}")


def _resident_mb(daemon: Daemon) -> float:
    for line in Path(f"/proc/{daemon.pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise ValueError(f"process {daemon.pid} shows no VmRSS")
