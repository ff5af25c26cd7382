"""Changes of engine containers and records without the daemon, and the drift that the daemon finds."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from gpudock.v1 import drift_pb2, node_service_pb2
from gpudock_server.adapters.etcd import EtcdAddress, EtcdConnection, EtcdStore, messages
from gpudock_server.adapters.etcd.keys import Keys

from tests.calls import Caller
from tests.engine.isolated_daemons import IsolatedDaemons, until
from tests.rig import Daemon, Rig

KIND = drift_pb2.DriftKind.Value
REPAIRED = drift_pb2.DRIFT_REMEDY_REPAIRED
PENDING = drift_pb2.DRIFT_REMEDY_PENDING
RETRIED = drift_pb2.DRIFT_REMEDY_RETRIED
REPORTED = drift_pb2.DRIFT_REMEDY_REPORTED


async def list_drift(caller: Caller, **filters: Any) -> list[drift_pb2.Drift]:
    """The drift that the daemon lists."""
    request = node_service_pb2.ListDriftRequest(filter=node_service_pb2.DriftFilter(**filters))
    return list((await caller.nodes.ListDrift(request)).drift)


async def wait_for_drift(caller: Caller, kind: str, remedy: int | None = None, container: str = "") -> drift_pb2.Drift:
    """Wait until the daemon lists a drift of a kind, and return it."""
    found: list[drift_pb2.Drift] = []

    async def is_listed() -> bool:
        listed = await list_drift(caller, kinds=[KIND(f"DRIFT_KIND_{kind}")], container=container)
        found[:] = [drift for drift in listed if remedy in (None, drift.remedy)]
        return bool(found)

    await until(is_listed)
    return found[0]


def expect_drift(
    caller: Caller, kind: str, remedy: int | None = None, container: str = ""
) -> asyncio.Task[drift_pb2.Drift]:
    """Wait for a drift that the test is about to cause.

    A repaired drift is listed only until the next reconcile, so a test that waits for the repair first can miss it.
    """
    return asyncio.create_task(wait_for_drift(caller, kind, remedy, container))


async def wait_for_drift_log(daemon: Daemon, kind: str, about: str) -> str:
    """Wait until a daemon has logged a drift of a kind whose line has `about`, and return the line.

    A repaired drift is listed only until the next reconcile, which may end before a test can list it.
    """
    lines: list[str] = []

    async def is_logged() -> bool:
        of_kind = (line for line in daemon.log_text.splitlines() if re.search(rf"\bdrift\b.* found={kind}\b", line))
        lines[:] = [line for line in of_kind if re.search(rf"\b{re.escape(about)}\b", line)]
        return bool(lines)

    await until(is_logged)
    return lines[0]


async def wait_for_passes(caller: Caller, times: int = 2) -> None:
    """Wait until full reconciles that began after this call have ended."""
    for _ in range(times):
        before = (await caller.nodes.ListDrift(node_service_pb2.ListDriftRequest())).compare_time

        async def has_ended(before: Any = before) -> bool:
            return bool((await caller.nodes.ListDrift(node_service_pb2.ListDriftRequest())).compare_time != before)

        await until(has_ended)


class StoredState:
    """The records of a daemon in etcd, for tests that edit them."""

    def __init__(self, connection: EtcdConnection, prefix: str) -> None:
        self.keys = Keys(prefix)
        self.store = EtcdStore(connection, prefix=prefix)
        self._connection = connection

    async def put(self, key: bytes, value: bytes) -> None:
        """Write one key."""
        await self._connection.txn(success=[messages.put(key, value)])

    async def delete(self, *keys: bytes) -> None:
        """Delete keys."""
        await self._connection.txn(success=[messages.delete(key) for key in keys])

    async def read(self, key: bytes) -> bytes:
        """The value of a key that exists."""
        entry = (await self._connection.txn(success=[messages.get(key)])).ranges[0].only
        assert entry is not None
        return entry.value


@asynccontextmanager
async def state_of(daemons: IsolatedDaemons, rig: Rig) -> AsyncIterator[StoredState]:
    """The records of a test's daemons in the rig's etcd."""
    connection = EtcdConnection(EtcdAddress((rig.etcd.endpoint,)))
    await connection.open()
    try:
        yield StoredState(connection, daemons.prefix)
    finally:
        await connection.close()


def engine_action(rig: Rig, engine_id: str, verb: str) -> None:
    """Change a container by a call of the engine, such as `kill`."""
    rig.engine.call("POST", f"/containers/{engine_id}/{verb}")


def docker_update(rig: Rig, engine_id: str, **limits: Any) -> None:
    """Change limits, like `docker update`."""
    rig.engine.call("POST", f"/containers/{engine_id}/update", send=limits)


def docker_inspect(rig: Rig, engine_id: str) -> dict[str, Any]:
    """Inspect a container, like `docker inspect`."""
    state: dict[str, Any] = rig.engine.call("GET", f"/containers/{engine_id}/json")
    return state


def engine_container_names(rig: Rig) -> set[str]:
    """The names of all engine containers."""
    containers: list[dict[str, Any]] = rig.engine.call("GET", "/containers/json?all=1")
    return {name.removeprefix("/") for container in containers for name in container["Names"]}
