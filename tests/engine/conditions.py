"""Waiting for conditions that a test reads without a call."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from tests.rig.patience import in_time


async def until_true(condition: Callable[[], object], description: str, seconds: float = 60.0) -> None:
    """Wait until `condition()` is true; raises AssertionError with `description` after `limit(seconds)`."""
    async with in_time(f"not true: {description}", seconds):
        while not condition():
            await asyncio.sleep(0.01)
