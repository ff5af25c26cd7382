"""A store in memory that passes the contract tests of `ports.Store`.

It has no expiry, unreadable records, size limits, idle events of watches, or heartbeats of daemons.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gpudock_server.errors import FieldViolation, InvalidArgument, ResumeTokenExpired
from gpudock_server.model import store_changes as change
from gpudock_server.model.claims import ClaimKey, ClaimTable, Holder
from gpudock_server.model.container import Container, ContainerRevision
from gpudock_server.model.image import ImageOrigin
from gpudock_server.model.node import NodeRecord
from gpudock_server.model.operation import Operation, RequestRecord
from gpudock_server.model.record import JsonObject
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.snapshot import Snapshot, SnapshotSkipped
from gpudock_server.model.volume import Volume, VolumeRevision
from gpudock_server.ports import (
    ContainerView,
    Page,
    RevisionView,
    Store,
    StoreConflict,
    StoreEvent,
    StoreUsage,
    Versioned,
    VolumeDetails,
    VolumeView,
)
from typing_extensions import override

T = TypeVar("T")


@dataclass(frozen=True)
class _Listing:
    """The items of a listing when its first page was read, and the number of changes at that time."""

    name: str
    items: Sequence[object]
    change_count: int = 0


@dataclass
class _History(Generic[T]):
    """Every change of one kind of object, for watches. The first `forgotten` changes can no longer be read."""

    kind: str
    current: Callable[[], dict[str, T]]
    changes: list[tuple[T | None, T | None]] = field(default_factory=list)
    forgotten: int = 0

    def record(self, before: Mapping[str, T]) -> None:
        """Add the changes since `before`, in the order of the names of objects."""
        after = self.current()
        self.changes += [
            (before.get(name), after.get(name))
            for name in sorted(before.keys() | after.keys())
            if before.get(name) != after.get(name)
        ]

    def token(self, place: int) -> str:
        """Return the token for what follows the first `place` changes."""
        return f"{self.kind} changes {place} 0"


class MemoryStore(Store):
    """A store whose transactions are plain Python. All pages show the state at the time of the first."""

    def __init__(self) -> None:
        self.version = 0
        self.container_records: dict[str, Versioned[Container]] = {}
        self.locks: dict[tuple[ResourceKind, str], str] = {}
        self.volume_records: dict[str, Versioned[Volume]] = {}
        self.volume_revision_records: dict[tuple[str, int], VolumeRevision] = {}
        # By host.
        self.holders: defaultdict[str, dict[ClaimKey, Holder]] = defaultdict(dict)
        self.journal: dict[str, Versioned[Operation]] = {}
        # The arguments of all operations, also of ended ones; only tests read them.
        self.arguments: dict[str, JsonObject] = {}
        self.request_records: dict[str, RequestRecord] = {}
        self.revision_views: dict[tuple[str, int], RevisionView] = {}
        self.origins: dict[tuple[str, str], ImageOrigin] = {}
        self.reads = 0
        # Why the store is full; empty: it is not.
        self.full = ""
        # Snapshots, also of missing revisions.
        self._snapshots: dict[tuple[str, int], Snapshot | SnapshotSkipped] = {}
        # The version of the last write of each key.
        self._versions: dict[Hashable, int] = {}
        # None: expired.
        self._listings: list[_Listing | None] = []
        self._container_history = _History("containers", self._views)
        self._volume_history = _History("volumes", self._volume_details)
        self._changed = asyncio.Event()

    @override
    async def apply(self, changes: Sequence[change.StoreChange]) -> int:
        if not changes:
            raise ValueError("a transaction needs at least one change")
        keys = [_key(item) for item in changes]
        if len(set(keys)) < len(keys):
            raise ValueError(f"two changes use the same key: {changes}")
        for item in changes:
            self._check(item)
        before, volumes_before = self._views(), self._volume_details()
        self.version += 1
        for item in changes:
            self._write(item)
        self._versions |= dict.fromkeys(keys, self.version)
        self._record(before, volumes_before)
        return self.version

    async def forget(self) -> None:
        """Let all tokens expire, as a compaction does."""
        self._listings = [None] * len(self._listings)
        self._container_history.forgotten = len(self._container_history.changes)
        self._volume_history.forgotten = len(self._volume_history.changes)

    def _views(self) -> dict[str, ContainerView]:
        return {
            name: ContainerView(stored.value, stored.version, self.locks.get((ResourceKind.CONTAINER, name), ""))
            for name, stored in sorted(self.container_records.items())
        }

    def _record(self, before: Mapping[str, ContainerView], volumes_before: Mapping[str, VolumeDetails]) -> None:
        self._container_history.record(before)
        self._volume_history.record(volumes_before)
        self._changed.set()
        self._changed = asyncio.Event()

    def _volume_details(self) -> dict[str, VolumeDetails]:
        return {
            name: VolumeDetails(
                VolumeView(stored.value, stored.version, self.locks.get((ResourceKind.VOLUME, name), "")),
                tuple(
                    container
                    for container, view in self._views().items()
                    if name in {mount.volume for mount in view.container.spec.mounts}
                ),
            )
            for name, stored in sorted(self.volume_records.items())
        }

    def _check(self, item: change.StoreChange) -> None:  # noqa: C901 - one case for each kind of condition
        found: object = None
        match item:
            case change.Lock(kind=kind, name=name) | change.RequireUnlocked(kind=kind, name=name):
                found, holds = self.locks.get((kind, name)), (kind, name) not in self.locks
            case change.Unlock(kind=kind, name=name, operation_id=operation_id):
                found = self.locks.get((kind, name))
                holds = found == operation_id
            case (
                change.RequireVolumeVersion(name=name, expect=expect)
                | change.PutVolume(volume=Volume(name=name), expect=expect)
                | change.DeleteVolume(name=name, expect=expect)
            ):
                found = self.volume_records.get(name)
                holds = (found.version if isinstance(found, Versioned) else 0) == expect
            case change.Claim(host=host, key=key):
                found, holds = self.holders[host].get(key), key not in self.holders[host]
            case change.ConfirmClaim(host=host, key=key, holder=holder):
                found = self.holders[host].get(key)
                holds = isinstance(found, Holder) and found.uid == holder.uid
            case (
                change.PutContainer(container=Container(name=name), expect=expect)
                | change.DeleteContainer(name=name, expect=expect)
            ):
                found = self.container_records.get(name)
                holds = (found.version if isinstance(found, Versioned) else 0) == expect
            case change.PutOperation(operation=operation, expect=expect):
                found = self.journal.get(operation.id)
                holds = (found.version if isinstance(found, Versioned) else 0) == expect
            case change.PutRequest(request_id=request_id, ended=ended):
                found = self._versioned(item, self.request_records.get(request_id))
                holds = ended or found is None
            case change.PutRevision(revision=revision):
                view = self.revision_views.get((revision.uid, revision.revision))
                found = self._versioned(item, view.revision if view else None)
                holds = found is None
            case change.PutVolumeRevision(revision=volume_revision):
                found = self._versioned(
                    item, self.volume_revision_records.get((volume_revision.uid, volume_revision.revision))
                )
                holds = found is None
            case _:
                holds = True
        if not holds:
            raise StoreConflict(item, found)

    def _versioned(self, item: change.StoreChange, found: T | None) -> Versioned[T] | None:
        return None if found is None else Versioned(found, self._versions.get(_key(item), 1))

    def _write(self, item: change.StoreChange) -> None:  # noqa: C901, PLR0912 - one case for each kind of change
        match item:
            case change.Lock(kind=kind, name=name, operation_id=operation_id):
                self.locks[kind, name] = operation_id
            case change.Unlock(kind=kind, name=name):
                del self.locks[kind, name]
            case change.PutVolume(volume=volume):
                self.volume_records[volume.name] = Versioned(volume, self.version)
            case change.DeleteVolume(name=name, uid=uid):
                self.volume_records.pop(name, None)
                self.volume_revision_records = {
                    key: found for key, found in self.volume_revision_records.items() if key[0] != uid
                }
            case change.PutVolumeRevision(revision=volume_revision):
                self.volume_revision_records[volume_revision.uid, volume_revision.revision] = volume_revision
            case (
                change.Claim(host=host, key=key, holder=holder) | change.ConfirmClaim(host=host, key=key, holder=holder)
            ):
                self.holders[host][key] = holder
            case change.ReleaseClaim(host=host, key=key, uid=uid):
                if key in self.holders[host] and self.holders[host][key].uid == uid:
                    del self.holders[host][key]
            case change.PutContainer(container=container):
                self.container_records[container.name] = Versioned(container, self.version)
            case change.DeleteContainer(name=name, uid=uid):
                self.container_records.pop(name, None)
                self.revision_views = {at: view for at, view in self.revision_views.items() if at[0] != uid}
                self._snapshots = {at: snapshot for at, snapshot in self._snapshots.items() if at[0] != uid}
            case change.PutOperation(operation=operation):
                self.arguments.setdefault(operation.id, operation.arguments)
                arguments = {} if operation.state.ended else operation.arguments
                self.journal[operation.id] = Versioned(operation.changed(arguments=arguments), self.version)
            case change.PutRequest(request_id=request_id, record=record):
                self.request_records[request_id] = record
            case change.PutRevision(revision=revision):
                self._show_revision(revision)
            case change.PutSnapshot(uid=uid, revision=number, snapshot=snapshot):
                self._snapshots[uid, number] = snapshot
                if (uid, number) in self.revision_views:
                    self._show_revision(self.revision_views[uid, number].revision)
            case change.DeleteRevision(uid=uid, revision=number):
                self.revision_views.pop((uid, number), None)
                self._snapshots.pop((uid, number), None)
            case change.PutImageOrigin(origin=origin):
                self.origins[origin.node, origin.image_id] = origin
            case change.DeleteImageOrigin(node=node, image_id=image_id):
                self.origins.pop((node, image_id), None)

    def _show_revision(self, revision: ContainerRevision) -> None:
        snapshot = self._snapshots.get((revision.uid, revision.revision))
        self.revision_views[revision.uid, revision.revision] = (
            RevisionView(revision, None, snapshot.reason)
            if isinstance(snapshot, SnapshotSkipped)
            else RevisionView(revision, snapshot)
        )

    def put(self, container: Container) -> None:
        """Write the record of a container."""
        before, volumes_before = self._views(), self._volume_details()
        self.version += 1
        self.container_records[container.name] = Versioned(container, self.version)
        self._record(before, volumes_before)

    @override
    async def container(self, name: str) -> ContainerView | None:
        stored = self.container_records.get(name)
        lock = self.locks.get((ResourceKind.CONTAINER, name), "")
        return ContainerView(stored.value, stored.version, lock) if stored else None

    @override
    async def volume(self, name: str) -> VolumeView | None:
        stored = self.volume_records.get(name)
        lock = self.locks.get((ResourceKind.VOLUME, name), "")
        return VolumeView(stored.value, stored.version, lock) if stored else None

    @override
    async def volumes(self, *, page_size: int, page_token: str) -> Page[VolumeView]:
        views = [details.view for details in self._volume_details().values()]
        return self._page("volumes", views, page_size, page_token, self._volume_history)

    @override
    def watch_volumes(self, *, token: str, listing: bool) -> AsyncGenerator[StoreEvent[VolumeDetails], None]:
        return self._watch(self._volume_history, token, listing=listing)

    @override
    async def volume_revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[VolumeRevision]:
        revisions = [revision for (owner, _), revision in sorted(self.volume_revision_records.items()) if owner == uid]
        return self._page(f"volume revisions of {uid}", revisions, page_size, page_token)

    @override
    async def containers(self, *, page_size: int, page_token: str) -> Page[ContainerView]:
        views = list(self._views().values())
        return self._page("containers", views, page_size, page_token, self._container_history)

    @override
    def watch_containers(self, *, token: str, listing: bool) -> AsyncGenerator[StoreEvent[ContainerView], None]:
        return self._watch(self._container_history, token, listing=listing)

    async def _watch(self, history: _History[T], token: str, *, listing: bool) -> AsyncGenerator[StoreEvent[T], None]:
        if not token and listing:
            self._listings.append(_Listing(history.kind, list(history.current().values()), len(history.changes)))
            token = f"{history.kind} list {len(self._listings) - 1} 0"
        place = len(history.changes)
        if token:
            phase, number, shown = _parsed_watch_token(history.kind, token)
            place = number
            if phase == "list":
                listed = self._find_listing(history.kind, number, token, "resume_token")
                for index, view in enumerate(listed.items[shown:], start=shown + 1):
                    yield StoreEvent(None, view, f"{history.kind} list {number} {index}")  # type: ignore[arg-type]  # items of this kind
                place, listing = listed.change_count, True
            elif number > len(history.changes):
                raise _wrong("resume_token")
            else:
                listing = False
        if place < history.forgotten:
            raise ResumeTokenExpired(token)
        yield StoreEvent(None, None, history.token(place), list_complete=listing)
        while True:
            if place < history.forgotten:
                raise ResumeTokenExpired(token)
            changed = self._changed
            if place == len(history.changes):
                await changed.wait()
                continue
            before, after = history.changes[place]
            place += 1
            yield StoreEvent(before, after, history.token(place))

    def _find_listing(self, listing: str, number: int, token: str, field_name: str) -> _Listing:
        """Return a listing by its number. Raises InvalidArgument, ResumeTokenExpired."""
        if number >= len(self._listings):
            raise _wrong(field_name)
        listed = self._listings[number]
        if listed is None:
            raise ResumeTokenExpired(token)
        if listed.name != listing:
            raise _wrong(field_name)
        return listed

    def _page(
        self,
        listing: str,
        items: Sequence[T],
        size: int,
        token: str,
        history: _History[ContainerView] | _History[VolumeDetails] | None = None,
    ) -> Page[T]:
        self.reads += 1
        if token:
            named, *numbers = token.rsplit(" ", 2)
            if named != listing or len(numbers) != 2 or not all(part.isdecimal() for part in numbers):
                raise _wrong("page_token")
            number, first = map(int, numbers)
            listed = self._find_listing(listing, number, token, "page_token")
        else:
            number, first = len(self._listings), 0
            listed = _Listing(listing, items, len(history.changes) if history else 0)
            self._listings.append(listed)
        last = first + size
        return Page(
            tuple(listed.items[first:last]),  # type: ignore[arg-type]  # the items of the listing
            f"{listing} {number} {last}" if last < len(listed.items) else "",
            history.token(listed.change_count) if history else "",
        )

    @override
    async def revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[RevisionView]:
        return self._page(f"revisions of {uid}", await self.history(uid), page_size, page_token)

    @override
    async def history(self, uid: str) -> tuple[RevisionView, ...]:
        return tuple(view for (owner, _), view in sorted(self.revision_views.items()) if owner == uid)

    @override
    async def revision(self, uid: str, number: int) -> RevisionView | None:
        return self.revision_views.get((uid, number))

    @override
    async def claims(self, host: str) -> ClaimTable:
        return ClaimTable(dict(self.holders[host]))

    @override
    async def operation(self, operation_id: str) -> Versioned[Operation] | None:
        return self.journal.get(operation_id)

    @override
    async def operations(self, *, page_size: int, page_token: str) -> Page[Operation]:
        # Large fields are shown only where a single operation is read.
        by_id = [stored.value.changed(arguments={}, result=None) for _, stored in sorted(self.journal.items())]
        return self._page("operations", by_id, page_size, page_token)

    @override
    async def unfinished(self, node: str) -> tuple[Versioned[Operation], ...]:
        locking = [self.journal.get(operation_id) for operation_id in dict.fromkeys(self.locks.values())]
        return tuple(
            stored for stored in locking if stored and stored.value.node == node and not stored.value.state.ended
        )

    @override
    async def list_locks(self) -> tuple[change.Lock, ...]:
        return tuple(change.Lock(kind, name, operation_id) for (kind, name), operation_id in self.locks.items())

    @override
    async def request(self, request_id: str) -> RequestRecord | None:
        return self.request_records.get(request_id)

    @override
    async def image_origin(self, node: str, image_id: str) -> ImageOrigin | None:
        return self.origins.get((node, image_id))

    @override
    async def image_origins(self, node: str) -> tuple[ImageOrigin, ...]:
        return tuple(origin for (origin_node, _), origin in self.origins.items() if origin_node == node)

    @override
    async def nodes(self) -> tuple[NodeRecord, ...]:
        return ()

    @override
    async def usage(self) -> StoreUsage:
        return StoreUsage(size_bytes=3 << 20, in_use_bytes=1 << 20, quota_bytes=2 << 30, full=self.full)

    @override
    async def ping(self) -> str:
        return "3.5.0"


def _key(item: change.StoreChange) -> Hashable:  # noqa: C901, PLR0911 - one case for each kind of key
    """Return the key of a change; the changes of a transaction must have different keys."""
    match item:
        case (
            change.Lock(kind=kind, name=name)
            | change.Unlock(kind=kind, name=name)
            | change.RequireUnlocked(kind=kind, name=name)
        ):
            return "lock", kind, name
        case (
            change.RequireVolumeVersion(name=name)
            | change.PutVolume(volume=Volume(name=name))
            | change.DeleteVolume(name=name)
        ):
            return "volume", name
        case (
            change.Claim(host=host, key=key)
            | change.ConfirmClaim(host=host, key=key)
            | change.ReleaseClaim(host=host, key=key)
        ):
            return "claim", host, key
        case change.PutContainer(container=Container(name=name)) | change.DeleteContainer(name=name):
            return "container", name
        case (
            change.PutRevision(revision=ContainerRevision(uid=uid, revision=number))
            | change.DeleteRevision(uid=uid, revision=number)
        ):
            return "revision", uid, number
        case change.PutSnapshot(uid=uid, revision=number):
            return "snapshot", uid, number
        case change.PutVolumeRevision(revision=VolumeRevision(uid=uid, revision=number)):
            return "volume revision", uid, number
        case change.PutOperation(operation=Operation(id=operation_id)):
            return "operation", operation_id
        case change.PutRequest(request_id=request_id):
            return "request", request_id
        case (
            change.PutImageOrigin(origin=ImageOrigin(node=node, image_id=image_id))
            | change.DeleteImageOrigin(node=node, image_id=image_id)
        ):
            return "image origin", node, image_id


def _parsed_watch_token(kind: str, token: str) -> tuple[str, int, int]:
    """Return the phase, the number of the listing or of changes, and how many items were shown.

    Raises InvalidArgument.
    """
    named, *rest = token.split(" ")
    if named != kind or len(rest) != 3 or rest[0] not in ("list", "changes"):
        raise _wrong("resume_token")
    if not all(part.isdecimal() for part in rest[1:]):
        raise _wrong("resume_token")
    return rest[0], int(rest[1]), int(rest[2])


def _wrong(field_name: str) -> InvalidArgument:
    return InvalidArgument((FieldViolation(field_name, "it is not a token of this store"),))
