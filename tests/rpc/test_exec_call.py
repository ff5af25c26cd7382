"""ExecContainer over a channel: its protocol, flow control, and every way in which it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import pytest
import structlog.testing
from gpudock.v1 import (
    exec_pb2,
)
from gpudock_server.model.engine import ExecStream, TerminalSize

from tests.rig.patience import limit
from tests.rpc.fakes import FakeSession
from tests.rpc.in_memory_server import TIMEOUT_SECONDS, UUID, InMemoryServer, create_container, reason_of, wait_until

Request = exec_pb2.ExecContainerRequest
EOF: object = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in its stubs


def begin_exec(server: InMemoryServer, **options: Any) -> Any:
    """Begin a call of ExecContainer."""
    return server.containers.ExecContainer(**options)


class Exec:
    """A call of ExecContainer and its process."""

    def __init__(self, call: Any, session: FakeSession) -> None:
        self.call = call
        self.session = session

    async def read(self) -> exec_pb2.ExecContainerResponse:
        """Return the next response."""
        async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
            answer = await self.call.read()
        assert isinstance(answer, exec_pb2.ExecContainerResponse)
        return answer

    async def send(self, **fields: Any) -> None:
        """Send a request."""
        await self.call.write(Request(**fields))

    async def code(self) -> grpc.StatusCode:
        """Drop the remaining responses; return the status code of the call."""
        async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
            while True:
                try:
                    if await self.call.read() is EOF:
                        break
                except grpc.aio.AioRpcError:
                    break
            found: grpc.StatusCode = await self.call.code()
            return found


async def start_exec(server: InMemoryServer, **fields: Any) -> Exec:
    """Start a process in a running container."""
    await create_container(server)
    call = begin_exec(server)
    await call.write(Request(start=exec_pb2.ExecStart(**{"container": "a", "command": ["x"], **fields})))
    answer = await call.read()
    assert isinstance(answer, exec_pb2.ExecContainerResponse)
    assert answer.started.exec_id
    return Exec(call, await server.engine.sessions.get())


async def test_output_is_delivered_in_order_before_the_exit(server: InMemoryServer) -> None:
    run = await start_exec(server, exec_id=UUID)
    run.session.write_output(b"out")
    assert (await run.read()).stdout == b"out"
    run.session.write_output(b"err", ExecStream.STDERR)
    assert (await run.read()).stderr == b"err"
    run.session.exit(3)
    exited = (await run.read()).exited
    assert (exited.WhichOneof("result"), exited.code) == ("code", 3)
    assert await run.code() is grpc.StatusCode.OK
    assert run.session.closed.is_set()


async def test_large_output_is_split_and_complete(server: InMemoryServer) -> None:
    run = await start_exec(server)
    data = bytes(range(256)) * 12_000
    run.session.write_output(data)
    run.session.exit(0)
    chunks = []
    while (answer := await run.read()).WhichOneof("event") == "stdout":
        chunks.append(answer.stdout)
    assert b"".join(chunks) == data
    assert max(map(len, chunks)) <= 1024 * 1024


@pytest.mark.parametrize("first", [None, Request(), Request(stdin=b"x"), Request(resize=exec_pb2.TerminalSize())])
async def test_the_first_message_is_start(server: InMemoryServer, first: Request | None) -> None:
    call = begin_exec(server)
    if first is not None:
        await call.write(first)
    await call.done_writing()
    assert await Exec(call, FakeSession(request=None)).code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[arg-type]  # not used


async def test_an_exec_without_stdin_continues_after_the_client_closes_its_side(server: InMemoryServer) -> None:
    run = await start_exec(server)
    await run.call.done_writing()
    run.session.write_output(b"output")
    assert (await run.read()).stdout == b"output"
    run.session.exit(0)
    assert await run.code() is grpc.StatusCode.OK
    assert not run.session.stdin_closed.is_set()


async def test_stdin_is_written_and_closed(server: InMemoryServer) -> None:
    run = await start_exec(server, stdin=True)
    await run.send(stdin=b"a")
    await run.send(stdin=b"b")
    await run.send(close_stdin=exec_pb2.ExecCloseStdin())
    await asyncio.wait_for(run.session.stdin_closed.wait(), limit(TIMEOUT_SECONDS))
    assert run.session.written == [b"a", b"b"]
    await run.send(close_stdin=exec_pb2.ExecCloseStdin())
    await run.call.done_writing()
    run.session.exit(0)
    assert await run.code() is grpc.StatusCode.OK


async def test_a_closed_send_side_closes_stdin(server: InMemoryServer) -> None:
    run = await start_exec(server, stdin=True)
    await run.call.done_writing()
    await asyncio.wait_for(run.session.stdin_closed.wait(), limit(TIMEOUT_SECONDS))
    run.session.exit(0)
    assert await run.code() is grpc.StatusCode.OK


async def test_a_process_that_exits_does_not_wait_for_stdin(server: InMemoryServer) -> None:
    run = await start_exec(server, stdin=True)
    run.session.accepts_stdin.clear()
    await run.send(stdin=b"never read")
    run.session.exit(0)
    assert (await run.read()).HasField("exited")
    assert await run.code() is grpc.StatusCode.OK


async def test_stdin_waits_for_a_process_that_does_not_read(server: InMemoryServer) -> None:
    run = await start_exec(server, stdin=True)
    run.session.accepts_stdin.clear()

    async def send() -> None:
        for _ in range(200):
            await run.send(stdin=b"x" * (1024 * 1024))

    sending = asyncio.create_task(send())
    done, _ = await asyncio.wait((sending,), timeout=0.5)
    assert not done
    run.session.accepts_stdin.set()
    await asyncio.wait_for(sending, limit(30))
    await run.call.done_writing()
    await asyncio.wait_for(run.session.stdin_closed.wait(), limit(TIMEOUT_SECONDS))
    assert sum(map(len, run.session.written)) == 200 * 1024 * 1024
    run.session.exit(0)


async def test_output_waits_for_a_caller_that_does_not_read(server: InMemoryServer) -> None:
    run = await start_exec(server)
    for _ in range(200):
        run.session.write_output(b"x" * (1024 * 1024))
    run.session.exit(0)
    # Until no more output is read; the flow control windows of the connection limit the amount.
    read = -1
    while read != run.session.chunks_read:
        read = run.session.chunks_read
        await asyncio.sleep(0.2)
    assert read < 100
    total = 0
    while (answer := await run.read()).WhichOneof("event") == "stdout":
        total += len(answer.stdout)
    assert total == 200 * 1024 * 1024


async def test_a_terminal_is_resized_and_gets_signals(server: InMemoryServer) -> None:
    run = await start_exec(server, tty=True, size=exec_pb2.TerminalSize(columns=100, rows=50))
    assert run.session.request.size == TerminalSize(columns=100, rows=50)
    await run.send(resize=exec_pb2.TerminalSize(columns=80, rows=24))
    await run.send(signal=exec_pb2.ExecSignal(signal="INT"))
    await wait_until(lambda: bool(server.processes.signals))
    assert run.session.sizes == [TerminalSize(columns=80, rows=24)]
    assert server.processes.signals == [(2, False)]
    run.session.exit(130)
    assert (await run.read()).exited.signal == "SIGINT"


async def test_a_signal_waits_until_the_program_has_begun(server: InMemoryServer) -> None:
    server.processes.checks_until_begun = 3
    run = await start_exec(server)
    await run.send(signal=exec_pb2.ExecSignal(signal="INT"))
    await wait_until(lambda: bool(server.processes.signals))
    assert server.processes.signals == [(2, False)]
    run.session.exit(130)
    assert (await run.read()).exited.signal == "SIGINT"


@pytest.mark.parametrize(
    "later",
    [
        Request(stdin=b"x"),
        Request(close_stdin=exec_pb2.ExecCloseStdin()),
        Request(resize=exec_pb2.TerminalSize(columns=1, rows=1)),
        Request(signal=exec_pb2.ExecSignal(signal="SIGBOGUS")),
        Request(start=exec_pb2.ExecStart()),
        Request(),
    ],
)
async def test_an_invalid_later_message_ends_the_call_and_the_process(server: InMemoryServer, later: Request) -> None:
    run = await start_exec(server)
    await run.call.write(later)
    # The process writes no output meanwhile.
    assert await run.code() is grpc.StatusCode.INVALID_ARGUMENT
    await asyncio.wait_for(run.session.closed.wait(), limit(TIMEOUT_SECONDS))
    assert server.processes.signals[0] == (1, True)


async def test_a_disconnect_ends_the_process(server: InMemoryServer) -> None:
    run = await start_exec(server, stdin=True)
    run.call.cancel()
    await asyncio.wait_for(run.session.closed.wait(), limit(TIMEOUT_SECONDS))
    assert server.processes.signals[0] == (1, True)


async def test_a_disconnect_ends_the_process_while_output_is_pending(server: InMemoryServer) -> None:
    run = await start_exec(server)
    for _ in range(20):
        run.session.write_output(b"x" * (1024 * 1024))
    await wait_until(lambda: bool(run.session.chunks_read))
    with structlog.testing.capture_logs() as logs:
        run.call.cancel()
        await asyncio.wait_for(run.session.closed.wait(), limit(TIMEOUT_SECONDS))
        await wait_until(lambda: bool(logs))
    assert server.processes.signals[0] == (1, True)
    # A disconnect is not an error.
    assert {entry["log_level"] for entry in logs} == {"info"}


async def test_a_deadline_ends_the_process(server: InMemoryServer) -> None:
    await create_container(server)
    call = begin_exec(server, timeout=limit(0.3))
    await call.write(Request(start=exec_pb2.ExecStart(container="a", command=["x"])))
    session = await server.engine.sessions.get()
    await asyncio.wait_for(session.closed.wait(), limit(TIMEOUT_SECONDS))
    assert server.processes.signals[0] == (1, True)


async def test_an_exit_with_an_unknown_code_is_an_error(server: InMemoryServer) -> None:
    run = await start_exec(server)
    server.engine.containers.clear()
    run.session.exit(None)
    assert await run.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_errors_of_a_start_precede_the_first_response(server: InMemoryServer) -> None:
    call = begin_exec(server)
    await call.write(Request(start=exec_pb2.ExecStart(container="missing", command=["x"])))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert reason_of(caught.value) == "CONTAINER_NOT_FOUND"
