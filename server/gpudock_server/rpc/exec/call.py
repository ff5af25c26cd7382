"""One call of ExecContainer: input from the caller, output to the caller, each at its own pace.

Nothing is kept here. The next output is taken when the caller's side has taken the last, and the next message is read
when the process has taken its input, so that whoever is slow holds the other back and nobody else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from gpudock.v1 import exec_pb2

from gpudock_server.core.exec.sessions import ExecSessions, Exited, Output, RunningExec
from gpudock_server.model.engine import ExecRequest
from gpudock_server.rpc.exec import requests as validation
from gpudock_server.rpc.exec.messages import encoded_output, exec_exited_message
from gpudock_server.rpc.middleware.interceptor import Context

# The contract allows 1 MiB; the engine's adapter gives no more than this at once.
_CHUNK_BYTES = 512 * 1024


async def serve_exec(
    sessions: ExecSessions, requests: AsyncIterator[exec_pb2.ExecContainerRequest], context: Context
) -> None:
    """Run what the first of `requests` says, to its end or to the caller's.

    Whatever happens after it was started, it is handed to `sessions.finish`, which ends what still runs.
    """
    asked = validation.start(await anext(requests, None))
    running = await sessions.start(asked.container, asked.request, exec_id=asked.exec_id, timeout=asked.timeout)
    try:
        await context.write(exec_pb2.ExecContainerResponse(started=exec_pb2.ExecStarted(exec_id=running.id)))
        async with asyncio.TaskGroup() as tasks:
            # What is wrong with a later message ends the call, also while the process says nothing.
            reading = tasks.create_task(_InputReader(sessions, running, asked.request).read_messages(requests))
            await _send_output(sessions, running, context)
            reading.cancel()
    finally:
        await sessions.finish(running)


async def _send_output(sessions: ExecSessions, running: RunningExec, context: Context) -> None:
    async with aclosing(sessions.events(running)) as events:  # type: ignore[type-var]  # a generator, typed as less
        async for event in events:
            if isinstance(event, Output):
                await _send_chunk(event, context)
            else:
                await _send_exit(event, context)


async def _send_chunk(output: Output, context: Context) -> None:
    data = output.data
    if len(data) <= _CHUNK_BYTES:
        await context.write(encoded_output(output.stream, data))
        return
    for first in range(0, len(data), _CHUNK_BYTES):
        await context.write(encoded_output(output.stream, data[first : first + _CHUNK_BYTES]))


async def _send_exit(end: Exited, context: Context) -> None:
    await context.write(exec_pb2.ExecContainerResponse(exited=exec_exited_message(end)))


class _InputReader:
    """What a caller sends after its first message."""

    def __init__(self, sessions: ExecSessions, running: RunningExec, request: ExecRequest) -> None:
        self._sessions = sessions
        self._running = running
        self._request = request
        self._closed = False

    async def read_messages(self, messages: AsyncIterator[exec_pb2.ExecContainerRequest]) -> None:
        """Act on each message until the caller closes its side, which ends the standard input too."""
        async for message in messages:
            await self._handle_message(message)
        if self._request.stdin:
            await self._close_stdin()

    async def _handle_message(self, message: exec_pb2.ExecContainerRequest) -> None:
        match message.WhichOneof("message"):
            case "stdin":
                data = validation.stdin(message, enabled=self._request.stdin, closed=self._closed)
                await self._running.write(data)
            case "close_stdin":
                validation.close_stdin(enabled=self._request.stdin)
                await self._close_stdin()
            case "resize":
                await self._running.resize(*validation.resize(message, tty=self._request.tty))
            case "signal":
                await self._sessions.signal(self._running, validation.signal(message))
            case _:
                validation.unexpected(message)

    async def _close_stdin(self) -> None:
        if not self._closed:
            self._closed = True
            await self._running.close_stdin()
