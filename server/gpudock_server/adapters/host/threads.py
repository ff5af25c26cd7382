"""Blocking work that a cancelled caller does not abandon halfway."""

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
    """Run `work` in a thread and return what it returns.

    A thread cannot be cancelled. When the caller is, this waits for the thread first: an undo that began while the
    thread still renamed or deleted would look at a tree that is about to change. An Interrupt among the arguments is
    set, so that a long walk ends early.
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
            running.exception()  # looked at, so that asyncio does not log it as lost
        raise
