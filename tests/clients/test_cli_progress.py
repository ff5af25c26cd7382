"""The progress of an operation: live bars at a terminal, one line for each stage anywhere else."""

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
from tests.clients.scripted import Context, ScriptedServer
from tests.rig.patience import limit

MIB = 2**20


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return its seconds."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def _pulling(current: int, total: int = 0) -> operation_pb2.Operation:
    pull = messages.stage("pull-image", messages.WORKS, current_bytes=current, total_bytes=total)
    return messages.operation(pull, messages.stage("start", messages.TO_COME))


def _drawn(bars: StageBars, out: io.StringIO) -> str:
    """Return the live line as it is drawn now."""
    out.seek(0)
    out.truncate()
    bars.refresh()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).strip()


def test_bytes_that_move_have_a_bar_amounts_a_rate_and_the_time_that_remains(clock: Clock) -> None:
    out = io.StringIO()
    with StageBars(Console(file=out, force_terminal=True, width=120), clock, auto_refresh=False) as bars:
        bars.show(_pulling(10 * MIB, 100 * MIB))
        clock.now += 2
        bars.show(_pulling(30 * MIB, 100 * MIB))
        clock.now += 1
        shown = _drawn(bars, out)
    assert re.search(r"pull-image +━+.*30\.0/100\.0 MiB +10\.0 MiB/s +0:00:07 +0:00:03", shown), shown


def test_bytes_without_a_total_are_counted_and_a_stage_without_bytes_is_timed(clock: Clock) -> None:
    out = io.StringIO()
    with StageBars(Console(file=out, force_terminal=True, width=120), clock, auto_refresh=False) as bars:
        bars.show(_pulling(3 * MIB))
        clock.now += 61
        counted = _drawn(bars, out)
        bars.show(
            messages.operation(messages.stage("pull-image", messages.DONE), messages.stage("start", messages.WORKS))
        )
        timed = _drawn(bars, out)
    assert re.search(r"pull-image +3\.0 MiB +0:01:01$", counted), counted
    assert re.search(r"start +0:00:00$", timed), timed
    assert "MiB" not in timed


def test_the_time_of_a_stage_counts_from_its_start_by_the_servers_clock(clock: Clock) -> None:
    out = io.StringIO()
    late = messages.operation(messages.stage("stop", messages.WORKS))
    late.update_time.seconds = late.stages[0].start_time.seconds + 42
    with StageBars(Console(file=out, force_terminal=True, width=120), clock, auto_refresh=False) as bars:
        bars.show(late)
        clock.now += 3
        assert re.search(r"stop +0:00:45$", _drawn(bars, out))


async def _pulled(_: Any, __: Context) -> AsyncIterator[pb.CreateContainerResponse]:
    yield pb.CreateContainerResponse(operation=_pulling(MIB, 2 * MIB))
    await asyncio.sleep(1)
    ended = (messages.stage("pull-image", messages.DONE, current_bytes=2 * MIB), messages.stage("start", messages.DONE))
    yield pb.CreateContainerResponse(operation=messages.operation(*ended))
    yield pb.CreateContainerResponse(result=messages.container())


async def test_at_a_terminal_the_stage_at_work_is_redrawn_and_ended_ones_stay(server: ScriptedServer) -> None:
    server.on("CreateContainer", _pulled)
    ours, theirs = pty.openpty()
    set_size(theirs, 100, 30)
    words = ("create", "train", "busybox", "-q")
    process = await spawn(server.address, *words, stderr=theirs, env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    try:
        assert b"1.0/2.0 MiB" in await read_until(ours, b"MiB")
        seen = await read_until(ours, b"\x1b[?25h")
        out, _ = await asyncio.wait_for(process.communicate(), limit(DEADLINE))
    finally:
        os.close(ours)
    assert (process.returncode, out) == (0, b"train\n")
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", seen).decode()
    assert re.search(r"pull-image  done    1\.5s  2\.0 MiB\r\n", text), text
    assert re.search(r"start       done    1\.5s\r\n", text), text


_LINES = "pull-image  done    1.5s  2.0 MiB\nstart       done    1.5s\n"


async def test_without_a_terminal_there_is_one_line_for_each_stage(server: ScriptedServer) -> None:
    server.on("CreateContainer", _pulled)
    assert (await run(server.address, "create", "train", "busybox")).err == _LINES


async def test_a_terminal_that_cannot_redraw_gets_the_same_lines(server: ScriptedServer) -> None:
    server.on("CreateContainer", _pulled)
    ours, theirs = pty.openpty()
    words = ("create", "train", "busybox")
    process = await spawn(server.address, *words, stderr=theirs, env=os.environ | {"TERM": "dumb"})
    try:
        said = await read_until(ours, b"start       done    1.5s\r\n")
        assert await asyncio.wait_for(process.wait(), limit(DEADLINE)) == 0
    finally:
        os.close(ours)
        os.close(theirs)
    assert said.decode().replace("\r\n", "\n") == _LINES
