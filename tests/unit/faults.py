"""Calls that fail, each in turn, before they have done anything or afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from gpudock_server.errors import GpudockError


class Faults:
    """What goes wrong: at the `at`-th call from now on (1 is the next), `act` is called, which mostly raises."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.hit_call = ""
        self.never_hit = True
        # Whether a call waits without end.
        self.blocked = False
        self._at = 0
        self._after = False
        self._act: Callable[[str], Awaitable[None]] | None = None

    def inject(self, at: int, act: Callable[[str], Awaitable[None]], *, after: bool) -> None:
        """`after`: once the call has been done."""
        self.calls, self.hit_call = [], ""
        self._at, self._act, self._after = at, act, after

    async def block(self, _: str) -> None:
        """A call that does not return, as all that a process waits for when it is killed."""
        self.blocked = True
        await asyncio.Event().wait()

    @asynccontextmanager
    async def call(self, name: str) -> AsyncIterator[None]:
        """Around every call."""
        self.calls.append(name)
        hit = self._act is not None and len(self.calls) == self._at
        if hit:
            self.hit_call, self.never_hit = name, False
        if hit and self._act is not None and not self._after:
            await self._act(name)
        yield
        if hit and self._act is not None and self._after:
            await self._act(name)


async def let_tasks_run(_: str) -> None:
    """Let everything else run until it waits."""
    for _turn in range(20):
        await asyncio.sleep(0)


def raising(error: Callable[[str], GpudockError]) -> Callable[[str], Awaitable[None]]:
    """What a fault does that is an error of the call."""

    async def act(name: str) -> None:
        raise error(name)

    return act
