"""The progress of an operation on stderr: live bars at a terminal, else one line for each stage that has ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import click

from gpudock.cli._operation_views import stage_seconds
from gpudock.cli._text import bytes_text, seconds_text
from gpudock.v1 import operation_pb2 as pb

if TYPE_CHECKING:
    from gpudock.cli._stage_bars import StageBars

_ENDS = {
    pb.OPERATION_STAGE_STATE_SUCCEEDED: "done",
    pb.OPERATION_STAGE_STATE_FAILED: "failed",
    pb.OPERATION_STAGE_STATE_UNDONE: "undone",
}


class Progress(Protocol):
    """Shows an operation as its snapshots arrive."""

    def show(self, operation: pb.Operation) -> None:
        """Show this snapshot; snapshots may skip stages."""


class StageLines:
    """Prints one line for each stage when it has ended."""

    def __init__(self, print_line: Callable[[str], None]) -> None:
        self._print_line = print_line
        self._printed: set[tuple[int, int]] = set()

    def show(self, operation: pb.Operation) -> None:
        """Print the stages that have ended since the last snapshot."""
        width = name_width(operation)
        for number, stage in enumerate(operation.stages):
            end = _ENDS.get(stage.state)
            if end and (number, stage.state) not in self._printed:
                self._printed.add((number, stage.state))
                moved = f"  {bytes_text(stage.current_bytes)}" if stage.current_bytes else ""
                self._print_line(f"{stage.name:{width}}  {end:6}  {seconds_text(stage_seconds(stage))}{moved}")


def name_width(operation: pb.Operation) -> int:
    """Return the number of characters of the longest name of a stage."""
    return max((len(stage.name) for stage in operation.stages), default=0)


@contextmanager
def progress() -> Iterator[Progress]:
    """Show progress on stderr in the way that suits it."""
    bars = _bars() if sys.stderr.isatty() else None
    if bars is None:
        yield StageLines(lambda line: click.echo(line, err=True))
    else:
        with bars:
            yield bars


def _bars() -> StageBars | None:
    """Return live bars, or None for a terminal that cannot redraw a line."""
    from rich.console import Console

    from gpudock.cli._stage_bars import StageBars

    console = Console(file=sys.stderr, markup=False, emoji=False, highlight=False)
    return None if console.is_dumb_terminal else StageBars(console, time.monotonic)
