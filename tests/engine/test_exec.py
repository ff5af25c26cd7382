"""ExecContainer through the stubs, on a real engine: streams, ends, and who is held back or ended when."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
import signal
import string
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from google.protobuf import duration_pb2
from gpudock.v1 import container_service_pb2, exec_pb2

from tests.calls import Caller, ExecResult, Failure, failure, failure_of, iterate
from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.rig import Daemon, EngineProxy, Rig
from tests.rig.patience import limit

__all__ = ["daemons"]

BOX = "box"
MIB = 1 << 20
# What a daemon may grow by, whatever passes through it.
BOUND = 64 * MIB
Request = exec_pb2.ExecContainerRequest
# Seconds that a `sleep` is asked for: a number of its own for each, to find it by among the host's processes.
_numbers = itertools.count(710_000_000)


class Talk:
    """One call of ExecContainer, message by message."""

    def __init__(self, caller: Caller, *command: str, deadline: float | None = None, **start: Any) -> None:
        start.setdefault("container", BOX)
        stub: Any = caller.containers.ExecContainer  # its type wants an iterator; without one, `write` is the way
        self.call = stub(timeout=deadline)
        self._answers = aiter(self.call)
        self._start = exec_pb2.ExecStart(command=command, **start)
        self.result = ExecResult()

    async def begun(self) -> Talk:
        """Itself, once the process has been started."""
        await self.ask()
        answer = await anext(self._answers)
        assert answer.WhichOneof("event") == "started"
        return self

    async def ask(self) -> None:
        """Only ask for it to be started."""
        await self.send(start=self._start)

    async def send(self, **message: Any) -> None:
        """One message."""
        await self.call.write(Request(**message))

    async def read(self) -> bool:
        """Take one more answer into the result; False when there is none."""
        answer = await anext(self._answers, None)
        if answer is None:
            return False
        match answer.WhichOneof("event"):
            case "stdout":
                self.result.stdout += answer.stdout
            case "stderr":
                self.result.stderr += answer.stderr
            case _:
                assert self.result.code is None, "it ends once"
                assert not self.result.signal
                exited = answer.exited
                self.result.code = exited.code if exited.WhichOneof("result") == "code" else None
                self.result.signal, self.result.message = exited.signal, exited.message
                self.result.timed_out = exited.timed_out
        return True

    async def says(self, text: bytes) -> None:
        """Wait for `text` on stdout."""
        async with asyncio.timeout(limit(60)):
            while text not in self.result.stdout:
                assert await self.read(), self.result

    async def ended(self) -> ExecResult:
        """What it did, once the RPC has ended; raises AioRpcError where that was an error."""
        async with asyncio.timeout(limit(60)):
            while await self.read():
                pass
        assert (self.result.code is None) != (not self.result.signal), self.result
        return self.result

    async def failed(self) -> Failure:
        """The error that the RPC ended with; it must have, and without a word on how the process ended."""
        try:
            await self.ended()
        except grpc.aio.AioRpcError as error:
            assert self.result.code is None
            assert not self.result.signal
            return failure_of(error)
        raise AssertionError(f"it did not fail: {self.result}")


@pytest_asyncio.fixture
async def box(caller: Caller) -> Caller:
    """A caller with a container that runs."""
    await caller.create(BOX)
    return caller


@asynccontextmanager
async def boxed(daemon: Daemon) -> AsyncIterator[Caller]:
    """A caller of a daemon of its own, likewise."""
    async with Caller(daemon.target) as caller:
        await caller.create(BOX)
        yield caller


def shell(script: str) -> tuple[str, ...]:
    """A command that runs `script`."""
    return ("sh", "-c", script)


def pids(number: int) -> list[int]:
    """The processes that sleep for `number` seconds."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes() == b"sleep\0%d\0" % number:
                found.append(int(process.name))
        except OSError:
            continue
    return found


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something that has to come about."""
    try:
        async with asyncio.timeout(limit(30)):
            while not condition():
                await asyncio.sleep(0.03)
    except TimeoutError:
        raise AssertionError(f"never: {what}") from None


async def until_gone(*numbers: int) -> None:
    """Wait until nothing sleeps for so long any more."""
    await until(lambda: not any(map(pids, numbers)), "it is ended")


def memory(daemon: Daemon, key: str) -> int:
    """VmRSS, what it has now, or VmHWM, the most it had since `forget_peak`; in bytes."""
    lines = Path(f"/proc/{daemon.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget_peak(daemon: Daemon) -> int:
    """Count VmHWM anew; what it begins with."""
    Path(f"/proc/{daemon.pid}/clear_refs").write_text("5")
    return memory(daemon, "VmRSS")


def seconds(value: float) -> duration_pb2.Duration:
    """A span of the contract's."""
    return duration_pb2.Duration(seconds=int(value), nanos=int(value % 1 * 1e9))


# ---- output, ends, environment ----


async def test_outputs_apart_and_the_exit_code(box: Caller) -> None:
    result = await box.run(BOX, *shell("echo out; echo err >&2; echo more; exit 9"))
    assert (result.stdout, result.stderr, result.code) == (b"out\nmore\n", b"err\n", 9)
    assert (result.signal, result.message, result.timed_out) == ("", "", False)


async def test_nothing_is_lost_at_the_end(box: Caller) -> None:
    result = await box.run(BOX, *shell("head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2; exit 3"))
    assert (len(result.stdout), len(result.stderr), result.code) == (3_000_000, 2_000_000, 3)


async def test_how_it_ended(box: Caller) -> None:
    for script, code, name in (
        ("kill -TERM $$", None, "SIGTERM"),
        ("kill -KILL $$", None, "SIGKILL"),
        ("kill -40 $$", None, "SIGRTMIN+6"),
        ("exit 255", 255, ""),
        ("exit 128", 128, ""),
        ("exit 193", 193, ""),
        ("exit 126", 126, ""),
    ):
        result = await box.run(BOX, *shell(script))
        assert (result.code, result.signal, result.message) == (code, name, ""), script


@pytest.mark.parametrize("tty", [False, True])
async def test_what_cannot_be_run_says_why(box: Caller, tty: bool) -> None:  # noqa: FBT001 - a parameter
    for command, fields, code, says in (
        ("nosuch", {}, 127, "executable file not found"),
        ("/no/such", {}, 127, "no such file or directory"),
        ("/etc/passwd", {}, 126, "permission denied"),
        ("/etc", {}, 126, "permission denied"),
        ("pwd", {"working_dir": "/no/such"}, 126, "no such file or directory"),
        ("pwd", {"working_dir": "/etc/passwd"}, 126, "not a directory"),
        ("pwd", {"user": "ghost"}, 126, "unable to find user ghost"),
        ("pwd", {"user": "0:ghosts"}, 126, "unable to find group ghosts"),
    ):
        where: dict[str, Any] = dict(fields)
        result = await box.run(BOX, command, tty=tty, **where)
        assert says in result.message, (command, fields)
        assert (result.code, result.stdout, result.stderr) == (code, b"", b""), (command, fields)


async def test_what_looks_like_the_engine_and_is_the_program(box: Caller) -> None:
    text = "OCI runtime exec failed: exec: nosuch: executable file not found\r\n"
    result = await box.run(BOX, *shell(f"printf '{text}'; exit 126"))
    assert (result.stdout, result.code, result.message) == (text.encode(), 126, "")


@pytest.mark.deep
async def test_every_byte_arrives_in_order_at_any_pace(box: Caller) -> None:
    """More than 300 MB, each byte compared with what was written; the reader sometimes looks away for a moment.

    Every line has a number and the same random text, so that no line is like another and no part of one like another
    part: what is lost, repeated or moved, by a byte or by a block, differs somewhere.
    """
    lines = 80_000
    dice = random.Random(5)  # noqa: S311 - the same text and paces every time
    text = "".join(dice.choices(string.ascii_letters, k=4_000))
    script = f'BEGIN {{ for (i = 0; i < {lines}; i++) printf "%015d {text}\\n", i }}'
    written = (f"{number:015d} {text}\n".encode() for number in range(lines))
    talk = await Talk(box, "awk", script).begun()
    ahead, read = b"", 0
    while await talk.read():
        came, talk.result.stdout = talk.result.stdout, b""
        ahead += b"".join(itertools.islice(written, max(0, len(came) - len(ahead)) // (len(text) + 17) + 1))
        assert ahead.startswith(came), f"something else was written than the {len(came)} bytes from {read} on"
        ahead, read = ahead[len(came) :], read + len(came)
        if dice.random() < 0.1:
            await asyncio.sleep(dice.random() * 0.005)
    assert (read, ahead, talk.result.code) == (lines * (len(text) + 17), b"", 0)


async def test_environment_working_dir_and_user(box: Caller) -> None:
    result = await box.run(
        BOX,
        *shell('echo "$GREETING|$PWD|$(id -u)|$(id -g)"'),
        env={"GREETING": "a b\n=c"},
        working_dir="/tmp",
        user="1000",
    )
    assert result.stdout == b"a b\n=c|/tmp|1000|1000\n"
    assert (await box.run(BOX, "id", "-u", user="user")).stdout == b"1000\n"


@pytest.mark.deep
async def test_fifty_at_once_do_not_mix(box: Caller) -> None:
    async def one(number: int) -> None:
        script = f"for i in $(seq 200); do echo out-{number}-$i; echo err-{number}-$i >&2; done; cat; exit {number}"
        result = await box.run(BOX, *shell(script), stdin=b"in-%d" % number)
        lines = [b"-%d-%d" % (number, line) for line in range(1, 201)]
        assert result.stdout == b"".join(b"out" + line + b"\n" for line in lines) + b"in-%d" % number
        assert result.stderr == b"".join(b"err" + line + b"\n" for line in lines)
        assert result.code == number

    await asyncio.gather(*(one(number) for number in range(50)))


# ---- input ----


async def test_input_ends_by_half_close(box: Caller) -> None:
    talk = await Talk(box, *shell("cat; echo over"), stdin=True).begun()
    await talk.send(stdin=b"one ")
    await talk.says(b"one ")
    await talk.send(stdin=b"two ")
    await talk.call.done_writing()
    assert (await talk.ended()).stdout == b"one two over\n"


async def test_input_ends_by_message_which_may_be_repeated(box: Caller) -> None:
    # The command outlives its input, so that the repeated message does not meet a call that has ended.
    command = shell("trap 'exit 0' TERM; cat; echo over; while :; do sleep 0.1; done")
    talk = await Talk(box, *command, stdin=True).begun()
    await talk.send(stdin=b"one ")
    await talk.says(b"one ")
    await talk.send(stdin=b"two ")
    await talk.send(close_stdin=exec_pb2.ExecCloseStdin())
    await talk.send(close_stdin=exec_pb2.ExecCloseStdin())
    await talk.says(b"one two over\n")
    await talk.send(signal=exec_pb2.ExecSignal(signal="TERM"))
    assert (await talk.ended()).stdout == b"one two over\n"


async def test_without_stdin_it_is_empty(box: Caller) -> None:
    assert (await box.run(BOX, "wc", "-c")).stdout.strip() == b"0"


async def test_input_that_nobody_reads_changes_nothing(box: Caller) -> None:
    result = await box.run(BOX, *shell("head -c 3; exit 4"), stdin=b"abc" * 1_000_000)
    assert (result.stdout, result.code) == (b"abc", 4)


@pytest.mark.deep
async def test_a_gigabyte_of_input_in_bounded_memory(box: Caller, shared_daemon: Daemon) -> None:
    size = 256 * 1024
    filler = os.urandom(size - 8)
    digest = hashlib.md5(usedforsecurity=False)

    async def requests() -> AsyncIterator[Request]:
        start = exec_pb2.ExecStart(container=BOX, command=["md5sum"], stdin=True)
        yield Request(start=start)
        for number in range((1 << 30) // size):
            chunk = number.to_bytes(8) + filler
            digest.update(chunk)
            yield Request(stdin=chunk)

    before = forget_peak(shared_daemon)
    output = b"".join([answer.stdout async for answer in box.containers.ExecContainer(requests())])
    assert output == f"{digest.hexdigest()}  -\n".encode()
    assert memory(shared_daemon, "VmHWM") - before < BOUND


@pytest.mark.deep
async def test_output_waits_for_its_reader_and_not_in_the_daemon(box: Caller, shared_daemon: Daemon) -> None:
    total = 300 * MIB + next(_numbers) % 1000
    before = forget_peak(shared_daemon)
    talk = await Talk(box, "head", "-c", str(total), "/dev/zero").begun()
    written: list[int] = []

    def stuck() -> bool:
        written.extend(_bytes_written(b"head\0-c\0%d\0/dev/zero\0" % total))
        return len(written) > 10 and len(set(written[-10:])) == 1

    await until(stuck, "the process is held back")
    assert written[-1] < BOUND
    assert (await box.run(BOX, "echo", "others")).stdout == b"others\n"
    read = 0
    while await talk.read():
        read += len(talk.result.stdout)
        talk.result.stdout = b""
    assert (read, talk.result.code) == (total, 0)
    assert memory(shared_daemon, "VmHWM") - before < BOUND


def _bytes_written(cmdline: bytes) -> list[int]:
    """By each process that runs so, so far (proc(5), /proc/PID/io)."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes() == cmdline:
                lines = (process / "io").read_text().splitlines()
                found += [int(line.split()[1]) for line in lines if line.startswith("wchar")]
        except OSError:
            continue
    return found


# ---- terminals and signals ----


async def test_a_terminal_and_its_sizes(box: Caller) -> None:
    # Before API 1.42 an engine is told the first size after the process has begun.
    script = (
        'until [ "$(stty size)" = "30 100" ]; do usleep 10000; done; echo first >&2; read line; stty size; tty; exit 5'
    )
    size = exec_pb2.TerminalSize(rows=30, columns=100)
    talk = await Talk(box, *shell(script), tty=True, stdin=True, size=size).begun()
    await talk.says(b"first\r\n")
    await talk.send(resize=exec_pb2.TerminalSize(rows=50, columns=200))
    await talk.send(stdin=b"go\n")
    result = await talk.ended()
    assert b"50 200\r\n/dev/pts/" in result.stdout
    assert (result.stderr, result.code) == (b"", 5)


async def test_a_terminal_nobody_types_at(box: Caller) -> None:
    script = 'until [ "$(stty size)" = "24 80" ]; do usleep 10000; done; echo done'
    result = await box.run(BOX, *shell(script), tty=True)
    assert result.stdout.endswith(b"done\r\n")


async def test_a_signal_reaches_the_process_alone(box: Caller) -> None:
    number = next(_numbers)
    script = f"trap 'echo got it; exit 7' USR1; trap 'echo and it' INT; sleep {number} &"
    script += " echo ready; while :; do usleep 10000; done"
    talk = await Talk(box, *shell(script)).begun()
    await talk.says(b"ready\n")
    for name in ("SIGINT", "int", "2"):
        talk.result.stdout = b""
        await talk.send(signal=exec_pb2.ExecSignal(signal=name))
        await talk.says(b"and it\n")
    await talk.send(signal=exec_pb2.ExecSignal(signal="USR1"))
    await talk.says(b"got it\n")
    await until(lambda: pids(number), "the child runs")
    (child,) = pids(number)
    os.kill(child, signal.SIGKILL)
    assert (await talk.ended()).code == 7


async def test_a_signal_sent_with_the_start_is_not_lost(box: Caller) -> None:
    start = exec_pb2.ExecStart(container=BOX, command=["sleep", "60"])
    requests = [Request(start=start), Request(signal=exec_pb2.ExecSignal(signal="SIGRTMIN+3"))]
    *_, last = [answer async for answer in box.containers.ExecContainer(iterate(requests))]
    assert last.exited.signal == "SIGRTMIN+3"


# ---- refusals ----


async def test_a_beginning_that_is_none(box: Caller) -> None:
    beginnings: tuple[tuple[list[Request], str], ...] = (
        ([], "start"),
        ([Request(stdin=b"x")], "start"),
        ([Request()], "start"),
        ([Request(start=exec_pb2.ExecStart(container=BOX))], "start.command"),
    )
    for messages, field in beginnings:
        refused = await failure(_all(box.containers.ExecContainer(iterate(messages))))
        assert (refused.code, refused.violations) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))


async def _all(stream: Any) -> list[Any]:
    return [answer async for answer in stream]


async def test_a_wrong_message_ends_call_and_process(box: Caller) -> None:
    for message, field in (
        (Request(stdin=b"x"), "stdin"),
        (Request(close_stdin=exec_pb2.ExecCloseStdin()), "close_stdin"),
        (Request(resize=exec_pb2.TerminalSize(rows=1, columns=1)), "resize"),
        (Request(signal=exec_pb2.ExecSignal(signal="65")), "signal.signal"),
        (Request(start=exec_pb2.ExecStart(container=BOX, command=["true"])), "start"),
        (Request(), "message"),
    ):
        number = next(_numbers)
        talk = await Talk(box, "sleep", str(number)).begun()
        await until(partial(pids, number), "it runs")
        await talk.call.write(message)
        refused = await talk.failed()
        assert (refused.code, refused.violations) == (grpc.StatusCode.INVALID_ARGUMENT, (field,))
        await until_gone(number)


async def test_containers_where_nothing_can_be_run(box: Caller) -> None:
    assert (await failure(box.run("nowhere", "true"))).reason == "CONTAINER_NOT_FOUND"
    pause = container_service_pb2.PauseContainerRequest(name=BOX)
    await box.containers.PauseContainer(pause)
    assert (await failure(box.run(BOX, "true"))).reason == "CONTAINER_PAUSED"
    await box.stop(BOX)
    stopped = await failure(box.run(BOX, "true"))
    assert (stopped.code, stopped.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_NOT_RUNNING")
    assert stopped.metadata["state"] == "STOPPED"


async def test_an_id_in_use_is_refused_and_free_afterwards(box: Caller) -> None:
    exec_id = str(uuid.uuid4())
    talks = [Talk(box, "cat", stdin=True, exec_id=exec_id) for _ in range(2)]
    outcomes = await asyncio.gather(*(talk.begun() for talk in talks), return_exceptions=True)
    (refused,) = (outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError))
    assert failure_of(refused).reason == "EXEC_EXISTS"
    assert refused.code() is grpc.StatusCode.ALREADY_EXISTS
    (winner,) = (outcome for outcome in outcomes if isinstance(outcome, Talk))
    await winner.call.done_writing()
    assert (await winner.ended()).code == 0
    assert (await box.run(BOX, "true", exec_id=exec_id)).code == 0


# ---- ends from outside ----


async def test_a_caller_that_hangs_up_ends_the_session_and_no_other(box: Caller) -> None:
    stubborn, free, asked = next(_numbers), next(_numbers), next(_numbers)
    script = (
        f"setsid sleep {free} & (trap '' HUP; exec sleep {stubborn}) &"
        f" (trap 'usleep 200000; echo cleaned > /cleaned; exit' HUP; sleep {asked} & wait) &"
        " echo ready; wait"
    )
    talk = await Talk(box, *shell(script)).begun()
    await talk.says(b"ready\n")
    await until(lambda: pids(stubborn) and pids(free) and pids(asked), "all run")
    talk.call.cancel()
    await until_gone(stubborn, asked)
    assert await box.shell(BOX, "cat /cleaned") == "cleaned\n", "its children had their grace, the leader gone"
    (survivor,) = pids(free)
    os.kill(survivor, signal.SIGKILL)


@pytest.mark.deep
async def test_a_callers_deadline_is_a_hang_up(box: Caller) -> None:
    number = next(_numbers)
    talk = await Talk(box, "sleep", str(number), deadline=3).begun()
    await until(lambda: pids(number), "it runs")
    assert (await talk.failed()).code is grpc.StatusCode.DEADLINE_EXCEEDED
    await until_gone(number)


async def test_a_timeout_asks_first(box: Caller) -> None:
    script = "trap 'echo bye; exit 5' TERM; while :; do usleep 10000; done"
    result = await box.run(BOX, *shell(script), timeout=seconds(0.5))
    assert (result.stdout, result.code, result.timed_out) == (b"bye\n", 5, True)


async def test_a_timeout_kills_then(box: Caller) -> None:
    script = "trap '' TERM; while :; do usleep 10000; done"
    result = await box.run(BOX, *shell(script), timeout=seconds(0.5))
    assert (result.signal, result.timed_out) == ("SIGKILL", True)


async def test_a_timeout_reaches_children_whose_parent_gave_in(box: Caller) -> None:
    number = next(_numbers)
    script = f"(trap '' TERM; exec sleep {number} >/dev/null 2>&1 </dev/null) & echo ready; wait"
    result = await box.run(BOX, *shell(script), timeout=seconds(1))
    assert (result.signal, result.timed_out) == ("SIGTERM", True)
    await until_gone(number)


async def test_what_ends_in_time_is_not_touched(box: Caller) -> None:
    result = await box.run(BOX, *shell("exit 3"), timeout=seconds(60))
    assert (result.code, result.timed_out) == (3, False)


@pytest.mark.parametrize("how", ["stop", "delete"])
async def test_its_container_is_stopped_meanwhile(box: Caller, how: str) -> None:
    talk = await Talk(box, *shell("echo ready; exec sleep 1000")).begun()
    await talk.says(b"ready\n")
    await (box.stop(BOX) if how == "stop" else box.delete(BOX))
    # What the engine can still say is up to it; a code of 0 it is not.
    try:
        assert (await talk.ended()).signal == "SIGKILL"
    except grpc.aio.AioRpcError as error:
        assert failure_of(error).reason == "CONTAINER_NOT_RUNNING"  # noqa: PT017 (either end is right)


# ---- daemons that are hurt ----


async def test_a_daemon_that_stops_ends_what_it_started(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start()
    numbers = [next(_numbers) for _ in range(3)]
    async with boxed(daemon) as caller:
        talks = [await Talk(caller, "sleep", str(number)).begun() for number in numbers]
        await until(lambda: all(map(pids, numbers)), "they run")
        daemon.terminate()
        for talk in talks:
            cut = await talk.failed()
            assert (cut.code, cut.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
        assert await asyncio.to_thread(daemon.wait) == 0
    assert not any(map(pids, numbers))


@pytest.mark.deep
async def test_callers_that_leave_at_any_moment_leave_nothing(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start()
    numbers = [next(_numbers) for _ in range(24)]
    async with boxed(daemon) as caller:
        for delay, number in enumerate(numbers):
            talk = Talk(caller, "sleep", str(number))
            beginning = asyncio.create_task(talk.begun())
            await asyncio.wait([beginning], timeout=delay * 0.004)
            talk.call.cancel()
            # grpc.aio may wait for ever for what it never sent.
            beginning.cancel()
            await asyncio.gather(beginning, return_exceptions=True)
        # It ends only when it has ended all that it began.
        assert await asyncio.to_thread(daemon.stop) == 0
    assert not any(map(pids, numbers))


async def test_a_limit(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start("--max-execs", "2")
    async with boxed(daemon) as caller:
        talks = [await Talk(caller, "cat", stdin=True).begun() for _ in range(2)]
        full = await failure(caller.run(BOX, "true"))
        assert (full.code, full.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "EXEC_LIMIT")
        assert full.metadata["limit"] == "2"
        await talks[0].call.done_writing()
        await talks[0].ended()
        assert (await caller.run(BOX, "true")).code == 0
        talks[1].call.cancel()


@pytest.mark.deep
async def test_nothing_leaks(daemons: IsolatedDaemons) -> None:
    """Two hundred commands, forty of each kind, cost no descriptor and no slot for good."""
    slots = 12
    daemon = await daemons.start("--max-execs", str(slots))
    async with boxed(daemon) as caller:
        await _eight_at_once(caller, "ends")
        before = await _descriptors_of_idle(caller, daemon, slots)
        for kind in ("ends", "cannot be run", "left in silence", "left while it talks", "left unborn"):
            for _ in range(5):
                await _eight_at_once(caller, kind)
            # Its pool may hold a few connections more or less, on a busy machine many more until they have been idle
            # for 15 s; each of forty would be one too many.
            await _descriptors_of_idle(caller, daemon, slots)
            await until(lambda: _descriptors(daemon) < before + 12, kind)
    assert await asyncio.to_thread(daemon.stop) == 0
    assert "never retrieved" not in daemon.log_text
    assert "Traceback" not in daemon.log_text, daemon.log_text


async def _eight_at_once(caller: Caller, kind: str) -> None:
    for outcome in await asyncio.gather(*(_one(caller, kind) for _ in range(8)), return_exceptions=True):
        if isinstance(outcome, grpc.aio.AioRpcError):
            # Those before may still be on their way out.
            assert failure_of(outcome).reason == "EXEC_LIMIT"
        elif outcome is not None:
            raise outcome


async def _one(caller: Caller, kind: str) -> None:
    match kind:
        case "ends":
            assert (await caller.run(BOX, "cat", stdin=b"x" * 100_000)).code == 0
        case "cannot be run":
            assert (await caller.run(BOX, "nosuch")).code == 127
        case "left in silence":
            talk = await Talk(caller, "sleep", "1000").begun()
            talk.call.cancel()
        case "left while it talks":
            talk = await Talk(caller, *shell("echo ready; exec cat /dev/zero")).begun()
            await talk.says(b"ready\n")
            talk.call.cancel()
        case "left unborn":
            talk = Talk(caller, "sleep", "1000", tty=True, stdin=True)
            await talk.ask()
            talk.call.cancel()


async def _descriptors_of_idle(caller: Caller, daemon: Daemon, slots: int) -> int:
    """How many the daemon has once every slot was free, and taken, and free again."""
    talks: list[Talk] = []
    async with asyncio.timeout(limit(60)):
        while len(talks) < slots:
            try:
                talks.append(await Talk(caller, "cat", stdin=True).begun())
            except grpc.aio.AioRpcError as error:
                assert failure_of(error).reason == "EXEC_LIMIT"  # noqa: PT017 - any other is the failure
                await asyncio.sleep(0.05)
    for talk in talks:
        await talk.call.done_writing()
        await talk.ended()
    return _descriptors(daemon)


def _descriptors(daemon: Daemon) -> int:
    return len(list(Path(f"/proc/{daemon.pid}/fd").iterdir()))


@pytest.mark.deep
async def test_an_engine_that_dies_is_no_end_and_its_process_is_ended_when_it_is_back(
    daemons: IsolatedDaemons, rig: Rig
) -> None:
    number = next(_numbers)
    proxy = rig.engine_proxy()
    async with AsyncExitStack() as stack:
        async with proxy:
            daemon = await daemons.start(docker_host=proxy.url)
            caller = await stack.enter_async_context(boxed(daemon))
            talk = await Talk(caller, "sleep", str(number)).begun()
            await until(lambda: pids(number), "it runs")
        cut = await talk.failed()
        assert (cut.code, cut.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_UNAVAILABLE")
        assert pids(number)
        async with EngineProxy(rig.engine.socket, proxy.path):
            await until_gone(number)
            await asyncio.to_thread(daemon.stop)
