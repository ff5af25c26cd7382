"""`python -m benchmarks.reader TARGET CONTAINER BYTES COMMAND…`: print the milliseconds of reading it."""

from __future__ import annotations

import asyncio
import sys

from gpudock.v1 import exec_pb2

from benchmarks.arena import Stopwatch
from tests.calls import Caller, iterate


async def _read(target: str, container: str, amount: int, command: list[str]) -> float:
    start = exec_pb2.ExecStart(container=container, command=command)
    request = exec_pb2.ExecContainerRequest(start=start)
    seen = 0
    watch = Stopwatch()
    async with Caller(target) as caller:
        async for answer in caller.containers.ExecContainer(iterate([request])):
            seen += len(answer.stdout)
    if seen != amount:
        raise SystemExit(f"{seen} bytes came of {amount}")
    return watch.ms


if __name__ == "__main__":
    print(asyncio.run(_read(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])))
