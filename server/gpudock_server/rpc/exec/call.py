"""One ExecContainer call: copies input from the caller to the process, and output from the process to the caller.

Nothing is buffered. Output is read when the caller has taken the previous output, and a message is read when the
process has taken the previous input. So a slow caller or process slows down only its own session.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

from gpudock.v1 import exec_pb2

from gpudock_server.core.exec.sessions import ExecSessions, Exited, Output, RunningExec
from gpudock_server.model.engine import ExecRequest, ExecStream
from gpudock_server.rpc.exec import requests as validation
from gpudock_server.rpc.middleware.interceptor import Context

# The contract allows 1 MiB; the adapter of the engine returns at most this much.
_CHUNK_BYTES = 512 * 1024

# The tag of a bytes field: number and wire type 2, https://protobuf.dev/programming-guides/encoding/#structure
_FIELDS = exec_pb2.ExecContainerResponse.DESCRIPTOR.fields_by_name
_TAGS = {stream: bytes([_FIELDS[stream.value].number << 3 | 2]) for stream in ExecStream}
_SEVEN_BITS = 0x7F
_CONTINUATION_BIT = 0x80


async def serve_exec(
    sessions: ExecSessions, requests: AsyncIterator[exec_pb2.ExecContainerRequest], context: Context
) -> None:
    """Start the command of the first request, and serve it until it ends or the caller disconnects.

    Once started, the session is always passed to `sessions.finish`, which ends a command that is still running.
    """
    start_request = validation.start(await anext(requests, None))
    running = await sessions.start(
        start_request.container, start_request.request, exec_id=start_request.exec_id, timeout=start_request.timeout
    )
    try:
        await context.write(exec_pb2.ExecContainerResponse(started=exec_pb2.ExecStarted(exec_id=running.id)))
        async with asyncio.TaskGroup() as tasks:
            # A separate task, so that an invalid message ends the call even if the process writes no output.
            reading = tasks.create_task(_InputReader(sessions, running, start_request.request).read_messages(requests))
            await _send_output(sessions, running, context)
            reading.cancel()
    finally:
        await sessions.finish(running)


async def _send_output(sessions: ExecSessions, running: RunningExec, context: Context) -> None:
    async with aclosing(sessions.events(running)) as events:  # type: ignore[type-var]  # a generator, typed as an iterator
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
    """Handles the messages of the caller after the first."""

    def __init__(self, sessions: ExecSessions, running: RunningExec, request: ExecRequest) -> None:
        self._sessions = sessions
        self._running = running
        self._request = request
        self._closed = False

    async def read_messages(self, messages: AsyncIterator[exec_pb2.ExecContainerRequest]) -> None:
        """Handle each message until the caller closes its side of the stream, which also closes the standard input."""
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
                await self._running.resize(validation.resize(message, tty=self._request.tty))
            case "signal":
                await self._sessions.signal(self._running, validation.signal(message))
            case _:
                validation.unexpected(message)

    async def _close_stdin(self) -> None:
        if not self._closed:
            self._closed = True
            await self._running.close_stdin()


def encoded_output(stream: ExecStream, data: bytes) -> bytes:
    """An encoded ExecContainerResponse with `data`; building a message would copy the data twice more."""
    return b"".join((_TAGS[stream], _varint(len(data)), data))


def _varint(number: int) -> bytes:
    """Encode a number, see https://protobuf.dev/programming-guides/encoding/#varints."""
    found = bytearray()
    while number > _SEVEN_BITS:
        found.append(number & _SEVEN_BITS | _CONTINUATION_BIT)
        number >>= 7
    found.append(number)
    return bytes(found)


def exec_exited_message(end: Exited) -> exec_pb2.ExecExited:
    """The exit of a command: its signal if it has one, else its exit code."""
    message = exec_pb2.ExecExited(message=end.message, timed_out=end.timed_out)
    if end.signal:
        message.signal = end.signal
    else:
        message.code = end.code
    return message
