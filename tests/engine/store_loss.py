"""A daemon with an embedded etcd whose data can be deleted, saved and restored; what is restored of each resource."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest_asyncio
from gpudock.v1 import container_pb2, volume_pb2

from tests.engine.isolated_daemons import FREQUENT_RECONCILE, IsolatedDaemons, daemons, process_runs_in, until
from tests.rig import Daemon

__all__ = ["daemons"]

# Fields of a status that only the engine container holds.
_ENGINE_STATUS_FIELDS = ("start_time", "finish_time", "exit_code", "oom_killed", "restart_count")


class EmbeddedStoreDaemon:
    """A daemon and its successors on one state directory, which holds the data of an embedded etcd."""

    def __init__(self, daemons: IsolatedDaemons) -> None:
        self._daemons = daemons
        self._daemon: Daemon | None = None

    @property
    def daemon(self) -> Daemon:
        """The daemon that was started last."""
        assert self._daemon is not None
        return self._daemon

    @property
    def node(self) -> str:
        """The node name of the daemon."""
        return self._daemons.node

    async def start(
        self,
        *flags: str,
        module: str = "gpudock_server",
        environment: Mapping[str, str] | None = None,
        serving: bool = True,
    ) -> None:
        """Start a daemon on the state that the previous daemon left; the arguments are those of IsolatedDaemons."""
        self._daemon = await self._daemons.start(
            *FREQUENT_RECONCILE,
            *flags,
            after=self._daemon,
            etcd_endpoints="",
            module=module,
            environment=environment,
            serving=serving,
        )

    async def kill(self) -> None:
        """Kill the daemon with SIGKILL, and wait until its etcd has ended."""
        await asyncio.to_thread(self.daemon.kill9)
        await self.wait_for_etcd_exit()

    async def wait_for_etcd_exit(self) -> None:
        """Wait until the etcd of a killed daemon has ended."""

        async def etcd_ended() -> bool:
            return not process_runs_in(self.daemon.state_dir)

        await until(etcd_ended)

    def delete_store(self) -> None:
        """Delete the data of etcd; neither etcd nor the daemon may run."""
        shutil.rmtree(self.daemon.state_dir / "etcd")

    async def lose_store(self) -> None:
        """Kill the daemon, delete the data of its etcd, and start a successor."""
        await self.kill()
        self.delete_store()
        await self.start()

    def save_state(self, backup: Path) -> None:
        """Copy the state directory to `backup`; neither etcd nor the daemon may run."""
        shutil.copytree(self.daemon.state_dir, backup, ignore=shutil.ignore_patterns("*.sock*"))

    async def restart_from(self, backup: Path) -> None:
        """Stop the daemon, replace its state directory by a copy of `backup`, and start a successor."""
        await asyncio.to_thread(self.daemon.stop)
        shutil.rmtree(self.daemon.state_dir)
        shutil.copytree(backup, self.daemon.state_dir)
        await self.start()


@pytest_asyncio.fixture
async def store_daemon(daemons: IsolatedDaemons) -> AsyncIterator[EmbeddedStoreDaemon]:
    """A running daemon with an embedded etcd; fails the test if the last daemon died or logged a traceback."""
    store_daemon = EmbeddedStoreDaemon(daemons)
    await store_daemon.start()
    yield store_daemon
    assert store_daemon.daemon.running
    assert "Traceback" not in store_daemon.daemon.log_text, store_daemon.daemon.log_text


def restorable_volume(volume: volume_pb2.Volume) -> volume_pb2.Volume:
    """The fields of a volume that are restored after a loss of the store."""
    restorable = volume_pb2.Volume()
    restorable.CopyFrom(volume)
    for field in ("update_time", "used_bytes", "etag", "revision"):
        restorable.ClearField(field)
    return restorable


def restorable_container(container: container_pb2.Container) -> container_pb2.Container:
    """The fields of a container that are restored after a loss of the store."""
    restorable = container_pb2.Container()
    restorable.CopyFrom(container)
    for field in ("update_time", "etag"):
        restorable.ClearField(field)
    if restorable.status.state == container_pb2.CONTAINER_STATE_FAILED:
        # The engine container is gone, and with it these fields.
        status = restorable.status
        for name in _ENGINE_STATUS_FIELDS:
            status.ClearField(name)  # type: ignore[arg-type]  # a name in a variable is no literal
    return restorable
