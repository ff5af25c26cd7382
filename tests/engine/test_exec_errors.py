"""ExecContainer: requests that are refused, each with its reason."""

from __future__ import annotations

import asyncio
import uuid
from functools import partial
from typing import Any

import grpc
import grpc.aio
from gpudock.v1 import container_service_pb2, exec_pb2

from tests.calls import Caller, failure, failure_of, iterate
from tests.engine.conditions import until_true
from tests.engine.exec_calls import (
    BOX,
    ExecCall,
    Request,
    connect_with_container,
    exec_caller,
    sleep_pids,
    until_sleeps_end,
    unused_sleep_seconds,
)
from tests.engine.isolated_daemons import IsolatedDaemons, daemons

__all__ = ["daemons", "exec_caller"]


async def test_a_call_without_a_valid_start_is_refused(exec_caller: Caller) -> None:
    cases: tuple[tuple[list[Request], str], ...] = (
        ([], "start"),
        ([Request(stdin=b"x")], "start"),
        ([Request()], "start"),
        ([Request(start=exec_pb2.ExecStart(container=BOX))], "start.command"),
    )
    for messages, field in cases:
        refused = await failure(read_all(exec_caller.containers.ExecContainer(iterate(messages))))
        assert (refused.code, refused.violations) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))


async def read_all(stream: Any) -> list[Any]:
    return [response async for response in stream]


async def test_an_invalid_message_ends_the_call_and_the_process(exec_caller: Caller) -> None:
    for message, field in (
        (Request(stdin=b"x"), "stdin"),
        (Request(close_stdin=exec_pb2.ExecCloseStdin()), "close_stdin"),
        (Request(resize=exec_pb2.TerminalSize(rows=1, columns=1)), "resize"),
        (Request(signal=exec_pb2.ExecSignal(signal="65")), "signal.signal"),
        (Request(start=exec_pb2.ExecStart(container=BOX, command=["true"])), "start"),
        (Request(), "message"),
    ):
        number = next(unused_sleep_seconds)
        call = await ExecCall(exec_caller, "sleep", str(number)).begin()
        await until_true(partial(sleep_pids, number), "the process runs")
        await call.rpc.write(message)
        refused = await call.wait_for_failure()
        assert (refused.code, refused.violations) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))
        await until_sleeps_end(number)


async def test_an_exec_needs_a_running_container(exec_caller: Caller) -> None:
    assert (await failure(exec_caller.run("missing", "true"))).reason == "CONTAINER_NOT_FOUND"
    pause = container_service_pb2.PauseContainerRequest(name=BOX)
    await exec_caller.containers.PauseContainer(pause)
    assert (await failure(exec_caller.run(BOX, "true"))).reason == "CONTAINER_PAUSED"
    await exec_caller.stop(BOX)
    stopped = await failure(exec_caller.run(BOX, "true"))
    assert (stopped.code, stopped.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING")
    assert stopped.metadata["state"] == "STOPPED"


async def test_an_exec_id_in_use_is_refused_and_free_afterwards(exec_caller: Caller) -> None:
    exec_id = str(uuid.uuid4())
    calls = [ExecCall(exec_caller, "cat", stdin=True, exec_id=exec_id) for _ in range(2)]
    outcomes = await asyncio.gather(*(call.begin() for call in calls), return_exceptions=True)
    (refused,) = (outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError))
    assert failure_of(refused).reason == "EXEC_EXISTS"
    assert refused.code() is grpc.StatusCode.ALREADY_EXISTS
    (winner,) = (outcome for outcome in outcomes if isinstance(outcome, ExecCall))
    await winner.rpc.done_writing()
    assert (await winner.wait_for_end()).code == 0
    assert (await exec_caller.run(BOX, "true", exec_id=exec_id)).code == 0


async def test_max_execs_limits_the_execs_of_a_daemon(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--max-execs", "2")
    async with connect_with_container(daemon) as caller:
        calls = [await ExecCall(caller, "cat", stdin=True).begin() for _ in range(2)]
        full = await failure(caller.run(BOX, "true"))
        assert (full.code, full.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "EXEC_LIMIT")
        assert full.metadata["limit"] == "2"
        await calls[0].rpc.done_writing()
        await calls[0].wait_for_end()
        assert (await caller.run(BOX, "true")).code == 0
        calls[1].rpc.cancel()
