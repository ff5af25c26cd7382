"""Makes a random sequence that has failed shorter, by playing parts of it again.

Hypothesis cannot: what comes of a kill decides which rules there are to draw from, so that it finds parts inconsistent.
Here a step is a rule with all that was drawn for it. One that does not fit where others were left out is passed over.
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
    """What was drawn for a step cannot be had any more."""


@dataclass
class Step:
    """A rule that was followed: its arguments, whether it draws more, and what it drew, by label, in order."""

    rule: str
    arguments: dict[str, Any]
    draws: bool
    drawn: list[tuple[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        values = [f"{name}={value!r}" for name, value in (*self.arguments.items(), *self.drawn)]
        return f"{self.rule}({', '.join(values)})"


class Draws:
    """What a rule draws from; all of it is kept in the step."""

    def __init__(self, data: st.DataObject, step: Step) -> None:
        """Drawn by hypothesis."""
        self._data = data
        self._step = step

    def choose(self, options: Sequence[T], label: str, key: Callable[[T], object] = repr) -> T:
        """One of the options, which the step remembers by its key."""
        option = self._data.draw(st.sampled_from(options), label=label)
        self._step.drawn.append((label, key(option)))
        return option

    def number(self, low: int, high: int, label: str) -> int:
        """A number from `low` to `high`."""
        value = self._data.draw(st.integers(low, high), label=label)
        self._step.drawn.append((label, value))
        return value

    def flag(self, label: str) -> bool:
        """Yes or no."""
        return self.number(0, 1, label) == 1


class ReplayedDraws(Draws):
    """Gives what a step has drawn before. Raises StepNotApplicableError where that cannot be had."""

    def __init__(self, step: Step) -> None:
        """From a step that was recorded."""
        self._left = list(step.drawn)

    def _next(self, label: str) -> Any:
        if not self._left or self._left[0][0] != label:
            raise StepNotApplicableError(label)
        return self._left.pop(0)[1]

    def choose(self, options: Sequence[T], label: str, key: Callable[[T], object] = repr) -> T:
        """The option with the key that was recorded."""
        wanted = self._next(label)
        for option in options:
            if key(option) == wanted:
                return option
        raise StepNotApplicableError(label)

    def number(self, low: int, high: int, label: str) -> int:
        """The number that was recorded."""
        value = int(self._next(label))
        if not low <= value <= high:
            raise StepNotApplicableError(label)
        return value


def failure_location(error: BaseException) -> tuple[type[BaseException], str, int]:
    """What tells one failure from another: its type, and the line of the tests where it was raised."""
    tests = Path(__file__).parents[1]
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(tests)
    ]
    return type(error), frames[-1].filename if frames else "", (frames[-1].lineno or 0) if frames else 0


@dataclass(frozen=True)
class Failure:
    """What failed, and the steps until then. It was the last of them, or the cleaning up after it."""

    steps: tuple[Step, ...]
    error: Exception


@dataclass
class Shrunk:
    """The shortest sequence that was found to fail, and how often parts were played for it."""

    steps: list[Step]
    failed_again: bool
    played: int

    def __str__(self) -> str:
        if not self.failed_again:
            return "played again, this sequence does not fail: it depends on timing, and was not made shorter"
        lines = "\n".join(f"  {step}" for step in self.steps)
        return f"the shortest part that fails too (of {self.played} that were played) has these steps:\n{lines}"


def shrink(steps: Sequence[Step], fails: Callable[[Sequence[Step]], bool], seconds: float) -> Shrunk:
    """Leave out as many steps as can be left out, within `seconds` and what the last part takes that is played.

    Larger parts are left out first, and later ones before earlier ones.
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
