"""How much longer than usual to wait: an emulated machine (tests/vm) is many times slower than a real one."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

PATIENCE = float(os.environ.get("GPUDOCK_RIG_PATIENCE", "1"))
"""What deadlines are multiplied with."""


@asynccontextmanager
async def in_time(otherwise: str, seconds: float = 60.0, details: Callable[[], str] = str) -> AsyncIterator[None]:
    """Fail with `otherwise`, and with what `details` says then, if the block takes longer."""
    try:
        async with asyncio.timeout(seconds * PATIENCE):
            yield
    except TimeoutError as error:
        raise AssertionError(f"{otherwise} within {seconds * PATIENCE:g} s: {details()}") from error
