"""Shortens a failed random sequence by replaying parts of it.

Hypothesis cannot do that: the outcome of a kill decides which rules can be drawn next, so that it reports parts as
inconsistent. Here a step is a rule with its draws; a step that is not possible without the omitted steps is skipped.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import strategies as st

T = TypeVar("T")


class StepNotApplicableError(Exception):
    """The draws of a step are not possible in this part of the sequence."""


@dataclass
class Step:
    """An executed rule: its arguments, whether it draws, and its draws as (label, value) in order."""

    rule: str
    arguments: dict[str, Any]
    draws: bool
    drawn: list[tuple[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        values = [f"{name}={value!r}" for name, value in (*self.arguments.items(), *self.drawn)]
        return f"{self.rule}({', '.join(values)})"


class Draws:
    """The draws of a rule, which are recorded in its step."""

    def __init__(self, data: st.DataObject, step: Step) -> None:
        """`data` draws; `step` gets the draws."""
        self._data = data
        self._step = step

    def choose(self, options: Sequence[T], label: str, key: Callable[[T], object] = repr) -> T:
        """Draw an option; its key is recorded."""
        option = self._data.draw(st.sampled_from(options), label=label)
        self._step.drawn.append((label, key(option)))
        return option

    def number(self, low: int, high: int, label: str) -> int:
        """Draw a number from `low` to `high`."""
        value = self._data.draw(st.integers(low, high), label=label)
        self._step.drawn.append((label, value))
        return value

    def flag(self, label: str) -> bool:
        """Draw a boolean."""
        return self.number(0, 1, label) == 1


class ReplayedDraws(Draws):
    """Returns the recorded draws of a step. Raises StepNotApplicableError if a draw is not possible."""

    def __init__(self, step: Step) -> None:
        """`step` is a recorded step."""
        self._left = list(step.drawn)

    def _next(self, label: str) -> Any:
        if not self._left or self._left[0][0] != label:
            raise StepNotApplicableError(label)
        return self._left.pop(0)[1]

    def choose(self, options: Sequence[T], label: str, key: Callable[[T], object] = repr) -> T:
        """The option with the recorded key."""
        recorded = self._next(label)
        for option in options:
            if key(option) == recorded:
                return option
        raise StepNotApplicableError(label)

    def number(self, low: int, high: int, label: str) -> int:
        """The recorded number."""
        value = int(self._next(label))
        if not low <= value <= high:
            raise StepNotApplicableError(label)
        return value


def failure_location(error: BaseException) -> tuple[type[BaseException], str, int]:
    """The identity of a failure: its type, and the file and line of the tests that raised it."""
    tests = Path(__file__).parents[1]
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(tests)
    ]
    return type(error), frames[-1].filename if frames else "", (frames[-1].lineno or 0) if frames else 0


@dataclass(frozen=True)
class Failure:
    """An error, and the steps until then; the last step or the teardown after it has failed."""

    steps: tuple[Step, ...]
    error: Exception


@dataclass
class Shrunk:
    """The shortest sequence that fails, and the number of parts that were replayed."""

    steps: list[Step]
    failed_again: bool
    played: int

    def __str__(self) -> str:
        if not self.failed_again:
            return "the sequence does not fail again: the failure depends on timing, and no step was left out"
        lines = "\n".join(f"  {step}" for step in self.steps)
        return f"the shortest part that fails, of {self.played} replayed parts, has these steps:\n{lines}"


def shrink(steps: Sequence[Step], fails: Callable[[Sequence[Step]], bool], seconds: float) -> Shrunk:
    """Leave out as many steps as possible. Ends at the first replay after `seconds`.

    Larger parts are left out first, and later parts before earlier ones.
    """
    end = time.monotonic() + seconds
    found, played = list(steps), 1
    if not fails(found):
        return Shrunk(found, failed_again=False, played=played)
    size = len(found) // 2
    while size:
        progress = False
        for start in _starts(len(found), size):
            if time.monotonic() > end:
                return Shrunk(found, failed_again=True, played=played)
            shorter = found[:start] + found[start + size :]
            played += 1
            if fails(shorter):
                found, progress = shorter, True
        if not progress or size > len(found):
            size //= 2
    return Shrunk(found, failed_again=True, played=played)


def _starts(length: int, size: int) -> Iterator[int]:
    yield from range(max(length - size, 0), -1, -size)
