"""`gpudock exec`: its streams, signals, terminal and exit code."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import termios
from collections.abc import AsyncIterator
from typing import Any

import grpc
from gpudock.v1 import exec_pb2

from tests.clients.command import DEADLINE, CommandResult, read_until, run, set_size, spawn
from tests.clients.scripted_server import Context, ScriptedServer, abort
from tests.rig.patience import limit

Response = exec_pb2.ExecContainerResponse


async def shell(requests: AsyncIterator[exec_pb2.ExecContainerRequest], _: Context) -> AsyncIterator[Response]:
    """Echo input on stdout and report other messages; exit with 3 at the end of input, or by a signal."""
    async for request in requests:
        match request.WhichOneof("message"):
            case "start":
                yield Response(started=exec_pb2.ExecStarted(exec_id="e1"))
                if request.start.tty or not request.start.stdin:
                    yield Response(stdout=f"ready {request.start.size.columns}\n".encode())
            case "stdin":
                yield Response(stdout=request.stdin)
                if request.stdin == b"\x04":
                    yield Response(exited=exec_pb2.ExecExited(code=3))
                    return
            case "close_stdin":
                yield Response(stderr=b"end\n")
                yield Response(exited=exec_pb2.ExecExited(code=3))
                return
            case "resize":
                yield Response(stdout=f"{request.resize.columns}x{request.resize.rows}".encode())
            case "signal":
                yield Response(exited=exec_pb2.ExecExited(signal=request.signal.signal))
                return


async def test_exec_pipes_input_and_output_and_exits_with_the_code_of_the_process(server: ScriptedServer) -> None:
    server.on("ExecContainer", shell)
    data = b"0123456789abcdef\n" * 50_000
    ended = await run(
        server.address, "exec", "-i", "-e", "A=1", "-w", "/w", "-u", "me", "train", "--", "cat", "-n", stdin=data
    )
    assert (ended.code, ended.err) == (3, "end\n")
    assert ended.out == data.decode()


async def test_exec_forwards_signals(server: ScriptedServer) -> None:
    server.on("ExecContainer", shell)
    process = await spawn(server.address, "exec", "train", "sleep", "9")
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), limit(DEADLINE)) == b"ready 0\n"
    process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(process.communicate(), limit(DEADLINE))
    assert process.returncode == 128 + signal.SIGTERM


async def test_exec_of_a_missing_program_or_container(server: ScriptedServer) -> None:
    async def missing(_: Any, __: Context) -> AsyncIterator[Response]:
        yield Response(started=exec_pb2.ExecStarted(exec_id="e1"))
        yield Response(exited=exec_pb2.ExecExited(code=127, message="nope: not found"))

    server.on("ExecContainer", missing)
    assert await run(server.address, "exec", "train", "nope") == CommandResult(127, "", "nope: not found\n")
    server.on("ExecContainer", not_found)
    assert (await run(server.address, "exec", "train", "true")).code == 125


async def not_found(_: Any, context: Context) -> AsyncIterator[Response]:
    await abort(context, grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND")
    yield Response()


async def test_exec_at_a_terminal_forwards_keys_and_its_size(server: ScriptedServer) -> None:
    server.on("ExecContainer", shell)
    terminal, command_end = pty.openpty()
    set_size(command_end, 90, 30)
    process = await spawn(
        server.address, "exec", "-it", "train", "sh", stdin=command_end, stdout=command_end, stderr=command_end
    )
    try:
        assert await read_until(terminal, b"\n") == b"ready 90\n"
        os.write(terminal, b"\x03")
        # The server echoes the key: it was neither a signal nor echoed by the terminal as ^C.
        assert await read_until(terminal, b"\x03") == b"\x03"
        set_size(command_end, 120, 50)
        process.send_signal(signal.SIGWINCH)
        assert b"120x50" in await read_until(terminal, b"120x50")
        os.write(terminal, b"\x04")
        assert await asyncio.wait_for(process.wait(), limit(DEADLINE)) == 3
        assert termios.tcgetattr(command_end)[3] & termios.ICANON
    finally:
        os.close(terminal)
        os.close(command_end)
