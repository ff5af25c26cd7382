"""Commands in a running container: the time until the first byte, and the throughput of output."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from functools import partial

from gpudock.v1 import exec_pb2

from benchmarks.environment import Environment, Stopwatch
from benchmarks.report import Row, Target, Unit, versus
from benchmarks.rounds import Measure, compare
from tests.calls import Caller, iterate
from tests.rig import GLIBC, Daemon, RigError

_NAME = "bench"
# GRPC_EXPERIMENTS as README.md recommends for large output, and without any.
_LEAN = "-event_engine_client"
_NONE = ""


async def measure_exec(environment: Environment) -> list[Row]:
    """Measure gpudock and `docker exec` with the same command in the same container.

    For the first byte, gpudock's client has an open connection, and `docker exec` is a new process. For the output,
    gpudock's client is another process, timed from before it connects, without the start of its interpreter; with the
    environment that README.md advises for much output, and without it. The `gpudock` command is timed with the start of
    its interpreter, as `docker exec` is, with that environment and without it.
    """
    async with environment.daemon() as (caller, daemon):
        container = await caller.create(_NAME, image=GLIBC)
        engine_id = container.status.engine_id

        async def first_byte_by_gpudock() -> float:
            return await _first_byte(caller, "echo", "hello")

        async def first_byte_by_docker() -> float:
            return await environment.docker.time_first_byte("exec", engine_id, "echo", "hello")

        first_byte = await compare(
            environment.rounds(40), {"gpudock": first_byte_by_gpudock, "docker exec": first_byte_by_docker}
        )

        rows = [versus(first_byte, "gpudock", "docker exec", name="exec first byte", unit=Unit.MS, target=Target(1.0))]
        amount = (1 << 28) if environment.quick else (1 << 30)
        # head writes so little at a time that it limits both sides; dd does not.
        head = ["head", "-c", str(amount), "/dev/zero"]
        dd = ["dd", "if=/dev/zero", "bs=64k", f"count={amount >> 16}", "status=none"]
        for command in (head, dd):
            rows += await _measure_output(environment, daemon, engine_id, command, amount)
    return rows


async def _measure_output(
    environment: Environment, daemon: Daemon, engine_id: str, command: list[str], amount: int
) -> list[Row]:
    async def by_gpudock() -> float:
        return amount / 1e3 / await _read_in_process("client", daemon.target, amount, command, experiments=_LEAN)

    async def as_it_comes() -> float:
        return amount / 1e3 / await _read_in_process("client", daemon.target, amount, command, experiments=_NONE)

    async def stubs() -> float:
        return amount / 1e3 / await _read_in_process("stubs", daemon.target, amount, command, experiments=_NONE)

    async def command_line(experiments: str) -> float:
        program = shlex.join([sys.executable, "-m", "gpudock.cli", "--address", daemon.target, "exec", _NAME, "--"])
        script = f"GRPC_EXPERIMENTS={experiments} {program} {shlex.join(command)} | cat >/dev/null"
        return amount / 1e3 / await environment.docker.time_shell(script)

    async def by_docker() -> float:
        script = f"docker exec {engine_id} {shlex.join(command)} | cat >/dev/null"
        return amount / 1e3 / await environment.docker.time_shell(script)

    pipe = "docker exec, piped to cat"
    sides: dict[str, Measure] = {
        "gpudock": by_gpudock,
        "gpudock, as it comes": as_it_comes,
        "gpudock, stubs": stubs,
        "command": partial(command_line, _LEAN),
        "command, as it comes": partial(command_line, _NONE),
        pipe: by_docker,
    }
    samples = await compare(environment.rounds(12), sides)
    name = f"exec output, {amount >> 20} MiB of {command[0]}"
    target = Target(0.9, at_least=True)
    return [
        versus(samples, "gpudock", pipe, name=name, unit=Unit.MB_PER_S, target=target),
        versus(samples, "gpudock, as it comes", pipe, name=f"{name}, gRPC as it comes", unit=Unit.MB_PER_S),
        versus(samples, "gpudock, stubs", pipe, name=f"{name}, bare stubs", unit=Unit.MB_PER_S),
        versus(samples, "command", pipe, name=f"{name}, gpudock exec", unit=Unit.MB_PER_S),
        versus(
            *(samples, "command", "command, as it comes"),
            name=f"{name}, gpudock exec",
            unit=Unit.MB_PER_S,
            against="gpudock exec, gRPC as it comes",
        ),
    ]


async def _first_byte(caller: Caller, *command: str) -> float:
    start = exec_pb2.ExecStart(container=_NAME, command=command)
    taken = None
    watch = Stopwatch()
    async for answer in caller.containers.ExecContainer(iterate([exec_pb2.ExecContainerRequest(start=start)])):
        if taken is None and answer.stdout:
            taken = watch.ms
    if taken is None:
        raise RigError(f"{command} has no output")
    return taken


async def _read_in_process(way: str, target: str, amount: int, command: list[str], *, experiments: str) -> float:
    """Milliseconds that a client in another process takes to read all output; `way` is an argument of exec_reader."""
    words = ["-m", "benchmarks.exec_reader", way, target, _NAME, str(amount), *command]
    environment = os.environ | {"GRPC_EXPERIMENTS": experiments}
    process = await asyncio.create_subprocess_exec(
        sys.executable, *words, stdout=asyncio.subprocess.PIPE, env=environment
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise RigError(f"the reader ended with {process.returncode}")
    return float(output)
