"""A daemon with an etcd of its own, which can be lost; and what of the world has to come back then."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping

import pytest_asyncio
from gpudock.v1 import container_pb2, volume_pb2

from tests.engine.isolated_daemons import IsolatedDaemons, daemons, process_runs_in, until
from tests.rig import Daemon

__all__ = ["daemons"]

QUICK = ("--orphan-grace", "0", "--reconcile-interval", "0.5")


# What of a status only the engine container says.
_OF_THE_ENGINE = ("start_time", "finish_time", "exit_code", "oom_killed", "restart_count")


class Losing:
    """A daemon whose store can be lost."""

    def __init__(self, daemons: IsolatedDaemons) -> None:
        self._own = daemons
        self._daemon: Daemon | None = None

    @property
    def daemon(self) -> Daemon:
        """The latest."""
        assert self._daemon is not None
        return self._daemon

    @property
    def node(self) -> str:
        """What the daemon is called."""
        return self._own.node

    async def start(
        self,
        *flags: str,
        module: str = "gpudock_server",
        environment: Mapping[str, str] | None = None,
        serving: bool = True,
    ) -> None:
        """Start it on what is there."""
        self._daemon = await self._own.start(
            *QUICK,
            *flags,
            after=self._daemon,
            etcd_endpoints="",
            module=module,
            environment=environment,
            serving=serving,
        )

    async def kill(self) -> None:
        """End it as `kill -9` does, and its etcd."""
        await asyncio.to_thread(self.daemon.kill9)
        await self.ended()

    async def ended(self) -> None:
        """Its etcd has ended after it."""

        async def etcd_gone() -> bool:
            return not process_runs_in(self.daemon.state_dir)

        await until(etcd_gone)

    def forget(self) -> None:
        """Remove the folder of its etcd; neither may run."""
        shutil.rmtree(self.daemon.state_dir / "etcd")

    async def lose(self) -> None:
        """Kill, forget, start."""
        await self.kill()
        self.forget()
        await self.start()


@pytest_asyncio.fixture
async def losing(daemons: IsolatedDaemons) -> AsyncIterator[Losing]:
    """A daemon whose store can be lost."""
    losing = Losing(daemons)
    await losing.start()
    yield losing
    assert losing.daemon.running
    assert "Traceback" not in losing.daemon.log_text, losing.daemon.log_text


def lasting(volume: volume_pb2.Volume) -> volume_pb2.Volume:
    """What of a volume comes back: all but when it changed last, in which revision, and what names its state."""
    kept = volume_pb2.Volume()
    kept.CopyFrom(volume)
    for field in ("update_time", "used_bytes", "etag", "revision"):
        kept.ClearField(field)
    return kept


def lasting_container(container: container_pb2.Container) -> container_pb2.Container:
    """What of a container comes back: all but when it changed last, and what names its state."""
    kept = container_pb2.Container()
    kept.CopyFrom(container)
    for field in ("update_time", "etag"):
        kept.ClearField(field)
    if kept.status.state == container_pb2.CONTAINER_STATE_FAILED:
        # Its engine container would say, and is gone.
        status = kept.status
        for name in _OF_THE_ENGINE:
            status.ClearField(name)  # type: ignore[arg-type]  # the names of its fields
    return kept
