"""Run blocking work in a thread and wait for its end, even if the caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

from gpudock_server.adapters.host.trees.interrupt import Interrupt, Interrupted

__all__ = ["Interrupt", "Interrupted", "run_to_end"]

P = ParamSpec("P")
T = TypeVar("T")


async def run_to_end(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run `work` in a thread and return its result.

    A thread cannot be cancelled. If the caller is cancelled, this sets the Interrupts among the arguments, so that a
    long walk ends early, and waits for the thread: an undo must not begin while the thread still renames or deletes.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        for argument in args:
            if isinstance(argument, Interrupt):
                argument.set()
        while not running.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # retrieved, so that asyncio does not log it
        raise
