"""Registers the daemon's node: a key with the node record, held by a lease that the daemon renews.

Two daemons must never work for the same node, so the key is created on the condition that it does not exist. If it
exists, the daemon waits for as long as the lease of the other daemon can last without renewal, unless the process of
the other daemon is known to have exited.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

import structlog

from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.capacity import StoreCapacity
from gpudock_server.adapters.etcd.connection import CallFailed, EtcdConnection, store_errors
from gpudock_server.adapters.etcd.keys import DEFAULT_PREFIX, Keys
from gpudock_server.adapters.etcd.messages import KeyValue, TxnResponse
from gpudock_server.adapters.etcd.values import decode, encode
from gpudock_server.adapters.host.process_identity import ProcessIdentity
from gpudock_server.errors import StoreFull
from gpudock_server.model.node import NodeRecord
from gpudock_server.startup import StartupError

DEFAULT_TTL = timedelta(seconds=10)

_RETRY_FOR = timedelta(seconds=5)
_POLL_SECONDS = 0.2
# etcd checks for expired leases twice a second, and its clock may differ.
_EXPIRY_LAG_SECONDS = 1.5
# Renewals per time to live, so that two lost responses do not end the lease.
_RENEWALS_PER_TTL = 3

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class NodeTaken(StartupError):
    """Another daemon is registered for this node. `record` is its node record."""

    def __init__(self, node: str, record: NodeRecord) -> None:
        address = f"{record.address}, " if record.address else ""
        super().__init__(
            f"node {node!r} is in use by gpudockd on {record.host!r} ({address}pid {record.pid},"
            f" since {record.start_time:%Y-%m-%d %H:%M:%S %Z})",
            "stop it, or set another node name",
        )
        self.node = node
        self.record = record


class NodeLease:
    """Keeps the key `nodes/<node>` while this daemon runs, and for at most `ttl` after that.

    Renewals are retried while etcd does not answer; a lease that has expired is replaced. If another daemon has
    registered the node by then, `on_lost` is called once: this daemon must stop working for the node. A full store does
    not accept the key: `registered` is set once the key exists, and until then `capacity` lets no operation begin.
    """

    def __init__(
        self,
        connection: EtcdConnection,
        record: NodeRecord,
        *,
        on_lost: Callable[[NodeTaken], None],
        ttl: timedelta = DEFAULT_TTL,
        prefix: str = DEFAULT_PREFIX,
        capacity: StoreCapacity | None = None,
    ) -> None:
        self.registered = asyncio.Event()
        self._capacity = capacity or StoreCapacity()
        self._capacity.registered = False
        self._connection = connection
        self._record = record
        self._value = encode(record)
        self._key = Keys(prefix).node(record.node)
        self._on_lost = on_lost
        self._ttl_seconds = math.ceil(ttl.total_seconds())
        self._lease = 0
        self._version = 0
        self._heartbeat: asyncio.Task[None] | None = None

    async def register(self) -> None:
        """Register the node; if the store is full, keep trying in the background: see `registered`.

        Raises NodeTaken after waiting for the time to live of a lease, StoreUnavailable.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._ttl_seconds + _EXPIRY_LAG_SECONDS
        try:
            while holder := await self._take_with_retries():
                if loop.time() >= until:
                    raise NodeTaken(self._record.node, holder)
                await asyncio.sleep(_POLL_SECONDS)
        except StoreFull as error:
            log.warning("node registration waits for store space", detail=error.detail)
        self._heartbeat = asyncio.create_task(self._keep(), name=f"lease of node {self._record.node}")

    async def close(self) -> None:
        """Unregister the node immediately; if etcd does not answer, the lease expires later."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            with suppress(asyncio.CancelledError):
                await self._heartbeat
            self._heartbeat = None
        if self._lease:
            try:
                # Revoking the lease deletes the key, unless another daemon has replaced it.
                await self._connection.revoke(self._lease)
            except CallFailed as failure:
                log.info("node lease not revoked; it will expire", reason=str(failure))
            self._lease = 0

    async def _take_with_retries(self) -> NodeRecord | None:
        async with store_errors():
            return await self._connection.with_retries(lambda _: self._take(), _RETRY_FOR)

    async def _take(self) -> NodeRecord | None:
        """Register the node, if no running daemon has it; else return the record of that daemon. May be repeated."""
        entry = await self._read()
        while entry is None or self._may_replace(entry):
            answer = await self._put(entry.version if entry else 0)
            if answer.succeeded:
                self._version = answer.revision
                self._capacity.registered = True
                self.registered.set()
                return None
            entry = answer.ranges[0].only
        return decode(NodeRecord, entry.key, entry.value)

    async def _put(self, instead_of: int) -> TxnResponse:
        if not self._lease:
            self._lease = await self._connection.grant(self._ttl_seconds)
        condition, put = messages.version_is(self._key, instead_of), messages.put(self._key, self._value, self._lease)
        try:
            return await self._connection.txn([condition], [put], [messages.get(self._key)])
        except CallFailed as failure:
            if failure.code != "NOT_FOUND":
                raise
        # The lease expired while this daemon waited for the node.
        self._lease = 0
        return await self._put(instead_of)

    async def _read(self) -> KeyValue | None:
        return (await self._connection.txn(success=[messages.get(self._key)])).ranges[0].only

    def _may_replace(self, entry: KeyValue) -> bool:
        identity = _identity(decode(NodeRecord, entry.key, entry.value))
        # The record may be our own, from a try whose response was lost.
        return identity == _identity(self._record) or identity.is_gone()

    async def _keep(self) -> None:
        retrying = False
        while True:
            await asyncio.sleep(_POLL_SECONDS if retrying else self._ttl_seconds / _RENEWALS_PER_TTL)
            try:
                if not await self._renew():
                    return
            except CallFailed as failure:
                if not retrying:
                    log.warning("node lease renewal failed", reason=str(failure))
                # A full store answers, so it is not called more often.
                retrying = not failure.no_space
            else:
                retrying = False

    async def _renew(self) -> bool:
        """Renew the lease, or register the node again. False if another daemon has it. Raises CallFailed."""
        alive = self._lease and await self._connection.keep_alive(self._lease)
        if not alive:
            self._lease = 0
        entry = await self._read() if alive else None
        if entry is not None and entry.version == self._version:
            return True
        if self._version:
            log.warning("node record missing; registering again", node=self._record.node)
        holder = await self._take()
        if holder is None:
            return True
        taken = NodeTaken(self._record.node, holder)
        log.error("node registered by another daemon", node=self._record.node, holder=str(taken))
        self._on_lost(taken)
        return False


def _identity(record: NodeRecord) -> ProcessIdentity:
    return ProcessIdentity(record.boot_id, record.pid, record.start_ticks)
