"""Time limits of tests, longer on a machine that is slower.

A limit that a test states is meant for an idle machine with two cores. `limit` multiplies it by the patience: how many
times longer than there a container takes to start here. Each rig measures that when it starts, and from then on every
half minute between two tests, because a machine that was idle can become busy.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

_USUAL_SECONDS = 0.3
"""How long an idle machine with two cores takes to create, start and remove a container."""

_MOST = 20.0
"""A machine that is slower than this does not get more time: what hangs must end."""

_VALID_SECONDS = 30.0


class _Patience:
    def __init__(self, least: float) -> None:
        self.least = least
        self.factor = least
        self.highest = least
        self._measured_at = -_VALID_SECONDS

    @property
    def is_outdated(self) -> bool:
        return time.monotonic() - self._measured_at >= _VALID_SECONDS

    def set_by(self, seconds: float) -> None:
        self._measured_at = time.monotonic()
        self.factor = max(self.least, min(seconds / _USUAL_SECONDS, _MOST))
        self.highest = max(self.highest, self.factor)


_patience = _Patience(float(os.environ.get("GPUDOCK_RIG_PATIENCE", "1")))


def limit(seconds: float) -> float:
    """`seconds` of an idle machine, as seconds of this one: never fewer."""
    return seconds * _patience.factor


def least_patience() -> float:
    """The factor that GPUDOCK_RIG_PATIENCE sets: 1, or more on an emulated machine (tests/vm)."""
    return _patience.least


def highest_patience() -> float:
    """The highest factor so far."""
    return _patience.highest


def measure_patience(start_container: Callable[[], None], *, again: bool = False) -> None:
    """Measure how long `start_container` takes; not if that was done in the last half minute, unless `again`."""
    if again or _patience.is_outdated:
        begin = time.monotonic()
        start_container()
        _patience.set_by(time.monotonic() - begin)


@asynccontextmanager
async def in_time(otherwise: str, seconds: float = 60.0, details: Callable[[], str] = str) -> AsyncIterator[None]:
    """Fail with `otherwise`, and with what `details` returns then, if the block takes longer than `limit(seconds)`."""
    allowed = limit(seconds)
    try:
        async with asyncio.timeout(allowed):
            yield
    except TimeoutError as error:
        raise AssertionError(f"{otherwise} within {allowed:g} s: {details()}") from error
