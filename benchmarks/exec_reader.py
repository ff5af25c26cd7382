"""`python -m benchmarks.exec_reader WITH TARGET CONTAINER BYTES COMMAND…`: print the milliseconds of reading output.

WITH is `client` for gpudock's Python client, or `stubs` for the generated stubs of the contract. The program fails if
the output does not have BYTES bytes; the content is not compared.
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
    count = 0
    async for length in lengths:
        count += length
    if count != amount:
        raise SystemExit(f"{count} of {amount} bytes received")
    return watch.ms


if __name__ == "__main__":
    _read_with = {"client": _by_client, "stubs": _by_stubs}[sys.argv[1]]
    print(asyncio.run(_read(_read_with(sys.argv[2], sys.argv[3], sys.argv[5:]), int(sys.argv[4]))))
