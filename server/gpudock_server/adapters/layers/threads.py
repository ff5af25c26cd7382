"""Blocking work that a cancelled caller does not abandon halfway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Interrupted(Exception):
    """A walk was told to stop; its caller is being cancelled and never sees this."""


class Interrupt:
    """A flag that long walks look at between two entries."""

    def __init__(self) -> None:
        self._raised = False

    def set(self) -> None:
        """Ask the walk to end."""
        self._raised = True

    def check(self) -> None:
        """Raise Interrupted if the walk was asked to end."""
        if self._raised:
            raise Interrupted


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
