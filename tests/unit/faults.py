"""Failures of calls, before or after their effect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from gpudock_server.errors import GpudockError


class Faults:
    """Counts calls, and runs an action, which usually raises, in one of them."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.hit_call = ""
        self.never_hit = True
        # Whether a call blocks forever.
        self.blocked = False
        self._at = 0
        self._after = False
        self._act: Callable[[str], Awaitable[None]] | None = None

    def inject(self, at: int, act: Callable[[str], Awaitable[None]], *, after: bool) -> None:
        """Run `act` in the `at`-th call from now on (1 is the next), before its effect or `after` it."""
        self.calls, self.hit_call = [], ""
        self._at, self._act, self._after = at, act, after

    async def block(self, _: str) -> None:
        """Block forever, as a call does whose process is killed."""
        self.blocked = True
        await asyncio.Event().wait()

    @asynccontextmanager
    async def call(self, name: str) -> AsyncIterator[None]:
        """Count a call, and run the action in it if it is the one."""
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
    """Let all other tasks run until they wait."""
    for _turn in range(20):
        await asyncio.sleep(0)


def raising(error: Callable[[str], GpudockError]) -> Callable[[str], Awaitable[None]]:
    """Return an action that raises an error, which is made from the name of the call."""

    async def act(name: str) -> None:
        raise error(name)

    return act
