"""Exec sessions of the Python client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import gpudock
import grpc
import pytest
from gpudock import Client
from gpudock._exec import ExecExit
from gpudock.v1 import exec_pb2

from tests.clients.scripted_server import (
    Context,
    ScriptedServer,
    abort,
    drop_connection,
)
from tests.rig.patience import limit

Response = exec_pb2.ExecContainerResponse


async def shell(requests: AsyncIterator[exec_pb2.ExecContainerRequest], _: Context) -> AsyncIterator[Response]:
    """Echo input on stdout and sizes on stderr; exit with 3 at the end of input, or by a signal."""
    async for request in requests:
        match request.WhichOneof("message"):
            case "start":
                yield Response(started=exec_pb2.ExecStarted(exec_id=request.start.exec_id or "e1"))
            case "stdin":
                yield Response(stdout=request.stdin)
            case "close_stdin":
                yield Response(exited=exec_pb2.ExecExited(code=3))
                return
            case "resize":
                yield Response(stderr=f"{request.resize.columns}x{request.resize.rows}".encode())
            case "signal":
                yield Response(exited=exec_pb2.ExecExited(signal=request.signal.signal))
                return


async def test_an_exec_has_streams_and_an_exit(server: ScriptedServer, client: Client) -> None:
    server.on("ExecContainer", shell)
    async with client.containers.exec("train", ["sh"], stdin=True, tty=True, size=(80, 24), timeout=1.5) as session:
        assert session.exec_id == "e1"
        await session.write(b"hello")
        await session.resize(100, 40)
        await session.close_stdin()
        output = [chunk async for chunk in session.output()]
        exited = await session.exit()
        assert (exited.code, exited.returncode, exited.timed_out) == (3, 3, False)
        with pytest.raises(BrokenPipeError):
            await session.write(b"late")
    assert output == [("stdout", b"hello"), ("stderr", b"100x40")]


@pytest.mark.parametrize(
    ("name", "number"), [("SIGKILL", 137), ("SIGTERM", 143), ("SIGRTMIN+3", 165), ("SIGRTMAX-1", 191)]
)
async def test_the_return_code_of_a_signal(server: ScriptedServer, client: Client, name: str, number: int) -> None:
    server.on("ExecContainer", shell)
    async with client.containers.exec("train", ["sh"]) as session:
        await session.signal(name)
        assert await session.exit() == ExecExit(code=None, signal=name, message="", timed_out=False)
        assert (await session.exit()).returncode == number


async def test_run_collects_and_limits_output(server: ScriptedServer, client: Client) -> None:
    server.on("ExecContainer", shell)
    data = bytes(range(256)) * 4096
    done = await client.containers.run("train", ["cat"], input=data)
    assert (done.stdout, done.stderr, done.returncode, done.truncated) == (data, b"", 3, False)
    capped = await client.containers.run("train", ["cat"], input=data, limit_bytes=100_000)
    assert (capped.stdout, capped.truncated) == (data[:100_000], True)


async def test_run_of_a_command_that_does_not_read_its_input(server: ScriptedServer, client: Client) -> None:
    async def exit_at_once(requests: AsyncIterator[Any], _: Context) -> AsyncIterator[Response]:
        await anext(requests)
        yield Response(started=exec_pb2.ExecStarted(exec_id="e1"))
        yield Response(exited=exec_pb2.ExecExited(code=0))

    server.on("ExecContainer", exit_at_once)
    done = await client.containers.run("train", ["true"], input=b"x" * 8_000_000)
    assert done.returncode == 0


async def test_an_exec_that_is_refused_or_dropped(server: ScriptedServer, client: Client) -> None:
    async def refused(_: Any, context: Context) -> AsyncIterator[Response]:
        await abort(context, grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING")
        yield Response()

    async def dropped_exec(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Response]:
        await anext(requests)
        yield Response(started=exec_pb2.ExecStarted(exec_id="e1"))
        yield Response(stdout=b"half")
        await drop_connection(context)

    server.on("ExecContainer", refused)
    with pytest.raises(gpudock.PreconditionFailed) as caught:
        await client.containers.run("train", ["sh"], input=b"x")
    assert caught.value.reason == "CONTAINER_NOT_RUNNING"
    server.on("ExecContainer", dropped_exec)
    async with client.containers.exec("train", ["sh"]) as session:
        with pytest.raises(gpudock.Unavailable):
            await session.exit()
        with pytest.raises(gpudock.Unavailable):
            await session.exit()
    assert len(server.requests["ExecContainer"]) == 2


async def test_an_error_is_not_lost_if_a_write_fails_at_the_same_time(server: ScriptedServer, client: Client) -> None:
    """Without the workaround for https://github.com/grpc/grpc/issues/36066, about half of the errors are INTERNAL."""

    async def refused(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Response]:
        await anext(requests)
        yield Response(started=exec_pb2.ExecStarted(exec_id="e1"))
        for _ in range(20):
            await anext(requests)
        await abort(context, grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING")

    server.on("ExecContainer", refused)
    for _ in range(20):
        with pytest.raises(gpudock.PreconditionFailed) as caught:
            await client.containers.run("train", ["sh"], input=bytes(2**23))
        assert caught.value.reason == "CONTAINER_NOT_RUNNING"


async def test_output_can_be_read_after_a_write_failed(server: ScriptedServer, client: Client) -> None:
    async def exit_with_output(requests: AsyncIterator[Any], __: Context) -> AsyncIterator[Response]:
        await anext(requests)
        yield Response(started=exec_pb2.ExecStarted(exec_id="e1"))
        for _ in range(5):
            await anext(requests)
        for _ in range(40):
            yield Response(stdout=bytes(1000))
        yield Response(exited=exec_pb2.ExecExited(code=3))

    server.on("ExecContainer", exit_with_output)
    async with client.containers.exec("train", ["sh"], stdin=True) as session:
        with pytest.raises(BrokenPipeError):
            await session.write(bytes(2**26))
        assert sum([len(data) async for _, data in session.output()]) == 40_000
        assert (await session.exit()).code == 3


async def test_leaving_an_exec_cancels_the_call(server: ScriptedServer, client: Client) -> None:
    call_cancelled = asyncio.Event()

    async def endless(requests: AsyncIterator[Any], _: Context) -> AsyncIterator[Response]:
        await anext(requests)
        yield Response(started=exec_pb2.ExecStarted(exec_id="e1"))
        try:
            await asyncio.Event().wait()
        finally:
            call_cancelled.set()

    server.on("ExecContainer", endless)
    async with client.containers.exec("train", ["sleep", "inf"]):
        pass
    await asyncio.wait_for(call_cancelled.wait(), limit(5))
