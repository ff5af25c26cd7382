"""ExecContainer over a real channel: its protocol, who is held back by whom, and every way it can end."""

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


def dial(server: InMemoryServer, **options: Any) -> Any:
    """A call of ExecContainer that is written to and read from."""
    return server.containers.ExecContainer(**options)


class Exec:
    """Both ends of one ExecContainer: the caller's call, and the process."""

    def __init__(self, call: Any, session: FakeSession) -> None:
        self.call = call
        self.session = session

    async def read(self) -> exec_pb2.ExecContainerResponse:
        """The next that the caller is told."""
        async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
            answer = await self.call.read()
        assert isinstance(answer, exec_pb2.ExecContainerResponse)
        return answer

    async def send(self, **fields: Any) -> None:
        """Say something to the process."""
        await self.call.write(Request(**fields))

    async def code(self) -> grpc.StatusCode:
        """How the call ends; what is still to be read is dropped."""
        async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
            while True:
                try:
                    if await self.call.read() is EOF:
                        break
                except grpc.aio.AioRpcError:
                    break
            found: grpc.StatusCode = await self.call.code()
            return found


async def started(server: InMemoryServer, **fields: Any) -> Exec:
    """A process in a container that runs."""
    await create_container(server)
    call = dial(server)
    await call.write(Request(start=exec_pb2.ExecStart(**{"container": "a", "command": ["x"], **fields})))
    answer = await call.read()
    assert isinstance(answer, exec_pb2.ExecContainerResponse)
    assert answer.started.exec_id
    return Exec(call, await server.engine.sessions.get())


async def test_output_comes_as_it_was_said_and_the_end_comes_last(server: InMemoryServer) -> None:
    run = await started(server, exec_id=UUID)
    run.session.write_output(b"out")
    assert (await run.read()).stdout == b"out"
    run.session.write_output(b"err", ExecStream.STDERR)
    assert (await run.read()).stderr == b"err"
    run.session.exit(3)
    exited = (await run.read()).exited
    assert (exited.WhichOneof("result"), exited.code) == ("code", 3)
    assert await run.code() is grpc.StatusCode.OK
    assert run.session.closed.is_set()


async def test_large_output_is_cut_and_whole(server: InMemoryServer) -> None:
    run = await started(server)
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
    call = dial(server)
    if first is not None:
        await call.write(first)
    await call.done_writing()
    assert await Exec(call, FakeSession(request=None)).code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[arg-type]  # never looked at


async def test_one_message_and_a_closed_send_side_is_a_plain_exec(server: InMemoryServer) -> None:
    run = await started(server)
    await run.call.done_writing()
    run.session.write_output(b"still here")
    assert (await run.read()).stdout == b"still here"
    run.session.exit(0)
    assert await run.code() is grpc.StatusCode.OK
    assert not run.session.stdin_closed.is_set()


async def test_stdin_and_its_end(server: InMemoryServer) -> None:
    run = await started(server, stdin=True)
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
    run = await started(server, stdin=True)
    await run.call.done_writing()
    await asyncio.wait_for(run.session.stdin_closed.wait(), limit(TIMEOUT_SECONDS))
    run.session.exit(0)
    assert await run.code() is grpc.StatusCode.OK


async def test_a_process_that_ends_does_not_wait_for_its_caller(server: InMemoryServer) -> None:
    run = await started(server, stdin=True)
    run.session.accepts_stdin.clear()
    await run.send(stdin=b"never taken")
    run.session.exit(0)
    assert (await run.read()).HasField("exited")
    assert await run.code() is grpc.StatusCode.OK


async def test_stdin_is_held_back_by_a_process_that_does_not_read(server: InMemoryServer) -> None:
    run = await started(server, stdin=True)
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


async def test_output_is_held_back_by_a_caller_that_does_not_read(server: InMemoryServer) -> None:
    run = await started(server)
    for _ in range(200):
        run.session.write_output(b"x" * (1024 * 1024))
    run.session.exit(0)
    # Until nothing more is taken; how much that is, the windows of the connection decide.
    taken = -1
    while taken != run.session.chunks_read:
        taken = run.session.chunks_read
        await asyncio.sleep(0.2)
    assert taken < 100
    total = 0
    while (answer := await run.read()).WhichOneof("event") == "stdout":
        total += len(answer.stdout)
    assert total == 200 * 1024 * 1024


async def test_a_terminal(server: InMemoryServer) -> None:
    run = await started(server, tty=True, size=exec_pb2.TerminalSize(columns=100, rows=50))
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
    run = await started(server)
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
async def test_a_later_message_that_is_wrong_ends_the_call_and_the_process(
    server: InMemoryServer, later: Request
) -> None:
    run = await started(server)
    await run.call.write(later)
    # The process says nothing meanwhile.
    assert await run.code() is grpc.StatusCode.INVALID_ARGUMENT
    await asyncio.wait_for(run.session.closed.wait(), limit(TIMEOUT_SECONDS))
    assert server.processes.signals[0] == (1, True)


async def test_hanging_up_ends_the_process(server: InMemoryServer) -> None:
    run = await started(server, stdin=True)
    run.call.cancel()
    await asyncio.wait_for(run.session.closed.wait(), limit(TIMEOUT_SECONDS))
    assert server.processes.signals[0] == (1, True)


async def test_hanging_up_while_output_waits_to_be_read_ends_the_process(server: InMemoryServer) -> None:
    run = await started(server)
    for _ in range(20):
        run.session.write_output(b"x" * (1024 * 1024))
    await wait_until(lambda: bool(run.session.chunks_read))
    with structlog.testing.capture_logs() as logs:
        run.call.cancel()
        await asyncio.wait_for(run.session.closed.wait(), limit(TIMEOUT_SECONDS))
        await wait_until(lambda: bool(logs))
    assert server.processes.signals[0] == (1, True)
    # Nobody is to look into the log for it.
    assert {entry["log_level"] for entry in logs} == {"info"}


async def test_a_deadline_ends_the_process(server: InMemoryServer) -> None:
    await create_container(server)
    call = dial(server, timeout=0.3)
    await call.write(Request(start=exec_pb2.ExecStart(container="a", command=["x"])))
    session = await server.engine.sessions.get()
    await asyncio.wait_for(session.closed.wait(), limit(TIMEOUT_SECONDS))
    assert server.processes.signals[0] == (1, True)


async def test_an_end_that_nobody_knows_is_an_error(server: InMemoryServer) -> None:
    run = await started(server)
    server.engine.containers.clear()
    run.session.exit(None)
    assert await run.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_exec_errors_come_before_started(server: InMemoryServer) -> None:
    call = dial(server)
    await call.write(Request(start=exec_pb2.ExecStart(container="nobody", command=["x"])))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert reason_of(caught.value) == "CONTAINER_NOT_FOUND"
