"""The progress of an operation: live bars at a terminal, otherwise one line for each stage."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import re
from collections.abc import AsyncIterator
from typing import Any

import pytest
from gpudock.cli._stage_bars import StageBars
from gpudock.v1 import container_service_pb2 as pb
from gpudock.v1 import operation_pb2
from rich.console import Console

from tests.clients import messages
from tests.clients.command import DEADLINE, read_until, run, set_size, spawn
from tests.clients.scripted_server import Context, ScriptedServer
from tests.rig.patience import limit

MIB = 2**20


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the seconds of the clock."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _pulling(current: int, total: int = 0) -> operation_pb2.Operation:
    pull = messages.stage("pull-image", messages.RUNNING, current_bytes=current, total_bytes=total)
    return messages.operation(pull, messages.stage("start", messages.PENDING))


def _drawn(bars: StageBars, out: io.StringIO) -> str:
    """Draw the live line; return its text."""
    out.seek(0)
    out.truncate()
    bars.refresh()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).strip()


def test_bytes_have_a_bar_amounts_a_rate_and_the_remaining_time(clock: Clock) -> None:
    out = io.StringIO()
    with StageBars(Console(file=out, force_terminal=True, width=120), clock, auto_refresh=False) as bars:
        bars.show(_pulling(10 * MIB, 100 * MIB))
        clock.now += 2
        bars.show(_pulling(30 * MIB, 100 * MIB))
        clock.now += 1
        shown = _drawn(bars, out)
    assert re.search(r"pull-image +━+.*30\.0/100\.0 MiB +10\.0 MiB/s +0:00:07 +0:00:03", shown), shown


def test_bytes_without_a_total_show_the_amount_and_stages_without_bytes_the_time(clock: Clock) -> None:
    out = io.StringIO()
    with StageBars(Console(file=out, force_terminal=True, width=120), clock, auto_refresh=False) as bars:
        bars.show(_pulling(3 * MIB))
        clock.now += 61
        counted = _drawn(bars, out)
        bars.show(
            messages.operation(
                messages.stage("pull-image", messages.SUCCEEDED), messages.stage("start", messages.RUNNING)
            )
        )
        timed = _drawn(bars, out)
    assert re.search(r"pull-image +3\.0 MiB +0:01:01$", counted), counted
    assert re.search(r"start +0:00:00$", timed), timed
    assert "MiB" not in timed


def test_the_time_of_a_stage_counts_from_its_start_on_the_server(clock: Clock) -> None:
    out = io.StringIO()
    late = messages.operation(messages.stage("stop", messages.RUNNING))
    late.update_time.seconds = late.stages[0].start_time.seconds + 42
    with StageBars(Console(file=out, force_terminal=True, width=120), clock, auto_refresh=False) as bars:
        bars.show(late)
        clock.now += 3
        assert re.search(r"stop +0:00:45$", _drawn(bars, out))


def _create_after(pulled: asyncio.Event) -> Any:
    """Return an answer to CreateContainer whose pull ends when `pulled` is set."""

    async def answer(_: Any, __: Context) -> AsyncIterator[pb.CreateContainerResponse]:
        yield pb.CreateContainerResponse(operation=_pulling(MIB, 2 * MIB))
        await pulled.wait()
        ended = (
            messages.stage("pull-image", messages.SUCCEEDED, current_bytes=2 * MIB),
            messages.stage("start", messages.SUCCEEDED),
        )
        yield pb.CreateContainerResponse(operation=messages.operation(*ended))
        yield pb.CreateContainerResponse(result=messages.container())

    return answer


async def test_at_a_terminal_the_running_stage_is_redrawn_and_ended_stages_stay(server: ScriptedServer) -> None:
    pulled = asyncio.Event()
    server.on("CreateContainer", _create_after(pulled))
    terminal, command_end = pty.openpty()
    set_size(command_end, 100, 30)
    words = ("create", "train", "busybox", "-q")
    process = await spawn(server.address, *words, stderr=command_end, env=os.environ | {"TERM": "xterm"})
    os.close(command_end)
    try:
        assert b"1.0/2.0 MiB" in await read_until(terminal, b"MiB")
        pulled.set()
        shown = await read_until(terminal, b"\x1b[?25h")
        out, _ = await asyncio.wait_for(process.communicate(), limit(DEADLINE))
    finally:
        os.close(terminal)
    assert (process.returncode, out) == (0, b"train\n")
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode()
    assert re.search(r"pull-image  done    1\.5s  2\.0 MiB\r\n", text), text
    assert re.search(r"start       done    1\.5s\r\n", text), text


_LINES = "pull-image  done    1.5s  2.0 MiB\nstart       done    1.5s\n"


async def test_without_a_terminal_there_is_one_line_for_each_stage(server: ScriptedServer) -> None:
    pulled = asyncio.Event()
    pulled.set()
    server.on("CreateContainer", _create_after(pulled))
    assert (await run(server.address, "create", "train", "busybox")).err == _LINES


async def test_a_terminal_that_cannot_redraw_shows_the_same_lines(server: ScriptedServer) -> None:
    pulled = asyncio.Event()
    pulled.set()
    server.on("CreateContainer", _create_after(pulled))
    terminal, command_end = pty.openpty()
    words = ("create", "train", "busybox")
    process = await spawn(server.address, *words, stderr=command_end, env=os.environ | {"TERM": "dumb"})
    try:
        output = await read_until(terminal, b"start       done    1.5s\r\n")
        assert await asyncio.wait_for(process.wait(), limit(DEADLINE)) == 0
    finally:
        os.close(terminal)
        os.close(command_end)
    assert output.decode().replace("\r\n", "\n") == _LINES
