"""ExecContainer on a real engine: output, input, terminals and signals."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import random
import signal
import string
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gpudock.v1 import exec_pb2

from tests.calls import Caller, iterate
from tests.engine.conditions import until_true
from tests.engine.exec_calls import (
    BOX,
    ExecCall,
    Request,
    exec_caller,
    shell,
    sleep_pids,
    unused_sleep_seconds,
)
from tests.engine.process_memory import memory, reset_peak
from tests.rig import Daemon

__all__ = ["exec_caller"]

MIB = 1 << 20
# The limit for the growth of a daemon's memory, for any amount of input and output.
MAX_GROWTH = 64 * MIB


async def test_stdout_stderr_and_the_exit_code_are_separate(exec_caller: Caller) -> None:
    result = await exec_caller.run(BOX, *shell("echo out; echo err >&2; echo more; exit 9"))
    assert (result.stdout, result.stderr, result.code) == (b"out\nmore\n", b"err\n", 9)
    assert (result.signal, result.message, result.timed_out) == ("", "", False)


async def test_no_output_is_lost_when_the_command_ends(exec_caller: Caller) -> None:
    result = await exec_caller.run(BOX, *shell("head -c 3000000 /dev/zero; head -c 2000000 /dev/zero >&2; exit 3"))
    assert (len(result.stdout), len(result.stderr), result.code) == (3_000_000, 2_000_000, 3)


async def test_the_exit_code_or_the_signal_is_reported(exec_caller: Caller) -> None:
    for script, code, name in (
        ("kill -TERM $$", None, "SIGTERM"),
        ("kill -KILL $$", None, "SIGKILL"),
        ("kill -40 $$", None, "SIGRTMIN+6"),
        ("exit 255", 255, ""),
        ("exit 128", 128, ""),
        ("exit 193", 193, ""),
        ("exit 126", 126, ""),
    ):
        result = await exec_caller.run(BOX, *shell(script))
        assert (result.code, result.signal, result.message) == (code, name, ""), script


@pytest.mark.parametrize("tty", [False, True])
async def test_a_command_that_cannot_be_started_has_a_message(exec_caller: Caller, tty: bool) -> None:  # noqa: FBT001 - pytest passes it by name
    for command, fields, code, says in (
        ("nosuch", {}, 127, "executable file not found"),
        ("/no/such", {}, 127, "no such file or directory"),
        ("/etc/passwd", {}, 126, "permission denied"),
        ("/etc", {}, 126, "permission denied"),
        ("pwd", {"working_dir": "/no/such"}, 126, "no such file or directory"),
        ("pwd", {"working_dir": "/etc/passwd"}, 126, "not a directory"),
        ("pwd", {"user": "absent"}, 126, "unable to find user absent"),
        ("pwd", {"user": "0:absent-group"}, 126, "unable to find group absent-group"),
    ):
        options: dict[str, Any] = dict(fields)
        result = await exec_caller.run(BOX, command, tty=tty, **options)
        assert says in result.message, (command, fields)
        assert (result.code, result.stdout, result.stderr) == (code, b"", b""), (command, fields)


async def test_output_that_resembles_an_error_of_the_engine_is_output(exec_caller: Caller) -> None:
    text = "OCI runtime exec failed: exec: nosuch: executable file not found\r\n"
    result = await exec_caller.run(BOX, *shell(f"printf '{text}'; exit 126"))
    assert (result.stdout, result.code, result.message) == (text.encode(), 126, "")


@pytest.mark.deep
async def test_every_byte_arrives_in_order_at_any_pace(exec_caller: Caller) -> None:
    """More than 300 MB, each byte compared with the written one; the reader pauses at random.

    Every line has a number and the same random text, so that all lines differ, and all parts of a line differ: a lost,
    repeated or moved byte or block causes a difference.
    """
    lines = 80_000
    dice = random.Random(5)  # noqa: S311 - the same text and paces every time
    text = "".join(dice.choices(string.ascii_letters, k=4_000))
    script = f'BEGIN {{ for (i = 0; i < {lines}; i++) printf "%015d {text}\\n", i }}'
    expected_lines = (f"{number:015d} {text}\n".encode() for number in range(lines))
    call = await ExecCall(exec_caller, "awk", script).begin()
    expected, read = b"", 0
    while await call.read():
        chunk, call.result.stdout = call.result.stdout, b""
        missing = max(0, len(chunk) - len(expected))
        expected += b"".join(itertools.islice(expected_lines, missing // (len(text) + 17) + 1))
        assert expected.startswith(chunk), f"the {len(chunk)} bytes at {read} differ from what was written"
        expected, read = expected[len(chunk) :], read + len(chunk)
        if dice.random() < 0.1:
            await asyncio.sleep(dice.random() * 0.005)
    assert (read, expected, call.result.code) == (lines * (len(text) + 17), b"", 0)


async def test_a_command_has_its_environment_working_directory_and_user(exec_caller: Caller) -> None:
    result = await exec_caller.run(
        BOX,
        *shell('echo "$GREETING|$PWD|$(id -u)|$(id -g)"'),
        env={"GREETING": "a b\n=c"},
        working_dir="/tmp",
        user="1000",
    )
    assert result.stdout == b"a b\n=c|/tmp|1000|1000\n"
    assert (await exec_caller.run(BOX, "id", "-u", user="user")).stdout == b"1000\n"


@pytest.mark.deep
async def test_fifty_execs_at_once_do_not_mix_their_streams(exec_caller: Caller) -> None:
    async def run(number: int) -> None:
        script = f"for i in $(seq 200); do echo out-{number}-$i; echo err-{number}-$i >&2; done; cat; exit {number}"
        result = await exec_caller.run(BOX, *shell(script), stdin=b"in-%d" % number)
        lines = [b"-%d-%d" % (number, line) for line in range(1, 201)]
        assert result.stdout == b"".join(b"out" + line + b"\n" for line in lines) + b"in-%d" % number
        assert result.stderr == b"".join(b"err" + line + b"\n" for line in lines)
        assert result.code == number

    await asyncio.gather(*(run(number) for number in range(50)))


async def test_a_half_close_of_the_call_ends_the_input(exec_caller: Caller) -> None:
    call = await ExecCall(exec_caller, *shell("cat; echo over"), stdin=True).begin()
    await call.send(stdin=b"one ")
    await call.wait_for_output(b"one ")
    await call.send(stdin=b"two ")
    await call.rpc.done_writing()
    assert (await call.wait_for_end()).stdout == b"one two over\n"


async def test_close_stdin_ends_the_input_and_may_be_repeated(exec_caller: Caller) -> None:
    # The command outlives its input, so that the repeated message does not meet a call that has ended.
    command = shell("trap 'exit 0' TERM; cat; echo over; while :; do sleep 0.1; done")
    call = await ExecCall(exec_caller, *command, stdin=True).begin()
    await call.send(stdin=b"one ")
    await call.wait_for_output(b"one ")
    await call.send(stdin=b"two ")
    await call.send(close_stdin=exec_pb2.ExecCloseStdin())
    await call.send(close_stdin=exec_pb2.ExecCloseStdin())
    await call.wait_for_output(b"one two over\n")
    await call.send(signal=exec_pb2.ExecSignal(signal="TERM"))
    assert (await call.wait_for_end()).stdout == b"one two over\n"


async def test_the_input_of_a_command_without_stdin_is_empty(exec_caller: Caller) -> None:
    assert (await exec_caller.run(BOX, "wc", "-c")).stdout.strip() == b"0"


async def test_input_that_the_command_does_not_read_is_discarded(exec_caller: Caller) -> None:
    result = await exec_caller.run(BOX, *shell("head -c 3; exit 4"), stdin=b"abc" * 1_000_000)
    assert (result.stdout, result.code) == (b"abc", 4)


@pytest.mark.deep
async def test_a_gigabyte_of_input_in_bounded_memory(exec_caller: Caller, shared_daemon: Daemon) -> None:
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

    before = reset_peak(shared_daemon.pid)
    output = b"".join([response.stdout async for response in exec_caller.containers.ExecContainer(requests())])
    assert output == f"{digest.hexdigest()}  -\n".encode()
    assert memory(shared_daemon.pid, "VmHWM") - before < MAX_GROWTH


@pytest.mark.deep
async def test_a_slow_reader_blocks_the_process_and_not_the_daemon(exec_caller: Caller, shared_daemon: Daemon) -> None:
    total = 300 * MIB + next(unused_sleep_seconds) % 1000
    before = reset_peak(shared_daemon.pid)
    call = await ExecCall(exec_caller, "head", "-c", str(total), "/dev/zero").begin()
    written: list[int] = []

    def is_blocked() -> bool:
        written.extend(_bytes_written(b"head\0-c\0%d\0/dev/zero\0" % total))
        return len(written) > 10 and len(set(written[-10:])) == 1

    await until_true(is_blocked, "the process is blocked")
    assert written[-1] < MAX_GROWTH
    assert (await exec_caller.run(BOX, "echo", "others")).stdout == b"others\n"
    read = 0
    while await call.read():
        read += len(call.result.stdout)
        call.result.stdout = b""
    assert (read, call.result.code) == (total, 0)
    assert memory(shared_daemon.pid, "VmHWM") - before < MAX_GROWTH


def _bytes_written(cmdline: bytes) -> list[int]:
    """The bytes that each process with this command line has written (proc(5), /proc/PID/io)."""
    counts = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cmdline").read_bytes() == cmdline:
                lines = (process / "io").read_text().splitlines()
                counts += [int(line.split()[1]) for line in lines if line.startswith("wchar")]
        except OSError:
            continue
    return counts


async def test_a_terminal_has_its_first_and_its_changed_size(exec_caller: Caller) -> None:
    # Before API 1.42 an engine gets the first size after the start of the process.
    script = (
        'until [ "$(stty size)" = "30 100" ]; do usleep 10000; done; echo first >&2; read line; stty size; tty; exit 5'
    )
    size = exec_pb2.TerminalSize(rows=30, columns=100)
    call = await ExecCall(exec_caller, *shell(script), tty=True, stdin=True, size=size).begin()
    await call.wait_for_output(b"first\r\n")
    await call.send(resize=exec_pb2.TerminalSize(rows=50, columns=200))
    await call.send(stdin=b"go\n")
    result = await call.wait_for_end()
    assert b"50 200\r\n/dev/pts/" in result.stdout
    assert (result.stderr, result.code) == (b"", 5)


async def test_a_terminal_without_stdin_has_the_default_size(exec_caller: Caller) -> None:
    script = 'until [ "$(stty size)" = "24 80" ]; do usleep 10000; done; echo done'
    result = await exec_caller.run(BOX, *shell(script), tty=True)
    assert result.stdout.endswith(b"done\r\n")


async def test_a_signal_reaches_the_process_and_not_its_children(exec_caller: Caller) -> None:
    number = next(unused_sleep_seconds)
    script = f"trap 'echo got it; exit 7' USR1; trap 'echo and it' INT; sleep {number} &"
    script += " echo ready; while :; do usleep 10000; done"
    call = await ExecCall(exec_caller, *shell(script)).begin()
    await call.wait_for_output(b"ready\n")
    for name in ("SIGINT", "int", "2"):
        call.result.stdout = b""
        await call.send(signal=exec_pb2.ExecSignal(signal=name))
        await call.wait_for_output(b"and it\n")
    await call.send(signal=exec_pb2.ExecSignal(signal="USR1"))
    await call.wait_for_output(b"got it\n")
    await until_true(lambda: sleep_pids(number), "the child process runs")
    (child,) = sleep_pids(number)
    os.kill(child, signal.SIGKILL)
    assert (await call.wait_for_end()).code == 7


async def test_a_signal_sent_with_the_start_is_not_lost(exec_caller: Caller) -> None:
    start = exec_pb2.ExecStart(container=BOX, command=["sleep", "60"])
    requests = [Request(start=start), Request(signal=exec_pb2.ExecSignal(signal="SIGRTMIN+3"))]
    *_, last = [response async for response in exec_caller.containers.ExecContainer(iterate(requests))]
    assert last.exited.signal == "SIGRTMIN+3"
