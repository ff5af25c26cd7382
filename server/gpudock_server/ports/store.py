"""The authoritative store of records, claims, locks and operations, changed in transactions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from gpudock_server.model.claims import ClaimTable
from gpudock_server.model.container import Container, ContainerRevision
from gpudock_server.model.image import ImageOrigin
from gpudock_server.model.node import NodeRecord
from gpudock_server.model.operation import Operation, RequestRecord
from gpudock_server.model.snapshot import Snapshot
from gpudock_server.model.store_changes import Lock, StoreChange
from gpudock_server.model.volume import Volume, VolumeRevision

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Versioned(Generic[T]):
    """A stored value with its version for compare-and-set; existing values never have version 0."""

    value: T
    version: int


@dataclass(frozen=True, slots=True)
class ContainerView:
    """The record of a container and the operation that has locked it (empty: none), from one consistent read."""

    container: Container
    version: int
    operation_id: str


@dataclass(frozen=True, slots=True)
class RevisionView:
    """A revision and its snapshot (None: no snapshot), from one consistent read.

    `snapshot_warning` says why there is no snapshot although the policy requires one; otherwise it is empty.
    """

    revision: ContainerRevision
    snapshot: Snapshot | None
    snapshot_warning: str = ""


@dataclass(frozen=True, slots=True)
class UnreadableKey:
    """A record that cannot be read: its key, the object name in the key, and what is wrong."""

    key: str
    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class VolumeView:
    """The record of a volume and the operation that has locked it (empty: none), from one consistent read."""

    volume: Volume
    version: int
    operation_id: str


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """The size of the store's database.

    `size_bytes` is the size of its file, `in_use_bytes` the part of it that holds data, `quota_bytes` its limit (0: not
    known). `full` says why the store accepts only deletions, and what helps; empty if it accepts all changes.
    """

    size_bytes: int
    in_use_bytes: int
    quota_bytes: int
    full: str


@dataclass(frozen=True, slots=True)
class VolumeDetails:
    """A volume with the containers that mount it, and the bytes in use (None: not measured)."""

    view: VolumeView
    containers: tuple[str, ...]
    used_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A page of a consistent listing. `next_token` is empty on the last page.

    A watch that starts with `watch_token` reports all changes since the listing; it is empty if the objects cannot be
    watched. Records that cannot be read are not in `items` but in `unreadable`.
    """

    items: tuple[T, ...]
    next_token: str
    watch_token: str = ""
    unreadable: tuple[UnreadableKey, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreEvent(Generic[T]):
    """One change of an object: `before` (None: it did not exist) and `after` (None: it was deleted).

    Both are None in a checkpoint. A watch that starts with `token` continues after this event. `list_complete`: all
    objects that existed when the watch began have been reported.
    """

    before: T | None
    after: T | None
    token: str
    list_complete: bool = False


class StoreConflict(Exception):
    """A condition of a transaction did not hold, so no change was applied.

    `change` is the first change whose condition failed; `found` is the value in the store: an operation id for a lock,
    a Holder for a claim, otherwise a Versioned record; None if there is none.
    """

    def __init__(self, change: StoreChange, found: object) -> None:
        super().__init__(f"{change} met {found}")
        self.change = change
        self.found = found


class Store(Protocol):
    """The authoritative store of records, claims, locks and operations.

    Raises StoreUnavailable if it does not answer in time, and its subclass StoreFull if it has no space for a change.
    After a timeout `apply` reads back whether the transaction was applied, and raises StoreUnavailable only if that
    also fails. Records that cannot be read are left out of listings; reading one of them alone raises RecordUnreadable.
    A claim that cannot be read counts as held.
    """

    async def apply(self, changes: Sequence[StoreChange]) -> int:
        """Apply all changes or none; returns the new version of all written records. Raises StoreConflict."""
        ...

    async def container(self, name: str) -> ContainerView | None:
        """Return the record of a container and its lock; None if it does not exist."""
        ...

    async def containers(self, *, page_size: int, page_token: str) -> Page[ContainerView]:
        """List containers by name; all pages show the state of the first page. Raises ResumeTokenExpired."""
        ...

    async def revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[RevisionView]:
        """List the revisions of a container, oldest first; pages as in `containers`."""
        ...

    async def history(self, uid: str) -> tuple[RevisionView, ...]:
        """Return all revisions of a container from one consistent read, oldest first."""
        ...

    async def revision(self, uid: str, number: int) -> RevisionView | None:
        """Return a revision with its snapshot; None if it does not exist."""
        ...

    def watch_containers(self, *, token: str, listing: bool) -> AsyncGenerator[StoreEvent[ContainerView], None]:
        """Watch containers and their locks: every change once and in order, after `token` or from now on.

        Without a token and with `listing` the existing containers come first, then `list_complete`. With a token the
        first event is a checkpoint. At least one event comes in every idle interval of the store. The watch is not
        buffered: the store waits while the caller does not read. Raises ResumeTokenExpired, InvalidArgument
        (resume_token), and StoreUnavailable if the store does not answer for longer than its timeout.
        """
        ...

    async def volume(self, name: str) -> VolumeView | None:
        """Return the record of a volume and its lock; None if it does not exist."""
        ...

    async def volumes(self, *, page_size: int, page_token: str) -> Page[VolumeView]:
        """List volumes by name; pages as in `containers`."""
        ...

    def watch_volumes(self, *, token: str, listing: bool) -> AsyncGenerator[StoreEvent[VolumeDetails], None]:
        """Watch volumes, their locks and the containers whose specs mount them, like `watch_containers`.

        `used_bytes` is not reported.
        """
        ...

    async def volume_revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[VolumeRevision]:
        """List the revisions of a volume, oldest first; pages as in `containers`."""
        ...

    async def claims(self, host: str) -> ClaimTable:
        """Return all claims of a host from one consistent read."""
        ...

    async def operation(self, operation_id: str) -> Versioned[Operation] | None:
        """Return an operation; None if it does not exist or has expired."""
        ...

    async def operations(self, *, page_size: int, page_token: str) -> Page[Operation]:
        """List operations by id; pages as in `containers`."""
        ...

    async def unfinished(self, node: str) -> tuple[Versioned[Operation], ...]:
        """Return the readable operations of `node` that have not ended, found by the locks they hold."""
        ...

    async def list_locks(self) -> tuple[Lock, ...]:
        """Return all locks of all nodes."""
        ...

    async def request(self, request_id: str) -> RequestRecord | None:
        """Return the record of a request id; None if it is unused or has expired."""
        ...

    async def image_origin(self, node: str, image_id: str) -> ImageOrigin | None:
        """Return the origin of an image of a node's engine; None if it is unknown."""
        ...

    async def image_origins(self, node: str) -> tuple[ImageOrigin, ...]:
        """Return all known origins of a node's images."""
        ...

    async def nodes(self) -> tuple[NodeRecord, ...]:
        """Return the records of all running daemons."""
        ...

    async def ping(self) -> str:
        """Return the version of the store. Raises StoreUnavailable. A full store answers."""
        ...

    async def usage(self) -> StoreUsage:
        """Return the size of the database. Raises StoreUnavailable."""
        ...
