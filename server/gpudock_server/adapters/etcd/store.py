"""The store that core speaks to, on etcd."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from functools import lru_cache
from typing import TypeVar

import structlog

from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.capacity import StoreCapacity
from gpudock_server.adapters.etcd.conditions import holder_of
from gpudock_server.adapters.etcd.connection import CLUSTER_IS_FULL, CallFailed, EtcdConnection
from gpudock_server.adapters.etcd.expiry import ExpiryBuckets
from gpudock_server.adapters.etcd.keys import DEFAULT_PREFIX, SCHEMA, KeyRange, Keys, WatchKeys
from gpudock_server.adapters.etcd.listing import list_page
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
# How many heads are kept decoded: watches of the same objects decode each change once between them. Large ones are not.
_DECODED = 128
_LARGEST_DECODED = 32 * 1024


class EtcdStore:
    """gpudock's state below `prefix` in etcd: `ports.Store`.

    What has ended is kept for `retention`, and up to two `bucket` longer. A call that etcd does not answer is tried
    again, and a transaction's outcome found out, until `deadline` has passed; then StoreUnavailable is raised. A watch
    in which nothing happens says so, and moves on, every `idle`.

    The connection is the caller's: it is opened before and closed after.
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
        """Whether it has room."""
        return self._capacity

    async def start_maintenance(self) -> None:
        """Make room in an etcd of our own if it has none, and see to it from now on until `close`.

        Raises StoreUnavailable.
        """
        async with _mapped_errors():
            await self._maintenance.start()

    async def close(self) -> None:
        """No longer see to the room."""
        await self._maintenance.close()

    async def open(self) -> None:
        """Check that the state is in a schema that this daemon knows, or begin it.

        State of an older schema is read as it is and written anew as it changes; from now on it is in ours, and a
        daemon that does not know that is refused. Raises StoreUnavailable, and StartupError where a newer daemon, or
        something else, has written here.
        """
        key = self._keys.schema()
        # A store that is full lets nothing be put, not even what would turn out to be there.
        (entry,) = await self._get(key)
        while self._schema_of(key, entry) != SCHEMA:
            answer = await self._put_schema(key, entry.version if entry else 0)
            if answer.succeeded:
                return
            entry = answer.ranges[0].only

    async def _put_schema(self, key: bytes, version: int) -> TxnResponse:
        async with _mapped_errors():
            # May be repeated: what is there is only read.
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
        """What the state is written in, at most ours; 0 where there is none. Raises StartupError."""
        if entry is None:
            return 0
        try:
            schema = decode_number(key, entry.value)
        except RecordUnreadable as error:
            raise StartupError(
                f"{error.key}: {error.detail}", "this prefix is something else's; choose another"
            ) from error
        if schema > SCHEMA:
            raise StartupError(
                f"the state in etcd is written in schema {schema}, and this gpudockd knows {SCHEMA}",
                "install the gpudock that wrote it, or a newer one; or restore a backup from before it was upgraded",
            )
        return schema

    async def apply(self, changes: Sequence[StoreChange]) -> int:
        """Do all of `changes` or none: see `ports.Store.apply`.

        At most 128 changes, each deletion of a head counting for three and an operation for up to four, no two of them
        to one key. Raises StoreConflict, StoreUnavailable, StoreFull, and InvalidArgument where they are larger than
        etcd takes (1.5 MiB by default).
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
        """A head and its lock, in one read."""
        head, lock = await self._get(self._keys.container(name), self._keys.lock(ResourceKind.CONTAINER, name))
        return _view(head, lock) if head else None

    async def containers(self, *, page_size: int, page_token: str) -> Page[ContainerView]:
        """Heads in the order of their names: see `ports.Store.containers`."""
        async with _mapped_errors():
            page = await list_page(
                self._connection,
                self._keys.containers(),
                self._keys.locks(ResourceKind.CONTAINER),
                size=page_size,
                token=page_token,
                retry_for=self._deadline,
            )
        locks = {entry.key: entry for entry in page.companions}

        def read(head: KeyValue) -> ContainerView:
            # The name comes from the record, so that no key has to be taken apart.
            name = decode(Container, head.key, head.value).name
            return _view(head, locks.get(self._keys.lock(ResourceKind.CONTAINER, name)))

        views, unreadable = _decode_all(page.entries, read)
        return Page(views, page.next_token, resume_token_after(self._watched_containers, page.revision), unreadable)

    async def revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[RevisionView]:
        """A container's history, oldest first: see `ports.Store.revisions`."""
        async with _mapped_errors():
            page = await list_page(
                self._connection,
                self._keys.container_revisions(uid),
                self._keys.container_snapshots(uid),
                size=page_size,
                token=page_token,
                retry_for=self._deadline,
            )
        return Page(self._revision_views(uid, page.entries, page.companions), page.next_token)

    async def history(self, uid: str) -> tuple[RevisionView, ...]:
        """All of a container's history at one moment, oldest first."""
        async with _mapped_errors():
            answer = await self._connection.read(
                messages.get_range(self._keys.container_revisions(uid)),
                messages.get_range(self._keys.container_snapshots(uid)),
                retry_for=self._deadline,
            )
        return self._revision_views(uid, *(found.entries for found in answer.ranges))

    async def revision(self, uid: str, number: int) -> RevisionView | None:
        """One revision with its snapshot."""
        found = await self._get(self._keys.container_revision(uid, number), self._keys.container_snapshot(uid, number))
        views = self._revision_views(uid, *([entry] if entry else [] for entry in found))
        return views[0] if views else None

    def _revision_views(
        self, uid: str, revisions: Sequence[KeyValue], snapshots: Sequence[KeyValue]
    ) -> tuple[RevisionView, ...]:
        readable, _ = _decode_all(snapshots, lambda entry: (entry.key, decode_snapshot(entry.key, entry.value)))
        kept = dict(readable)
        found, _ = _decode_all(revisions, lambda entry: decode(ContainerRevision, entry.key, entry.value))
        # The number comes from the record, so that no key has to be taken apart.
        return tuple(_revision_view(one, kept.get(self._keys.container_snapshot(uid, one.revision))) for one in found)

    def watch_containers(self, *, token: str, listing: bool) -> AsyncGenerator[StoreEvent[ContainerView], None]:
        """Heads and their locks as they change: see `ports.Store.watch_containers`."""

        def view(head: KeyValue, lock: KeyValue | None, _: tuple[str, ...]) -> ContainerView:
            return ContainerView(self._decoded(head), head.version, _operation_id(lock))

        return self._watch(self._watched_containers, view, token, listing=listing)

    def _decoded(self, head: KeyValue) -> Container:
        decode_head = self._decoded_head if len(head.value) <= _LARGEST_DECODED else _decode_head
        return decode_head(head.key, head.value)

    def watch_volumes(self, *, token: str, listing: bool) -> AsyncGenerator[StoreEvent[VolumeDetails], None]:
        """Heads, their locks and who mounts them, as they change: see `ports.Store.watch_volumes`."""

        def view(head: KeyValue, lock: KeyValue | None, containers: tuple[str, ...]) -> VolumeDetails:
            return VolumeDetails(_volume_view(head, lock), containers)

        return self._watch(self._watched_volumes, view, token, listing=listing, referring=self._volume_references)

    def _mounts_of(self, head: KeyValue) -> Reference:
        """The volumes that a container mounts; of one that cannot be read, none."""
        try:
            container = self._decoded(head)
        except RecordUnreadable as error:
            log.warning("left out what cannot be read", key=error.key, detail=error.detail)
            return Reference("")
        volumes = self._keys.volumes()
        mounted = (volumes.rest(self._keys.volume(mount.volume)) for mount in container.spec.mounts if mount.volume)
        return Reference(container.name, frozenset(mounted))

    async def _watch(
        self, keys: WatchKeys, view: View[V], token: str, *, listing: bool, referring: ReferenceSource | None = None
    ) -> AsyncGenerator[StoreEvent[V], None]:
        """A watch of any kind of object; `view` shows one that has this head, this lock and these referrers."""
        idle_notifier = self._idle_notifiers.setdefault(keys.idle, IdleNotifier(self._connection, keys.idle))
        watch = RecordWatch(
            self._connection, keys, idle_notifier, view, referring=referring, retry_for=self._deadline, idle=self._idle
        )
        # Closed here and not by the garbage collector: a caller may leave at any yield.
        async with _mapped_errors(), aclosing(watch.run(token, listing=listing)) as seen:
            async for each in seen:
                yield each

    async def volume(self, name: str) -> VolumeView | None:
        """A volume's head and its lock, in one read."""
        head, lock = await self._get(self._keys.volume(name), self._keys.lock(ResourceKind.VOLUME, name))
        return _volume_view(head, lock) if head else None

    async def volumes(self, *, page_size: int, page_token: str) -> Page[VolumeView]:
        """Volumes' heads in the order of their names: see `ports.Store.volumes`."""
        async with _mapped_errors():
            page = await list_page(
                self._connection,
                self._keys.volumes(),
                self._keys.locks(ResourceKind.VOLUME),
                size=page_size,
                token=page_token,
                retry_for=self._deadline,
            )
        locks = {entry.key: entry for entry in page.companions}

        def read(head: KeyValue) -> VolumeView:
            # The name comes from the record, so that no key has to be taken apart.
            name = decode(Volume, head.key, head.value).name
            return _volume_view(head, locks.get(self._keys.lock(ResourceKind.VOLUME, name)))

        views, unreadable = _decode_all(page.entries, read)
        return Page(views, page.next_token, resume_token_after(self._watched_volumes, page.revision), unreadable)

    async def volume_revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[VolumeRevision]:
        """A volume's history, oldest first: see `ports.Store.volume_revisions`."""
        async with _mapped_errors():
            page = await list_page(
                self._connection,
                self._keys.volume_revisions(uid),
                None,
                size=page_size,
                token=page_token,
                retry_for=self._deadline,
            )
        return Page(tuple(decode(VolumeRevision, one.key, one.value) for one in page.entries), page.next_token)

    async def claims(self, host: str) -> ClaimTable:
        """All claims of a host, at one moment."""
        found = await self._list(self._keys.claims(host))
        return ClaimTable({self._keys.claim_of(host, entry.key): holder_of(entry) for entry in found})

    async def operation(self, operation_id: str) -> Versioned[Operation] | None:
        """An operation that has not expired."""
        return self._parts.joined(await self._read(*self._parts.reads(operation_id)))

    async def operations(self, *, page_size: int, page_token: str) -> Page[Operation]:
        """Operations in the order of their ids: see `ports.Store.operations`."""
        async with _mapped_errors():
            page = await list_page(
                self._connection,
                self._keys.operations(),
                None,
                size=page_size,
                token=page_token,
                retry_for=self._deadline,
            )
        operations, unreadable = _decode_all(page.entries, lambda entry: decode(Operation, entry.key, entry.value))
        return Page(operations, page.next_token, unreadable=unreadable)

    async def unfinished(self, node: str) -> tuple[Versioned[Operation], ...]:
        """Operations of `node` that have not ended, found by the locks they hold."""
        # One that works on several objects holds a lock on each.
        holders = dict.fromkeys(lock.operation_id for lock in await self.list_locks())
        ids = list(holders)
        found: list[Sequence[RangeResponse]] = []
        for first in range(0, len(ids), MAX_TXN_OPERATIONS // READS_OF_ONE):
            some = ids[first : first + MAX_TXN_OPERATIONS // READS_OF_ONE]
            answers = await self._read(*(read for one in some for read in self._parts.reads(one)))
            found += [answers[at : at + READS_OF_ONE] for at in range(0, len(answers), READS_OF_ONE)]
        operations = _operations(self._parts, found)
        # One that ended since its lock was read has nothing left to do.
        return tuple(one for one in operations if one.value.node == node and not one.value.state.ended)

    async def list_locks(self) -> tuple[Lock, ...]:
        """Every lock there is, on objects of the kinds that this version knows; each can be given to `Unlock`."""
        found = await self._list(self._keys.all_locks())
        return tuple(
            Lock(*locked, entry.value.decode(errors="surrogateescape"))
            for entry in found
            if (locked := self._keys.lock_of(entry.key))
        )

    async def request(self, request_id: str) -> RequestRecord | None:
        """What a request id stood for."""
        stored = _versioned(RequestRecord, *await self._get(self._keys.request(request_id)))
        return stored.value if stored else None

    async def image_origin(self, node: str, image_id: str) -> ImageOrigin | None:
        """Where an image of a node's engine came from; None where gpudock does not know."""
        (entry,) = await self._get(self._keys.image_origin(node, image_id))
        return decode(ImageOrigin, entry.key, entry.value) if entry else None

    async def image_origins(self, node: str) -> tuple[ImageOrigin, ...]:
        """The origins of a node's images, as far as gpudock knows them."""
        entries = await self._list(self._keys.image_origins(node))
        found, _ = _decode_all(entries, lambda entry: decode(ImageOrigin, entry.key, entry.value))
        return found

    async def nodes(self) -> tuple[NodeRecord, ...]:
        """Every daemon that is alive, and those that died within the time of their lease."""
        return tuple(decode(NodeRecord, entry.key, entry.value) for entry in await self._list(self._keys.nodes()))

    async def ping(self) -> str:
        """The version of etcd. Raises StoreUnavailable, also where it answers but has no leader."""
        async with _mapped_errors():
            status = await self._connection.status()
        if status.problem:
            raise StoreUnavailable(status.problem)
        return status.version

    async def usage(self) -> StoreUsage:
        """How full the database of the member that answers is. Raises StoreUnavailable."""
        async with _mapped_errors():
            status = await self._connection.status()
        full = self._capacity.full or self._capacity.reserved
        return StoreUsage(
            size_bytes=status.size_bytes,
            in_use_bytes=status.in_use_bytes,
            quota_bytes=self._quota,
            full=full or (CLUSTER_IS_FULL if status.no_space and not self._quota else ""),
        )

    async def _get(self, *keys: bytes) -> list[KeyValue | None]:
        """Single keys, at one moment."""
        return [found.only for found in await self._read(*(messages.get(key) for key in keys))]

    async def _read(self, *reads: messages.TxnOperation) -> tuple[RangeResponse, ...]:
        """Several reads, at one moment."""
        async with _mapped_errors():
            return (await self._connection.read(*reads, retry_for=self._deadline)).ranges

    async def _list(self, keys: KeyRange) -> tuple[KeyValue, ...]:
        async with _mapped_errors():
            answer = await self._connection.read(messages.get_range(keys), retry_for=self._deadline)
        return answer.ranges[0].entries


@asynccontextmanager
async def _mapped_errors() -> AsyncIterator[None]:
    try:
        yield
    except CallFailed as failure:
        raise failure.to_store_error() from None


def _decode_head(key: bytes, value: bytes) -> Container:
    return decode(Container, key, value)


def _view(head: KeyValue, lock: KeyValue | None) -> ContainerView:
    return ContainerView(decode(Container, head.key, head.value), head.version, _operation_id(lock))


def _operation_id(lock: KeyValue | None) -> str:
    return lock.value.decode(errors="replace") if lock else ""


def _decode_all(
    entries: Iterable[KeyValue], read: Callable[[KeyValue], T]
) -> tuple[tuple[T, ...], tuple[UnreadableKey, ...]]:
    """What can be read of `entries`, and what cannot: one damaged value must not hide all the others."""
    items: list[T] = []
    unreadable: list[UnreadableKey] = []
    for entry in entries:
        try:
            items.append(read(entry))
        except RecordUnreadable as error:
            log.warning("left out what cannot be read", key=error.key, detail=error.detail)
            unreadable.append(UnreadableKey(key=error.key, name=Keys.last_segment(entry.key), detail=error.detail))
    return tuple(items), tuple(unreadable)


def _operations(parts: OperationParts, found: Iterable[Sequence[RangeResponse]]) -> Iterator[Versioned[Operation]]:
    """What can be read of operations that exist."""
    for answers in found:
        try:
            operation = parts.joined(answers)
        except RecordUnreadable as error:
            log.warning("left out what cannot be read", key=error.key, detail=error.detail)
        else:
            if operation is not None:
                yield operation


def _volume_view(head: KeyValue, lock: KeyValue | None) -> VolumeView:
    return VolumeView(decode(Volume, head.key, head.value), head.version, _operation_id(lock))


def _versioned(kind: type[R], entry: KeyValue | None) -> Versioned[R] | None:
    return Versioned(decode(kind, entry.key, entry.value), entry.version) if entry else None


def _revision_view(revision: ContainerRevision, kept: Snapshot | SnapshotSkipped | None) -> RevisionView:
    if isinstance(kept, SnapshotSkipped):
        return RevisionView(revision, None, kept.reason)
    return RevisionView(revision, kept)
