"""What tests of reconcile do behind a daemon's back, and what they read of its findings."""

from __future__ import annotations

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
    """What the daemon finds."""
    request = node_service_pb2.ListDriftRequest(filter=node_service_pb2.DriftFilter(**filters))
    return list((await caller.nodes.ListDrift(request)).drift)


async def wait_for_drift(caller: Caller, kind: str, remedy: int | None = None, container: str = "") -> drift_pb2.Drift:
    """Wait until there is a finding of a kind; it."""
    findings: list[drift_pb2.Drift] = []

    async def there() -> bool:
        findings[:] = [
            one
            for one in await list_drift(caller, kinds=[KIND(f"DRIFT_KIND_{kind}")], container=container)
            if remedy in (None, one.remedy)
        ]
        return bool(findings)

    await until(there)
    return findings[0]


async def wait_for_drift_log(daemon: Daemon, kind: str, about: str) -> str:
    """Wait until a daemon has logged a finding of a kind about something; the line.

    What was put right is listed until the next comparison, which may be over before a test can ask.
    """
    lines: list[str] = []

    async def there() -> bool:
        found = (line for line in daemon.log_text.splitlines() if re.search(rf"\bdrift\b.* found={kind}\b", line))
        lines[:] = [line for line in found if re.search(rf"\b{re.escape(about)}\b", line)]
        return bool(lines)

    await until(there)
    return lines[0]


async def wait_for_passes(caller: Caller, times: int = 2) -> None:
    """Wait until full comparisons have ended that had not begun when this was called."""
    for _ in range(times):
        before = (await caller.nodes.ListDrift(node_service_pb2.ListDriftRequest())).compare_time

        async def later(before: Any = before) -> bool:
            return bool((await caller.nodes.ListDrift(node_service_pb2.ListDriftRequest())).compare_time != before)

        await until(later)


class StoredState:
    """What a daemon has in etcd, for whoever edits it by hand."""

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
        """What a key that exists has."""
        entry = (await self._connection.txn(success=[messages.get(key)])).ranges[0].only
        assert entry is not None
        return entry.value


@asynccontextmanager
async def state_of(daemons: IsolatedDaemons, rig: Rig) -> AsyncIterator[StoredState]:
    """What a test's own daemon has in the rig's etcd."""
    connection = EtcdConnection(EtcdAddress((rig.etcd.endpoint,)))
    await connection.open()
    try:
        yield StoredState(connection, daemons.prefix)
    finally:
        await connection.close()


def engine_action(rig: Rig, engine_id: str, verb: str) -> None:
    """Ask the engine itself."""
    rig.engine.call("POST", f"/containers/{engine_id}/{verb}")


def docker_update(rig: Rig, engine_id: str, **limits: Any) -> None:
    """`docker update`."""
    rig.engine.call("POST", f"/containers/{engine_id}/update", send=limits)


def docker_inspect(rig: Rig, engine_id: str) -> dict[str, Any]:
    """`docker inspect`."""
    shown: dict[str, Any] = rig.engine.call("GET", f"/containers/{engine_id}/json")
    return shown


def engine_container_names(rig: Rig) -> set[str]:
    """The names of every engine container."""
    listed: list[dict[str, Any]] = rig.engine.call("GET", "/containers/json?all=1")
    return {name.removeprefix("/") for one in listed for name in one["Names"]}
