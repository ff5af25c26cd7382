"""The stage of an operation that is running, as a bar at a terminal; imports rich, so import this when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from gpudock.cli._progress import StageLines, name_width
from gpudock.cli._text import bytes_text
from gpudock.v1 import operation_pb2 as pb

_ACTIVE_STATES = {pb.OPERATION_STAGE_STATE_RUNNING: "", pb.OPERATION_STAGE_STATE_UNDOING: "undoing "}
_BAR_WIDTH = 24


class _RateColumn(ProgressColumn):
    """Bytes a second, in the units of the rest of the command."""

    def render(self, task: Task) -> Text:
        return Text(f"{bytes_text(int(task.speed))}/s" if task.speed else "")


class _AmountColumn(DownloadColumn):
    """Bytes that were moved, of how many where that is known."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text(bytes_text(int(task.completed)) if task.completed else "")


class _WithTotal(ProgressColumn):
    """Another column, for the stages whose number of bytes is known."""

    def __init__(self, column: ProgressColumn) -> None:
        super().__init__()
        self._column = column

    def render(self, task: Task) -> RenderableType:
        return self._column(task) if task.total else Text("")


class StageBars:
    """Redraws the active stage as time passes, below one line for each stage that has ended."""

    def __init__(self, console: Console, clock: Callable[[], float], *, auto_refresh: bool = True) -> None:
        """`clock` counts seconds."""
        self._clock = clock
        self._lines = StageLines(lambda line: console.print(Text(line), soft_wrap=True))
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            _WithTotal(BarColumn(_BAR_WIDTH)),
            _AmountColumn(binary_units=True),
            _RateColumn(),
            _WithTotal(TimeRemainingColumn()),
            TimeElapsedColumn(),
            console=console,
            auto_refresh=auto_refresh,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            get_time=clock,
        )
        self._number: int | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        """Begin to draw."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the cursor at the beginning of an empty line."""
        self._progress.stop()

    def refresh(self) -> None:
        """Draw the live line now."""
        self._progress.refresh()

    def show(self, operation: pb.Operation) -> None:
        """Draw this snapshot."""
        self._lines.show(operation)
        active = [(number, stage) for number, stage in enumerate(operation.stages) if stage.state in _ACTIVE_STATES]
        current = next((each for each in active if each[1].name == operation.stage), active[0] if active else None)
        if self._task is not None and (current is None or current[0] != self._number):
            self._progress.remove_task(self._task)
            self._task = self._number = None
        if current is None:
            return
        self._number, stage = current
        if self._task is None:
            self._task = self._progress.add_task("", start=False, total=None)
            # Only a difference of the server's clock is used: the two clocks need not agree.
            known = operation.update_time.seconds and stage.start_time.seconds
            passed = operation.update_time.ToNanoseconds() - stage.start_time.ToNanoseconds() if known else 0
            self._progress.tasks[-1].start_time = self._clock() - max(passed, 0) / 1e9
        self._progress.update(
            self._task,
            description=f"{_ACTIVE_STATES[stage.state]}{stage.name:{name_width(operation)}}",
            total=stage.total_bytes or None,
            completed=stage.current_bytes,
        )
