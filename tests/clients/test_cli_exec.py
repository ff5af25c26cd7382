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

from tests.clients.command import DEADLINE, Ended, read_until, run, set_size, spawn
from tests.clients.scripted import Context, ScriptedServer, abort
from tests.rig.patience import limit

Said = exec_pb2.ExecContainerResponse


async def shell(requests: AsyncIterator[exec_pb2.ExecContainerRequest], _: Context) -> AsyncIterator[Said]:
    """Hands input back on stdout and tells of the rest on stderr; ends with 3 at the end of input, or by a signal."""
    async for request in requests:
        match request.WhichOneof("message"):
            case "start":
                yield Said(started=exec_pb2.ExecStarted(exec_id="made"))
                if request.start.tty or not request.start.stdin:
                    yield Said(stdout=f"ready {request.start.size.columns}\n".encode())
            case "stdin":
                yield Said(stdout=request.stdin)
                if request.stdin == b"\x04":
                    yield Said(exited=exec_pb2.ExecExited(code=3))
                    return
            case "close_stdin":
                yield Said(stderr=b"end\n")
                yield Said(exited=exec_pb2.ExecExited(code=3))
                return
            case "resize":
                yield Said(stdout=f"{request.resize.columns}x{request.resize.rows}".encode())
            case "signal":
                yield Said(exited=exec_pb2.ExecExited(signal=request.signal.signal))
                return


async def test_exec_pipes_and_ends_with_the_commands_code(server: ScriptedServer) -> None:
    server.on("ExecContainer", shell)
    data = b"0123456789abcdef\n" * 50_000
    ended = await run(
        server.address, "exec", "-i", "-e", "A=1", "-w", "/w", "-u", "me", "train", "--", "cat", "-n", given=data
    )
    assert (ended.code, ended.err) == (3, "end\n")
    assert ended.out == data.decode()


async def test_exec_hands_signals_over(server: ScriptedServer) -> None:
    server.on("ExecContainer", shell)
    process = await spawn(server.address, "exec", "train", "sleep", "9")
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), limit(DEADLINE)) == b"ready 0\n"
    process.send_signal(signal.SIGTERM)
    await asyncio.wait_for(process.communicate(), limit(DEADLINE))
    assert process.returncode == 128 + signal.SIGTERM


async def test_exec_of_what_cannot_be_run(server: ScriptedServer) -> None:
    async def missing(_: Any, __: Context) -> AsyncIterator[Said]:
        yield Said(started=exec_pb2.ExecStarted(exec_id="made"))
        yield Said(exited=exec_pb2.ExecExited(code=127, message="nope: not found"))

    server.on("ExecContainer", missing)
    assert await run(server.address, "exec", "train", "nope") == Ended(127, "", "nope: not found\n")
    server.on("ExecContainer", refuses)
    assert (await run(server.address, "exec", "train", "true")).code == 125


async def refuses(_: Any, context: Context) -> AsyncIterator[Said]:
    await abort(context, grpc.StatusCode.NOT_FOUND, "CONTAINER_NOT_FOUND")
    yield Said()


async def test_exec_at_a_terminal(server: ScriptedServer) -> None:
    server.on("ExecContainer", shell)
    ours, theirs = pty.openpty()
    set_size(theirs, 90, 30)
    process = await spawn(server.address, "exec", "-it", "train", "sh", stdin=theirs, stdout=theirs, stderr=theirs)
    try:
        assert await read_until(ours, b"\n") == b"ready 90\n"
        os.write(ours, b"\x03")
        # The key comes back through the server: it was neither a signal nor echoed as ^C.
        assert await read_until(ours, b"\x03") == b"\x03"
        set_size(theirs, 120, 50)
        process.send_signal(signal.SIGWINCH)
        assert b"120x50" in await read_until(ours, b"120x50")
        os.write(ours, b"\x04")
        assert await asyncio.wait_for(process.wait(), limit(DEADLINE)) == 3
        assert termios.tcgetattr(theirs)[3] & termios.ICANON
    finally:
        os.close(ours)
        os.close(theirs)
