"""The environment of every benchmark: one rig, its docker command line, and daemons with default settings."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from benchmarks.docker_cli import DockerCli
from tests.calls import Caller
from tests.rig import Daemon, HttpStatusError, Rig

_LOG_TAIL = 8000


@dataclass(frozen=True, slots=True)
class Environment:
    """The environment of one run; with `quick`, benchmarks take few rounds."""

    rig: Rig
    docker: DockerCli
    quick: bool

    def rounds(self, full: int) -> int:
        """The number of rounds, where a complete run takes `full`."""
        return max(2, full // 6) if self.quick else full

    @asynccontextmanager
    async def daemon(self, *options: str) -> AsyncIterator[tuple[Caller, Daemon]]:
        """A daemon with its defaults except `options`, and a caller that uses its unix socket.

        Leaves no container behind.
        """
        daemon = await self.rig.start_daemon(*options)
        try:
            async with Caller(daemon.target) as caller:
                await caller.holders()  # connects, so that no sample has the time of that
                yield caller, daemon
                await caller.delete_all()
        except BaseException:
            print(daemon.log_text[-_LOG_TAIL:], file=sys.stderr)  # the log is removed with the rig
            raise
        finally:
            await asyncio.to_thread(daemon.stop)
            await asyncio.to_thread(self.rig.engine.remove_all)

    async def engine(self, method: str, path: str, **options: Any) -> Any:  # noqa: ANN401 - JSON
        """One call of the engine's API, on a new connection."""
        return await asyncio.to_thread(self.rig.engine.call, method, path, **options)

    async def moment(self, container: str, name: str) -> datetime:
        """StartedAt or FinishedAt of an engine container, by the engine's clock."""
        state = (await self.engine("GET", f"/containers/{container}/json"))["State"]
        return datetime.fromisoformat(state[name])

    async def discard(self, container: str) -> None:
        """Remove an engine container, if it exists."""
        try:
            await self.engine("DELETE", f"/containers/{container}", query={"force": "1"})
        except HttpStatusError as error:
            if error.status != 404:
                raise


class Stopwatch:
    """Measures the time since its construction."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def ms(self) -> float:
        """Milliseconds since the construction."""
        return (time.perf_counter() - self._start) * 1e3
