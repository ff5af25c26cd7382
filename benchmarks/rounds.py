"""Compares several ways of doing one thing so that a busy machine affects all of them alike.

In every round each way is measured once, and every round begins with another way. Ratios are taken within a round, and
the result is their median: what slows the machine down for a while slows down both sides of a ratio.
"""

from __future__ import annotations

import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

Measure = Callable[[], Awaitable[float]]

_MIDDLE_HALF = 4


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of the rounds' ratios, and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        """Compute it from the ratios of all rounds."""
        if len(ratios) < 2:
            return cls(ratios[0], ratios[0], ratios[0])
        low, median, high = statistics.quantiles(ratios, n=_MIDDLE_HALF, method="inclusive")
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Samples:
    """The samples of each way by its name, in the order of the rounds."""

    by_name: Mapping[str, Sequence[float]]


async def compare(rounds: int, ways: Mapping[str, Measure], *, warm_up: int = 1) -> Samples:
    """Measure every way `rounds` times, after `warm_up` rounds without samples."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(-warm_up, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            sample = await ways[name]()
            if number >= 0:
                samples[name].append(sample)
    return Samples(samples)


def percentile(samples: Sequence[float], percent: int) -> float:
    """The `percent`-th percentile of samples."""
    return statistics.quantiles(samples, n=100, method="inclusive")[percent - 1]
