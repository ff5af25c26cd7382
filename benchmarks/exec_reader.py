"""`python -m benchmarks.exec_reader WITH TARGET CONTAINER BYTES COMMAND…`: print the milliseconds of reading it.

WITH is `client`, gpudock's own, or `stubs`, which is what the generator makes of the contract and nothing else. The
bytes are counted: it fails where fewer or more come than BYTES. What they are is not compared.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

import gpudock
from gpudock.v1 import exec_pb2

from benchmarks.environment import Stopwatch
from tests.calls import Caller, iterate


async def _by_client(target: str, container: str, command: list[str]) -> AsyncIterator[int]:
    async with gpudock.connect(target) as client, client.containers.exec(container, command) as session:
        async for _, data in session.output():
            yield len(data)


async def _by_stubs(target: str, container: str, command: list[str]) -> AsyncIterator[int]:
    start = exec_pb2.ExecStart(container=container, command=command)
    request = exec_pb2.ExecContainerRequest(start=start)
    async with Caller(target) as caller:
        async for answer in caller.containers.ExecContainer(iterate([request])):
            yield len(answer.stdout)


async def _read(lengths: AsyncIterator[int], amount: int) -> float:
    watch = Stopwatch()
    seen = 0
    async for length in lengths:
        seen += length
    if seen != amount:
        raise SystemExit(f"{seen} bytes came of {amount}")
    return watch.ms


if __name__ == "__main__":
    _read_with = {"client": _by_client, "stubs": _by_stubs}[sys.argv[1]]
    print(asyncio.run(_read(_read_with(sys.argv[2], sys.argv[3], sys.argv[5:]), int(sys.argv[4]))))
