"""A store in memory, with the promises of `ports.Store` that the RPCs lean on."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from gpudock_server.errors import FieldViolation, InvalidArgument, ResumeTokenExpired
from gpudock_server.model import store_changes as change
from gpudock_server.model.claims import ClaimKey, ClaimTable, Holder
from gpudock_server.model.container import Container
from gpudock_server.model.image import ImageOrigin
from gpudock_server.model.node import NodeRecord
from gpudock_server.model.operation import Operation, RequestRecord
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.snapshot import SnapshotSkipped
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


class MemoryStore(Store):
    """A store whose transactions are plain Python. Pages show the moment of the first."""

    def __init__(self) -> None:
        self.version = 0
        self.heads: dict[str, Versioned[Container]] = {}
        self.locks: dict[tuple[ResourceKind, str], str] = {}
        self.volume_heads: dict[str, Versioned[Volume]] = {}
        self.volume_past: dict[tuple[str, int], VolumeRevision] = {}
        # By host.
        self.held: defaultdict[str, dict[ClaimKey, Holder]] = defaultdict(dict)
        self.journal: dict[str, Versioned[Operation]] = {}
        self.calls: dict[str, RequestRecord] = {}
        self.past: dict[tuple[str, int], RevisionView] = {}
        self.origins: dict[tuple[str, str], ImageOrigin] = {}
        self.reads = 0
        # Why there is no room.
        self.full = ""
        self._moments: list[Sequence[object]] = []
        # What every change was for a watch of that kind; the first `forgotten` of the containers' are no longer told.
        self.told: list[tuple[ContainerView | None, ContainerView | None]] = []
        self.volumes_told: list[tuple[VolumeDetails | None, VolumeDetails | None]] = []
        self.forgotten = 0
        self._happened = asyncio.Event()

    @override
    async def apply(self, changes: Sequence[change.StoreChange]) -> int:
        for item in changes:
            self._check(item)
        before, volumes_before = self._views(), self._volumes_seen()
        self.version += 1
        for item in changes:
            self._do(item)
        _differences(volumes_before, self._volumes_seen(), self.volumes_told)
        self._record(before)
        return self.version

    def _views(self) -> dict[str, ContainerView]:
        return {
            name: ContainerView(head.value, head.version, self.locks.get((ResourceKind.CONTAINER, name), ""))
            for name, head in sorted(self.heads.items())
        }

    def _record(self, before: Mapping[str, ContainerView]) -> None:
        _differences(before, self._views(), self.told)
        self._happened.set()
        self._happened = asyncio.Event()

    def _volumes_seen(self) -> dict[str, VolumeDetails]:
        return {
            name: VolumeDetails(
                VolumeView(head.value, head.version, self.locks.get((ResourceKind.VOLUME, name), "")),
                tuple(
                    one for one, view in self._views().items() if name in {m.volume for m in view.container.spec.mounts}
                ),
            )
            for name, head in sorted(self.volume_heads.items())
        }

    def _check(self, item: change.StoreChange) -> None:
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
                found = self.volume_heads.get(name)
                holds = (found.version if isinstance(found, Versioned) else 0) == expect
            case change.Claim(host=host, key=key):
                found, holds = self.held[host].get(key), key not in self.held[host]
            case change.ConfirmClaim(host=host, key=key, holder=holder):
                found = self.held[host].get(key)
                holds = isinstance(found, Holder) and found.uid == holder.uid
            case change.PutContainer(container=container, expect=expect):
                found = self.heads.get(container.name)
                holds = (found.version if isinstance(found, Versioned) else 0) == expect
            case change.PutOperation(operation=operation, expect=expect):
                found = self.journal.get(operation.id)
                holds = (found.version if isinstance(found, Versioned) else 0) == expect
            case change.PutRequest(request_id=request_id, ended=ended):
                found = self.calls.get(request_id)
                holds = ended or found is None
            case _:
                holds = True
        if not holds:
            raise StoreConflict(item, found)

    def _do(self, item: change.StoreChange) -> None:  # noqa: C901, PLR0912 - one line for each kind of change
        match item:
            case change.Lock(kind=kind, name=name, operation_id=operation_id):
                self.locks[kind, name] = operation_id
            case change.Unlock(kind=kind, name=name):
                del self.locks[kind, name]
            case change.PutVolume(volume=volume):
                self.volume_heads[volume.name] = Versioned(volume, self.version)
            case change.DeleteVolume(name=name):
                self.volume_heads.pop(name, None)
            case change.PutVolumeRevision(revision=volume_revision):
                self.volume_past[volume_revision.uid, volume_revision.revision] = volume_revision
            case (
                change.Claim(host=host, key=key, holder=holder) | change.ConfirmClaim(host=host, key=key, holder=holder)
            ):
                self.held[host][key] = holder
            case change.ReleaseClaim(host=host, key=key, uid=uid):
                if key in self.held[host] and self.held[host][key].uid == uid:
                    del self.held[host][key]
            case change.PutContainer(container=container):
                self.heads[container.name] = Versioned(container, self.version)
            case change.DeleteContainer(name=name):
                self.heads.pop(name, None)
            case change.PutOperation(operation=operation):
                self.journal[operation.id] = Versioned(operation, self.version)
            case change.PutRequest(request_id=request_id, record=record):
                self.calls[request_id] = record
            case change.PutRevision(revision=revision):
                self.past[revision.uid, revision.revision] = RevisionView(revision, None)
            case change.PutSnapshot(uid=uid, revision=number, snapshot=snapshot):
                revision = self.past[uid, number].revision
                self.past[uid, number] = (
                    RevisionView(revision, None, snapshot.reason)
                    if isinstance(snapshot, SnapshotSkipped)
                    else RevisionView(revision, snapshot)
                )
            case change.DeleteRevision(uid=uid, revision=number):
                self.past.pop((uid, number), None)
            case change.PutImageOrigin(origin=origin):
                self.origins[origin.node, origin.image_id] = origin
            case change.DeleteImageOrigin(node=node, image_id=image_id):
                self.origins.pop((node, image_id), None)

    def put(self, container: Container) -> None:
        """A container that was made earlier."""
        before = self._views()
        self.version += 1
        self.heads[container.name] = Versioned(container, self.version)
        self._record(before)

    @override
    async def container(self, name: str) -> ContainerView | None:
        head = self.heads.get(name)
        lock = self.locks.get((ResourceKind.CONTAINER, name), "")
        return ContainerView(head.value, head.version, lock) if head else None

    @override
    async def volume(self, name: str) -> VolumeView | None:
        head = self.volume_heads.get(name)
        lock = self.locks.get((ResourceKind.VOLUME, name), "")
        return VolumeView(head.value, head.version, lock) if head else None

    @override
    async def volumes(self, *, page_size: int, page_token: str) -> Page[VolumeView]:
        views = [
            VolumeView(head.value, head.version, self.locks.get((ResourceKind.VOLUME, name), ""))
            for name, head in sorted(self.volume_heads.items())
        ]
        return replace(self._page(views, page_size, page_token), watch_token=f"seen {len(self.volumes_told)}")

    @override
    def watch_volumes(self, *, token: str, listing: bool) -> AsyncGenerator[StoreEvent[VolumeDetails], None]:
        return self._watch(self.volumes_told, self._volumes_seen, token, listing=listing)

    @override
    async def volume_revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[VolumeRevision]:
        past = [revision for (owner, _), revision in sorted(self.volume_past.items()) if owner == uid]
        return self._page(past, page_size, page_token)

    @override
    async def containers(self, *, page_size: int, page_token: str) -> Page[ContainerView]:
        page = self._page(list(self._views().values()), page_size, page_token)
        return replace(page, watch_token=f"seen {len(self.told)}")

    @override
    def watch_containers(self, *, token: str, listing: bool) -> AsyncGenerator[StoreEvent[ContainerView], None]:
        return self._watch(self.told, self._views, token, listing=listing)

    async def _watch(
        self, told: list[tuple[T | None, T | None]], there: Callable[[], dict[str, T]], token: str, *, listing: bool
    ) -> AsyncGenerator[StoreEvent[T], None]:
        place = len(told)
        if token:
            word, _, number = token.partition(" ")
            if word != "seen" or not number.isdecimal():
                raise InvalidArgument((FieldViolation("resume_token", "is none of mine"),))
            place = int(number)
        elif listing:
            # One that is broken off begins anew.
            for view in there().values():
                yield StoreEvent(None, view, "seen 0")
        yield StoreEvent(None, None, f"seen {place}", list_complete=listing and not token)
        while True:
            if place < self.forgotten:
                raise ResumeTokenExpired(token)
            happened = self._happened
            if place == len(told):
                await happened.wait()
                continue
            before, after = told[place]
            place += 1
            yield StoreEvent(before, after, f"seen {place}")

    def _page(self, items: Sequence[T], size: int, token: str) -> Page[T]:
        self.reads += 1
        moment, first = 0, 0
        if token:
            try:
                moment, first = (int(part) for part in token.split("-"))
            except ValueError:
                raise InvalidArgument((FieldViolation("page_token", "is none of mine"),)) from None
            items = self._moments[moment]  # type: ignore[assignment]  # what was listed then
        else:
            moment = len(self._moments)
            self._moments.append(items)
        last = first + size
        return Page(tuple(items[first:last]), f"{moment}-{last}" if last < len(items) else "")

    @override
    async def revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[RevisionView]:
        return self._page(await self.history(uid), page_size, page_token)

    @override
    async def history(self, uid: str) -> tuple[RevisionView, ...]:
        return tuple(view for (owner, _), view in sorted(self.past.items()) if owner == uid)

    @override
    async def revision(self, uid: str, number: int) -> RevisionView | None:
        return self.past.get((uid, number))

    @override
    async def claims(self, host: str) -> ClaimTable:
        return ClaimTable(dict(self.held[host]))

    @override
    async def operation(self, operation_id: str) -> Versioned[Operation] | None:
        return self.journal.get(operation_id)

    @override
    async def operations(self, *, page_size: int, page_token: str) -> Page[Operation]:
        newest = sorted((stored.value for stored in self.journal.values()), key=lambda op: op.create_time, reverse=True)
        return self._page(newest, page_size, page_token)

    @override
    async def unfinished(self, node: str) -> tuple[Versioned[Operation], ...]:
        return tuple(
            stored for stored in self.journal.values() if stored.value.node == node and not stored.value.state.ended
        )

    @override
    async def list_locks(self) -> tuple[change.Lock, ...]:
        return tuple(change.Lock(kind, name, operation_id) for (kind, name), operation_id in self.locks.items())

    @override
    async def request(self, request_id: str) -> RequestRecord | None:
        return self.calls.get(request_id)

    @override
    async def image_origin(self, node: str, image_id: str) -> ImageOrigin | None:
        return self.origins.get((node, image_id))

    @override
    async def image_origins(self, node: str) -> tuple[ImageOrigin, ...]:
        return tuple(origin for (where, _), origin in self.origins.items() if where == node)

    @override
    async def nodes(self) -> tuple[NodeRecord, ...]:
        return ()

    @override
    async def usage(self) -> StoreUsage:
        return StoreUsage(size_bytes=3 << 20, in_use_bytes=1 << 20, quota_bytes=2 << 30, full=self.full)

    @override
    async def ping(self) -> str:
        return "3.5.0"


def _differences(before: Mapping[str, T], after: Mapping[str, T], told: list[tuple[T | None, T | None]]) -> None:
    told += [
        (before.get(name), after.get(name))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
