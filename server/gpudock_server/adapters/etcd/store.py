"""ports.Store on etcd."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar

import structlog

from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.capacity import StoreCapacity
from gpudock_server.adapters.etcd.conditions import holder_of
from gpudock_server.adapters.etcd.connection import CLUSTER_IS_FULL, EtcdConnection, store_errors
from gpudock_server.adapters.etcd.expiry import ExpiryBuckets
from gpudock_server.adapters.etcd.keys import DEFAULT_PREFIX, SCHEMA, KeyRange, Keys, WatchKeys
from gpudock_server.adapters.etcd.listing import ListPage, list_page
from gpudock_server.adapters.etcd.maintenance import StoreMaintenance
from gpudock_server.adapters.etcd.messages import MAX_TXN_OPERATIONS, KeyValue, RangeResponse, TxnResponse
from gpudock_server.adapters.etcd.operation_parts import READS_OF_ONE, OperationParts
from gpudock_server.adapters.etcd.record_watch import IdleNotifier, RecordWatch, V, View, resume_token_after
from gpudock_server.adapters.etcd.references import Reference, ReferenceSource
from gpudock_server.adapters.etcd.transactions import Transaction
from gpudock_server.adapters.etcd.trimmer import OperationTrimmer
from gpudock_server.adapters.etcd.values import R, decode, decode_number, decode_snapshot, encode_number
from gpudock_server.errors import RecordUnreadable, StoreUnavailable
from gpudock_server.model.claims import ClaimTable
from gpudock_server.model.container import Container, ContainerRevision
from gpudock_server.model.image import ImageOrigin
from gpudock_server.model.node import NodeRecord
from gpudock_server.model.operation import Operation, RequestRecord
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.snapshot import Snapshot, SnapshotSkipped
from gpudock_server.model.store_changes import Lock, StoreChange
from gpudock_server.model.volume import Volume, VolumeRevision
from gpudock_server.ports import (
    ContainerView,
    Page,
    RevisionView,
    StoreEvent,
    StoreUsage,
    UnreadableKey,
    Versioned,
    VolumeDetails,
    VolumeView,
)
from gpudock_server.startup import StartupError

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)
T = TypeVar("T")

DEFAULT_RETENTION = timedelta(hours=24)
DEFAULT_DEADLINE = timedelta(seconds=5)
DEFAULT_BUCKET = timedelta(hours=1)
DEFAULT_IDLE = timedelta(seconds=10)
# Decoded heads are cached, so that several watches of the same objects decode a change once; large heads are not.
_DECODED = 128
_LARGEST_DECODED = 32 * 1024


class EtcdStore:
    """Implements ports.Store; all keys are below `prefix`.

    Ended operations are kept for `retention`, and up to two `bucket` longer. A call that etcd does not answer is
    retried, and the outcome of a transaction found out, until `deadline` has passed; then StoreUnavailable is raised.
    A watch without changes sends an event every `idle`. `quota_bytes` is that of the embedded etcd, 0 for a cluster.

    The caller opens the connection before and closes it afterwards.
    """

    def __init__(
        self,
        connection: EtcdConnection,
        *,
        prefix: str = DEFAULT_PREFIX,
        retention: timedelta = DEFAULT_RETENTION,
        bucket: timedelta = DEFAULT_BUCKET,
        deadline: timedelta = DEFAULT_DEADLINE,
        idle: timedelta = DEFAULT_IDLE,
        quota_bytes: int = 0,
    ) -> None:
        self._connection = connection
        self._quota = quota_bytes
        self._capacity = StoreCapacity()
        self._keys = Keys(prefix)
        self._expiry = ExpiryBuckets(connection, retention, bucket)
        self._parts = OperationParts(self._keys)
        trimmer = OperationTrimmer(connection, self._parts)
        self._maintenance = StoreMaintenance(
            connection, self._capacity, trimmer, self._keys.maintenance_marker(), quota_bytes=quota_bytes
        )
        self._deadline = deadline
        self._idle = idle
        self._watched_containers = self._keys.watched(ResourceKind.CONTAINER, self._keys.containers())
        self._volume_references = ReferenceSource(self._keys.containers(), self._mounts_of)
        self._watched_volumes = self._keys.watched(
            ResourceKind.VOLUME, self._keys.volumes(), self._volume_references.heads
        )
        self._idle_notifiers: dict[bytes, IdleNotifier] = {}
        self._decoded_head = lru_cache(_DECODED)(_decode_head)

    @property
    def capacity(self) -> StoreCapacity:
        """Whether the store has space for writes."""
        return self._capacity

    async def start_maintenance(self) -> None:
        """Start StoreMaintenance, after one check of the store. Raises StoreUnavailable."""
        async with store_errors():
            await self._maintenance.start()

    async def close(self) -> None:
        """Stop the maintenance."""
        await self._maintenance.close()

    async def open(self) -> None:
        """Check that this daemon supports the schema of the state, and set the schema to this daemon's.

        Records of an older schema are upgraded when they are written; older daemons then refuse the state. Raises
        StoreUnavailable, and StartupError if a newer daemon or another program has written here.
        """
        key = self._keys.schema()
        # Read first: a full store rejects a put even if its condition would not hold.
        (entry,) = await self._get(key)
        while self._schema_of(key, entry) != SCHEMA:
            answer = await self._put_schema(key, entry.version if entry else 0)
            if answer.succeeded:
                return
            entry = answer.ranges[0].only

    async def _put_schema(self, key: bytes, version: int) -> TxnResponse:
        async with store_errors():
            # Safe to repeat: if the schema is set already, it is only read.
            return await self._connection.with_retries(
                lambda timeout: self._connection.txn(
                    [messages.version_is(key, version)],
                    [messages.put(key, encode_number(SCHEMA))],
                    [messages.get(key)],
                    timeout=timeout,
                ),
                self._deadline,
            )

    @staticmethod
    def _schema_of(key: bytes, entry: KeyValue | None) -> int:
        """The schema of the state, 0 if there is none. Raises StartupError if this daemon does not support it."""
        if entry is None:
            return 0
        try:
            schema = decode_number(key, entry.value)
        except RecordUnreadable as error:
            raise StartupError(
                f"{error.key}: {error.detail}", "the prefix is used by another program; set another etcd_prefix"
            ) from error
        if schema > SCHEMA:
            raise StartupError(
                f"the state in etcd has schema {schema}; this gpudockd supports up to {SCHEMA}",
                "install the gpudock version that wrote it or a newer one, or restore a backup from before the upgrade",
            )
        return schema

    async def apply(self, changes: Sequence[StoreChange]) -> int:
        """Apply all of `changes` or none: see `ports.Store.apply`.

        At most 128 changes, no two of them to the same key; deleting a head counts as three and an operation as up to
        four. Raises StoreConflict, StoreUnavailable, StoreFull, and InvalidArgument if they are larger than etcd's
        limit (1.5 MiB by default).
        """
        transaction = Transaction(
            self._connection,
            self._keys,
            self._expiry,
            changes,
            self._deadline,
            operations=self._parts,
            capacity=self._capacity,
        )
        version = await transaction.run()
        self._parts.stored(changes)
        self._capacity.mark_written()
        return version

    async def container(self, name: str) -> ContainerView | None:
        """A container's head and its lock, in one read."""
        head, lock = await self._get(self._keys.container(name), self._keys.lock(ResourceKind.CONTAINER, name))
        return _view(head, lock) if head else None

    async def containers(self, *, page_size: int, page_token: str) -> Page[ContainerView]:
        """Containers in the order of their names: see `ports.Store.containers`."""
        page = await self._list_page(
            self._keys.containers(), self._keys.locks(ResourceKind.CONTAINER), page_size, page_token
        )
        locks = {entry.key: entry for entry in page.companions}

        def read(head: KeyValue) -> ContainerView:
            name = decode(Container, head.key, head.value).name
            return _view(head, locks.get(self._keys.lock(ResourceKind.CONTAINER, name)))

        views, unreadable = _decode_all(page.entries, read)
        return Page(views, page.next_token, resume_token_after(self._watched_containers, page.revision), unreadable)

    async def revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[RevisionView]:
        """A container's history, oldest first: see `ports.Store.revisions`."""
        page = await self._list_page(
            self._keys.container_revisions(uid), self._keys.container_snapshots(uid), page_size, page_token
        )
        return Page(self._revision_views(uid, page.entries, page.companions), page.next_token)

    async def history(self, uid: str) -> tuple[RevisionView, ...]:
        """All revisions of a container at one etcd revision, oldest first."""
        ranges = await self._read(
            messages.get_range(self._keys.container_revisions(uid)),
            messages.get_range(self._keys.container_snapshots(uid)),
        )
        return self._revision_views(uid, *(found.entries for found in ranges))

    async def revision(self, uid: str, number: int) -> RevisionView | None:
        """One revision of a container with its snapshot."""
        found = await self._get(self._keys.container_revision(uid, number), self._keys.container_snapshot(uid, number))
        views = self._revision_views(uid, *([entry] if entry else [] for entry in found))
        return views[0] if views else None

    def _revision_views(
        self, uid: str, revisions: Sequence[KeyValue], snapshots: Sequence[KeyValue]
    ) -> tuple[RevisionView, ...]:
        readable, _ = _decode_all(snapshots, lambda entry: (entry.key, decode_snapshot(entry.key, entry.value)))
        snapshots_by_key = dict(readable)
        records, _ = _decode_all(revisions, lambda entry: decode(ContainerRevision, entry.key, entry.value))
        return tuple(
            _revision_view(record, snapshots_by_key.get(self._keys.container_snapshot(uid, record.revision)))
            for record in records
        )

    def watch_containers(self, *, token: str, listing: bool) -> AsyncGenerator[StoreEvent[ContainerView], None]:
        """Changes of containers and their locks: see `ports.Store.watch_containers`."""

        def view(head: KeyValue, lock: KeyValue | None, _: tuple[str, ...]) -> ContainerView:
            return ContainerView(self._decoded(head), head.version, _operation_id(lock))

        return self._watch(self._watched_containers, view, token, listing=listing)

    def _decoded(self, head: KeyValue) -> Container:
        decode_head = self._decoded_head if len(head.value) <= _LARGEST_DECODED else _decode_head
        return decode_head(head.key, head.value)

    def watch_volumes(self, *, token: str, listing: bool) -> AsyncGenerator[StoreEvent[VolumeDetails], None]:
        """Changes of volumes, their locks and the containers that mount them: see `ports.Store.watch_volumes`."""

        def view(head: KeyValue, lock: KeyValue | None, containers: tuple[str, ...]) -> VolumeDetails:
            return VolumeDetails(_volume_view(head, lock), containers)

        return self._watch(self._watched_volumes, view, token, listing=listing, referring=self._volume_references)

    def _mounts_of(self, head: KeyValue) -> Reference:
        """The volumes that a container mounts; none for an unreadable container."""
        try:
            container = self._decoded(head)
        except RecordUnreadable as error:
            log.warning("unreadable record skipped", key=error.key, detail=error.detail)
            return Reference("")
        volumes = self._keys.volumes()
        mounted = (volumes.rest(self._keys.volume(mount.volume)) for mount in container.spec.mounts if mount.volume)
        return Reference(container.name, frozenset(mounted))

    async def _watch(
        self, keys: WatchKeys, view: View[V], token: str, *, listing: bool, referring: ReferenceSource | None = None
    ) -> AsyncGenerator[StoreEvent[V], None]:
        """A watch of one kind of object; `view` makes what an event shows from head, lock and referrers."""
        idle_notifier = self._idle_notifiers.setdefault(keys.idle, IdleNotifier(self._connection, keys.idle))
        watch = RecordWatch(
            self._connection, keys, idle_notifier, view, referring=referring, retry_for=self._deadline, idle=self._idle
        )
        # Closed here and not by the garbage collector: a caller may stop reading at any yield.
        async with store_errors(), aclosing(watch.run(token, listing=listing)) as events:
            async for event in events:
                yield event

    async def volume(self, name: str) -> VolumeView | None:
        """A volume's head and its lock, in one read."""
        head, lock = await self._get(self._keys.volume(name), self._keys.lock(ResourceKind.VOLUME, name))
        return _volume_view(head, lock) if head else None

    async def volumes(self, *, page_size: int, page_token: str) -> Page[VolumeView]:
        """Volumes in the order of their names: see `ports.Store.volumes`."""
        page = await self._list_page(self._keys.volumes(), self._keys.locks(ResourceKind.VOLUME), page_size, page_token)
        locks = {entry.key: entry for entry in page.companions}

        def read(head: KeyValue) -> VolumeView:
            name = decode(Volume, head.key, head.value).name
            return _volume_view(head, locks.get(self._keys.lock(ResourceKind.VOLUME, name)))

        views, unreadable = _decode_all(page.entries, read)
        return Page(views, page.next_token, resume_token_after(self._watched_volumes, page.revision), unreadable)

    async def volume_revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[VolumeRevision]:
        """A volume's history, oldest first: see `ports.Store.volume_revisions`."""
        page = await self._list_page(self._keys.volume_revisions(uid), None, page_size, page_token)
        revisions = tuple(decode(VolumeRevision, entry.key, entry.value) for entry in page.entries)
        return Page(revisions, page.next_token)

    async def claims(self, host: str) -> ClaimTable:
        """All claims of a host, at one etcd revision."""
        found = await self._list(self._keys.claims(host))
        return ClaimTable({self._keys.claim_of(host, entry.key): holder_of(entry) for entry in found})

    async def operation(self, operation_id: str) -> Versioned[Operation] | None:
        """An operation; None if it never existed or has expired."""
        return self._parts.joined(await self._read(*self._parts.reads(operation_id)))

    async def operations(self, *, page_size: int, page_token: str) -> Page[Operation]:
        """Operations in the order of their ids: see `ports.Store.operations`."""
        page = await self._list_page(self._keys.operations(), None, page_size, page_token)
        operations, unreadable = _decode_all(page.entries, lambda entry: decode(Operation, entry.key, entry.value))
        return Page(operations, page.next_token, unreadable=unreadable)

    async def unfinished(self, node: str) -> tuple[Versioned[Operation], ...]:
        """Operations of `node` that have not ended, found by the locks they hold."""
        # An operation on several objects holds a lock on each.
        holders = dict.fromkeys(lock.operation_id for lock in await self.list_locks())
        ids = list(holders)
        found: list[Sequence[RangeResponse]] = []
        for first in range(0, len(ids), MAX_TXN_OPERATIONS // READS_OF_ONE):
            batch = ids[first : first + MAX_TXN_OPERATIONS // READS_OF_ONE]
            answers = await self._read(*(read for operation_id in batch for read in self._parts.reads(operation_id)))
            found += [answers[at : at + READS_OF_ONE] for at in range(0, len(answers), READS_OF_ONE)]
        # An operation may have ended since its lock was read.
        return tuple(
            operation
            for operation in _operations(self._parts, found)
            if operation.value.node == node and not operation.value.state.ended
        )

    async def list_locks(self) -> tuple[Lock, ...]:
        """All locks on objects of the kinds that this version knows; each can be passed to `Unlock`."""
        found = await self._list(self._keys.all_locks())
        return tuple(
            Lock(*locked, entry.value.decode(errors="surrogateescape"))
            for entry in found
            if (locked := self._keys.lock_of(entry.key))
        )

    async def request(self, request_id: str) -> RequestRecord | None:
        """The record of a request id; None if there is none or it has expired."""
        stored = _versioned(RequestRecord, *await self._get(self._keys.request(request_id)))
        return stored.value if stored else None

    async def image_origin(self, node: str, image_id: str) -> ImageOrigin | None:
        """The origin of an image of a node's engine; None if gpudock does not know it."""
        (entry,) = await self._get(self._keys.image_origin(node, image_id))
        return decode(ImageOrigin, entry.key, entry.value) if entry else None

    async def image_origins(self, node: str) -> tuple[ImageOrigin, ...]:
        """The known origins of a node's images."""
        entries = await self._list(self._keys.image_origins(node))
        found, _ = _decode_all(entries, lambda entry: decode(ImageOrigin, entry.key, entry.value))
        return found

    async def nodes(self) -> tuple[NodeRecord, ...]:
        """The records of all running daemons, and of those that exited less than the time of a lease ago."""
        return tuple(decode(NodeRecord, entry.key, entry.value) for entry in await self._list(self._keys.nodes()))

    async def ping(self) -> str:
        """The version of etcd. Raises StoreUnavailable, also if etcd answers but has no leader."""
        async with store_errors():
            status = await self._connection.status()
        if status.problem:
            raise StoreUnavailable(status.problem)
        return status.version

    async def usage(self) -> StoreUsage:
        """The size of the answering member's database. Raises StoreUnavailable."""
        async with store_errors():
            status = await self._connection.status()
        full = self._capacity.full or self._capacity.reserved
        return StoreUsage(
            size_bytes=status.size_bytes,
            in_use_bytes=status.in_use_bytes,
            quota_bytes=self._quota,
            full=full or (CLUSTER_IS_FULL if status.no_space and not self._quota else ""),
        )

    async def _list_page(self, keys: KeyRange, companions: KeyRange | None, size: int, token: str) -> ListPage:
        async with store_errors():
            return await list_page(self._connection, keys, companions, size=size, token=token, retry_for=self._deadline)

    async def _get(self, *keys: bytes) -> list[KeyValue | None]:
        """Single keys, at one etcd revision."""
        return [found.only for found in await self._read(*(messages.get(key) for key in keys))]

    async def _read(self, *reads: messages.TxnOperation) -> tuple[RangeResponse, ...]:
        """Several reads, at one etcd revision."""
        async with store_errors():
            return (await self._connection.read(*reads, retry_for=self._deadline)).ranges

    async def _list(self, keys: KeyRange) -> tuple[KeyValue, ...]:
        (found,) = await self._read(messages.get_range(keys))
        return found.entries


def _decode_head(key: bytes, value: bytes) -> Container:
    return decode(Container, key, value)


def _view(head: KeyValue, lock: KeyValue | None) -> ContainerView:
    return ContainerView(decode(Container, head.key, head.value), head.version, _operation_id(lock))


def _operation_id(lock: KeyValue | None) -> str:
    return lock.value.decode(errors="replace") if lock else ""


def _decode_all(
    entries: Iterable[KeyValue], read: Callable[[KeyValue], T]
) -> tuple[tuple[T, ...], tuple[UnreadableKey, ...]]:
    """The readable records of `entries` and the unreadable keys: one damaged value must not hide all others."""
    items: list[T] = []
    unreadable: list[UnreadableKey] = []
    for entry in entries:
        try:
            items.append(read(entry))
        except RecordUnreadable as error:
            log.warning("unreadable record skipped", key=error.key, detail=error.detail)
            unreadable.append(UnreadableKey(key=error.key, name=Keys.last_segment(entry.key), detail=error.detail))
    return tuple(items), tuple(unreadable)


def _operations(parts: OperationParts, found: Iterable[Sequence[RangeResponse]]) -> Iterator[Versioned[Operation]]:
    """The existing and readable operations in the responses to `OperationParts.reads`."""
    for answers in found:
        try:
            operation = parts.joined(answers)
        except RecordUnreadable as error:
            log.warning("unreadable record skipped", key=error.key, detail=error.detail)
        else:
            if operation is not None:
                yield operation


def _volume_view(head: KeyValue, lock: KeyValue | None) -> VolumeView:
    return VolumeView(decode(Volume, head.key, head.value), head.version, _operation_id(lock))


def _versioned(kind: type[R], entry: KeyValue | None) -> Versioned[R] | None:
    return Versioned(decode(kind, entry.key, entry.value), entry.version) if entry else None


def _revision_view(revision: ContainerRevision, snapshot: Snapshot | SnapshotSkipped | None) -> RevisionView:
    if isinstance(snapshot, SnapshotSkipped):
        return RevisionView(revision, None, snapshot.reason)
    return RevisionView(revision, snapshot)
