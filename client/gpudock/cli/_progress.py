"""The progress of an operation on stderr.

On a terminal the stage at work is one line that is redrawn, with the time it has taken and a bar where bytes move.
Anywhere else there is one line for each stage that has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TextIO

from gpudock.cli._operation_views import stage_seconds
from gpudock.cli._text import bytes_text, seconds_text
from gpudock.v1 import operation_pb2 as pb

_REDRAW_SECONDS = 0.2
_BAR_WIDTH = 24
_CLEAR_LINE = "\r\x1b[K"

_ENDS = {
    pb.OPERATION_STAGE_STATE_SUCCEEDED: "done",
    pb.OPERATION_STAGE_STATE_FAILED: "failed",
    pb.OPERATION_STAGE_STATE_UNDONE: "undone",
}
_AT_WORK = {pb.OPERATION_STAGE_STATE_RUNNING: "", pb.OPERATION_STAGE_STATE_UNDOING: "undoing "}


class Progress:
    """Draws snapshots of one operation. Snapshots may skip stages; every stage that has ended gets its line once."""

    def __init__(self, out: TextIO, *, live: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """`live` redraws; it takes a terminal."""
        self._out = out
        self._live = live
        self._clock = clock
        self._told: set[tuple[int, int]] = set()
        self._current: tuple[int, pb.OperationStage] | None = None
        self._since = 0.0
        self._width = 0

    def show(self, operation: pb.Operation) -> None:
        """Draw this snapshot."""
        self._width = max((len(stage.name) for stage in operation.stages), default=0)
        for number, stage in enumerate(operation.stages):
            end = _ENDS.get(stage.state)
            if end and (number, stage.state) not in self._told:
                self._told.add((number, stage.state))
                self._write_line(_ended_text(stage, end, self._width))
        self._take_current(operation)
        self.redraw()

    def redraw(self) -> None:
        """Draw the line of the stage at work anew: time goes on also where nothing else does."""
        if not self._live:
            return
        text = ""
        if self._current:
            stage = self._current[1]
            taken = seconds_text(self._clock() - self._since)
            text = f"{stage.name:{self._width}}  {_AT_WORK[stage.state]}{_bytes_bar(stage)}{taken}"
        columns = shutil.get_terminal_size().columns
        self._out.write(_CLEAR_LINE + text[: columns - 1])
        self._out.flush()

    def close(self) -> None:
        """Leave the cursor at the beginning of an empty line."""
        self._current = None
        self.redraw()

    def _take_current(self, operation: pb.Operation) -> None:
        at_work = [each for each in enumerate(operation.stages) if each[1].state in _AT_WORK]
        current = next((each for each in at_work if each[1].name == operation.stage), at_work[0] if at_work else None)
        if current and (self._current is None or current[0] != self._current[0]):
            # Only spans of the server's clock are used: it need not agree with this one.
            before = operation.update_time.ToNanoseconds() - current[1].start_time.ToNanoseconds()
            known = operation.update_time.seconds and current[1].start_time.seconds
            self._since = self._clock() - (max(before, 0) / 1e9 if known else 0.0)
        self._current = current

    def _write_line(self, text: str) -> None:
        self._out.write(f"{_CLEAR_LINE if self._live else ''}{text}\n")
        self._out.flush()


@asynccontextmanager
async def drawn(progress: Progress) -> AsyncIterator[Progress]:
    """Redraw it in the meantime."""
    task = asyncio.create_task(_keep_drawing(progress))
    try:
        yield progress
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        progress.close()


async def _keep_drawing(progress: Progress) -> None:
    while True:
        await asyncio.sleep(_REDRAW_SECONDS)
        progress.redraw()


def _ended_text(stage: pb.OperationStage, end: str, width: int) -> str:
    moved = f"  {bytes_text(stage.current_bytes)}" if stage.current_bytes else ""
    return f"{stage.name:{width}}  {end:6}  {seconds_text(stage_seconds(stage))}{moved}"


def _bytes_bar(stage: pb.OperationStage) -> str:
    if not stage.total_bytes:
        return f"{bytes_text(stage.current_bytes)}  " if stage.current_bytes else ""
    filled = min(stage.current_bytes * _BAR_WIDTH // stage.total_bytes, _BAR_WIDTH)
    amounts = f"{bytes_text(stage.current_bytes)} / {bytes_text(stage.total_bytes)}"
    return f"[{'#' * filled}{'-' * (_BAR_WIDTH - filled)}] {amounts}  "
