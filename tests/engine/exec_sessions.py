"""Sessions of DockerExecSession in an idle container."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest_asyncio
from gpudock_server.adapters.docker import DockerEngine
from gpudock_server.model.engine import ExecRequest, ExecStream, TerminalSize
from gpudock_server.ports import ExecSession

from tests.engine.engine_examples import start_container
from tests.rig.patience import limit

OUT, ERR = ExecStream.STDOUT, ExecStream.STDERR


@pytest_asyncio.fixture
async def box(engine: DockerEngine) -> str:
    """The engine id of an idle container."""
    return await start_container(engine, command=("sleep", "1000"))


def shell_request(
    script: str, *, tty: bool = False, stdin: bool = False, size: TerminalSize | None = None
) -> ExecRequest:
    return ExecRequest(("sh", "-c", script), tty=tty, stdin=stdin, size=size)


@asynccontextmanager
async def open_session(engine: DockerEngine, engine_id: str, request: ExecRequest) -> AsyncIterator[ExecSession]:
    session = await engine.exec(engine_id, request)
    try:
        yield session
    finally:
        await session.close()


async def read_all(session: ExecSession) -> tuple[bytes, bytes]:
    """Stdout and stderr until their end."""
    output = {OUT: bytearray(), ERR: bytearray()}
    async for stream, chunk in session.read():
        output[stream] += chunk
    return bytes(output[OUT]), bytes(output[ERR])


async def run_exec(engine: DockerEngine, engine_id: str, request: ExecRequest) -> tuple[bytes, bytes, int | None]:
    async with open_session(engine, engine_id, request) as session:
        out, err = await read_all(session)
        status = await session.status()
        assert not status.running
        return out, err, status.exit_code


async def wait_for_pid(session: ExecSession) -> int:
    """The pid of a session's process; the engine may send the output before it has the pid."""
    async with asyncio.timeout(limit(30)):
        while not (pid := (await session.status()).pid):
            await asyncio.sleep(0.01)
    return pid
