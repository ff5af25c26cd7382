"""A daemon's sign of life: the key of its node, held by a lease that it keeps alive.

Two daemons must never work for one node. The key is created on the condition that it does not exist; where it does,
the daemon it names is waited for as long as its lease can last without it, unless that process is gone for certain.
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
from gpudock_server.adapters.etcd.connection import CallFailed, EtcdConnection
from gpudock_server.adapters.etcd.keys import DEFAULT_PREFIX, Keys
from gpudock_server.adapters.etcd.messages import KeyValue, TxnResponse
from gpudock_server.adapters.etcd.values import decode, encode
from gpudock_server.adapters.host.process_identity import ProcessIdentity
from gpudock_server.errors import StoreFull
from gpudock_server.model.node import NodeRecord
from gpudock_server.startup import StartupError

DEFAULT_TTL = timedelta(seconds=10)

_PATIENCE = timedelta(seconds=5)
_POLL_SECONDS = 0.2
# etcd looks for expired leases twice a second, and its clock is not ours.
_EXPIRY_LAG_SECONDS = 1.5
# A lease is kept alive this often in its time, so that two lost answers do not end it.
_RENEWALS_PER_TTL = 3

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class NodeTaken(StartupError):
    """Another daemon works for this node. `record` is what it says of itself."""

    def __init__(self, node: str, record: NodeRecord) -> None:
        place = f"{record.address}, " if record.address else ""
        super().__init__(
            f"node {node!r} is taken by a gpudockd on {record.host!r} ({place}pid {record.pid},"
            f" since {record.start_time:%Y-%m-%d %H:%M:%S %Z})",
            "stop that one, or give this one another node name",
        )
        self.node = node
        self.record = record


class NodeLease:
    """Keeps `nodes/<node>` as long as this daemon lives, and for at most `ttl` after it.

    While etcd is out of reach it is tried again and again; a lease that ended meanwhile is replaced. `on_lost` is
    called once if by then another daemon has the node: this one must stop working for it. A store that is full does not
    take the key: `registered` is set once it is there, and until then `capacity` lets no operation begin.
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
        """Take the node, or, where the store is full, go on trying. See `registered`.

        Raises NodeTaken after waiting for one lease's time, StoreUnavailable.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._ttl_seconds + _EXPIRY_LAG_SECONDS
        try:
            while holder := await self._take_with_retries():
                if loop.time() >= until:
                    raise NodeTaken(self._record.node, holder)
                await asyncio.sleep(_POLL_SECONDS)
        except StoreFull as error:
            log.warning("the node is not registered until the store has room", detail=error.detail)
        self._heartbeat = asyncio.create_task(self._keep(), name=f"lease of node {self._record.node}")

    async def close(self) -> None:
        """Give the node back at once. An etcd that is out of reach does so when the lease ends."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            with suppress(asyncio.CancelledError):
                await self._heartbeat
            self._heartbeat = None
        if self._lease:
            try:
                # The key goes with the lease, and only if it is still ours.
                await self._connection.revoke(self._lease)
            except CallFailed as failure:
                log.info("the node's lease was not revoked; it ends by itself", reason=str(failure))
            self._lease = 0

    async def _take_with_retries(self) -> NodeRecord | None:
        try:
            return await self._connection.with_retries(lambda _: self._take(), _PATIENCE)
        except CallFailed as failure:
            raise failure.to_store_error() from None

    async def _take(self) -> NodeRecord | None:
        """Take the node if nobody has it, or nobody who lives; else who has it. May be repeated."""
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
        # The lease ended while the node was waited for.
        self._lease = 0
        return await self._put(instead_of)

    async def _read(self) -> KeyValue | None:
        return (await self._connection.txn(success=[messages.get(self._key)])).ranges[0].only

    def _may_replace(self, entry: KeyValue) -> bool:
        there = decode(NodeRecord, entry.key, entry.value)
        identity = _identity(there)
        # Our own may stand there from a try whose answer was lost.
        return identity == _identity(self._record) or identity.is_gone()

    async def _keep(self) -> None:
        silent = False
        while True:
            await asyncio.sleep(_POLL_SECONDS if silent else self._ttl_seconds / _RENEWALS_PER_TTL)
            try:
                if not await self._renew():
                    return
            except CallFailed as failure:
                if not silent:
                    log.warning("the node's lease could not be kept alive", reason=str(failure))
                # One that is full answers, and is not asked more often for that.
                silent = not failure.no_space
            else:
                silent = False

    async def _renew(self) -> bool:
        """Keep the lease alive, or take the node again. False when another daemon has it. Raises CallFailed."""
        alive = self._lease and await self._connection.keep_alive(self._lease)
        if not alive:
            self._lease = 0
        entry = await self._read() if alive else None
        if entry is not None and entry.version == self._version:
            return True
        if self._version:
            log.warning("the node's key was gone; taking the node again", node=self._record.node)
        holder = await self._take()
        if holder is None:
            return True
        taken = NodeTaken(self._record.node, holder)
        log.error("another daemon has taken this node", node=self._record.node, holder=str(taken))
        self._on_lost(taken)
        return False


def _identity(record: NodeRecord) -> ProcessIdentity:
    return ProcessIdentity(record.boot_id, record.pid, record.start_ticks)
