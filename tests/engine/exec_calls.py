"""Calls of ExecContainer, message by message, and the processes that they start."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest_asyncio
from google.protobuf import duration_pb2
from gpudock.v1 import exec_pb2

from tests.calls import Caller, ExecResult, Failure, failure_of
from tests.engine.conditions import until_true
from tests.rig import Daemon
from tests.rig.patience import limit

BOX = "box"
Request = exec_pb2.ExecContainerRequest
# Durations of `sleep` commands: each is used once, so that it identifies the process on the host.
unused_sleep_seconds = itertools.count(710_000_000)


class ExecCall:
    """One call of ExecContainer, message by message."""

    def __init__(self, caller: Caller, *command: str, deadline: float | None = None, **start: Any) -> None:
        start.setdefault("container", BOX)
        stub: Any = caller.containers.ExecContainer  # its type requires an iterator; without one, `write` sends
        self.rpc = stub(timeout=deadline)
        self._responses = aiter(self.rpc)
        self._start = exec_pb2.ExecStart(command=command, **start)
        self.result = ExecResult()

    async def begin(self) -> ExecCall:
        """Start the process and wait until it is started; returns the call itself."""
        await self.send_start()
        response = await anext(self._responses)
        assert response.WhichOneof("event") == "started"
        return self

    async def send_start(self) -> None:
        """Send the request to start the process, without waiting."""
        await self.send(start=self._start)

    async def send(self, **message: Any) -> None:
        """Send one message."""
        await self.rpc.write(Request(**message))

    async def read(self) -> bool:
        """Add the next response to the result; False at the end of the stream."""
        response = await anext(self._responses, None)
        if response is None:
            return False
        assert response.WhichOneof("event") != "started", "the process has started twice"
        self.result.add(response)
        return True

    async def wait_for_output(self, text: bytes) -> None:
        """Wait for `text` on stdout."""
        async with asyncio.timeout(limit(60)):
            while text not in self.result.stdout:
                assert await self.read(), self.result

    async def wait_for_end(self) -> ExecResult:
        """Wait until the RPC ends, and return the result of the process; raises AioRpcError if the RPC fails."""
        async with asyncio.timeout(limit(60)):
            while await self.read():
                pass
        assert self.result.ended
        assert (self.result.code is None) != (not self.result.signal), self.result
        return self.result

    async def wait_for_failure(self) -> Failure:
        """Wait until the RPC fails, and return its error; raises AssertionError if an end of the process arrives."""
        try:
            await self.wait_for_end()
        except grpc.aio.AioRpcError as error:
            assert not self.result.ended
            return failure_of(error)
        raise AssertionError(f"the call succeeded: {self.result}")


@pytest_asyncio.fixture
async def exec_caller(caller: Caller) -> Caller:
    """A caller of the shared daemon, with a running container BOX."""
    await caller.create(BOX)
    return caller


@asynccontextmanager
async def connect_with_container(daemon: Daemon) -> AsyncIterator[Caller]:
    """A caller of a daemon, with a running container BOX."""
    async with Caller(daemon.target) as caller:
        await caller.create(BOX)
        yield caller


def shell(script: str) -> tuple[str, ...]:
    """A command that runs `script`."""
    return ("sh", "-c", script)


def sleep_pids(seconds: int) -> list[int]:
    """The pids of the host's processes `sleep SECONDS`."""
    pids = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes() == b"sleep\0%d\0" % seconds:
                pids.append(int(process.name))
        except OSError:
            continue
    return pids


async def until_sleeps_end(*seconds: int) -> None:
    """Wait until no process `sleep SECONDS` runs."""
    await until_true(lambda: not any(map(sleep_pids, seconds)), "the processes have ended")


def duration(value: float) -> duration_pb2.Duration:
    """A duration in seconds as a message."""
    return duration_pb2.Duration(seconds=int(value), nanos=int(value % 1 * 1e9))
