"""Where the truth is kept: records, claims, locks and the journal, changed in transactions."""

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
    """A stored value with the version to compare and set against; 0 never names an existing one."""

    value: T
    version: int


@dataclass(frozen=True, slots=True)
class ContainerView:
    """A head together with the operation that has it locked (empty: none), read at one moment."""

    container: Container
    version: int
    operation_id: str


@dataclass(frozen=True, slots=True)
class RevisionView:
    """A revision and its snapshot, read at one moment; None: its files were not kept.

    `snapshot_warning` says why they were not although the policy asked for it; otherwise it is empty.
    """

    revision: ContainerRevision
    snapshot: Snapshot | None
    snapshot_warning: str = ""


@dataclass(frozen=True, slots=True)
class UnreadableKey:
    """Something in the store that cannot be read: where it is, whose it is by its key, and what is wrong with it."""

    key: str
    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class VolumeView:
    """A volume's head together with the operation that has it locked (empty: none), read at one moment."""

    volume: Volume
    version: int
    operation_id: str


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """How large the store's database is.

    `size_bytes` is its file, `in_use_bytes` what of that holds data, `quota_bytes` what it may grow to (0: not known).
    `full` says why the store takes no changes that need room, and what helps; empty where it does.
    """

    size_bytes: int
    in_use_bytes: int
    quota_bytes: int
    full: str


@dataclass(frozen=True, slots=True)
class VolumeDetails:
    """A volume with what is derived: who mounts it, and the bytes in use where they were measured."""

    view: VolumeView
    containers: tuple[str, ...]
    used_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """A part of a consistent listing. `next_token` is empty on the last.

    With `watch_token` a watch tells what happened since, where the listed can be watched. What cannot be read is left
    out of `items`.
    """

    items: tuple[T, ...]
    next_token: str
    watch_token: str = ""
    unreadable: tuple[UnreadableKey, ...] = ()


@dataclass(frozen=True, slots=True)
class StoreEvent(Generic[T]):
    """What a watch saw of one object: as it was before a change (None: not there) and after it (None: gone).

    Both are None where nothing is to be told up to here. `token` goes on behind it. `list_complete`: everything that
    was there when the watch began has been shown.
    """

    before: T | None
    after: T | None
    token: str
    list_complete: bool = False


class StoreConflict(Exception):
    """A condition of a transaction did not hold, so none of it happened.

    `change` is the first whose condition failed; `found` is what stands there: an operation id for a lock, a Holder
    for a claim, a Versioned record otherwise, None where nothing does.
    """

    def __init__(self, change: StoreChange, found: object) -> None:
        super().__init__(f"{change} met {found}")
        self.change = change
        self.found = found


class Store(Protocol):
    """The truth. Raises StoreUnavailable when it does not answer within its timeout.

    Where a change needs room that the store does not have, that is its subclass StoreFull.

    `apply` resolves what a timeout leaves open: while it has time it finds out, by reading back, whether the
    transaction happened, and only then gives up with StoreUnavailable. What cannot be read is left out of what is read
    with others, and RecordUnreadable where it was asked for by itself; a claim that cannot be read is held.
    """

    async def apply(self, changes: Sequence[StoreChange]) -> int:
        """Do all of `changes` or none; the version that the things put now have. Raises StoreConflict."""
        ...

    async def container(self, name: str) -> ContainerView | None:
        """A head and its lock, in one read."""
        ...

    async def containers(self, *, page_size: int, page_token: str) -> Page[ContainerView]:
        """Heads in the order of their names; every page shows the moment of the first. Raises ResumeTokenExpired."""
        ...

    async def revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[RevisionView]:
        """A container's history, oldest first; pages as in `containers`."""
        ...

    async def history(self, uid: str) -> tuple[RevisionView, ...]:
        """All of a container's history at one moment, oldest first."""
        ...

    async def revision(self, uid: str, number: int) -> RevisionView | None:
        """One revision with its snapshot."""
        ...

    def watch_containers(self, *, token: str, listing: bool) -> AsyncGenerator[StoreEvent[ContainerView], None]:
        """Heads and their locks as they change, every change once and in order: behind `token`, or from now on.

        Without a token and with `listing` those that are there come first, then `list_complete`. With a token, the
        first is one that only says that the watch has begun. Something comes at least every idle interval of the
        store. Not asking for the next one holds the store back. Raises ResumeTokenExpired, InvalidArgument
        (resume_token), StoreUnavailable when the store is away for longer than its timeout.
        """
        ...

    async def volume(self, name: str) -> VolumeView | None:
        """A volume's head and its lock, in one read."""
        ...

    async def volumes(self, *, page_size: int, page_token: str) -> Page[VolumeView]:
        """Volumes' heads in the order of their names; pages as in `containers`."""
        ...

    def watch_volumes(self, *, token: str, listing: bool) -> AsyncGenerator[StoreEvent[VolumeDetails], None]:
        """Heads, their locks and the containers whose specs mount them, as they change; like `watch_containers`.

        What is in use is not among it.
        """
        ...

    async def volume_revisions(self, uid: str, *, page_size: int, page_token: str) -> Page[VolumeRevision]:
        """A volume's history, oldest first; pages as in `containers`."""
        ...

    async def claims(self, host: str) -> ClaimTable:
        """All claims of a host, at one moment."""
        ...

    async def operation(self, operation_id: str) -> Versioned[Operation] | None:
        """An operation that has not expired."""
        ...

    async def operations(self, *, page_size: int, page_token: str) -> Page[Operation]:
        """Operations in the order of their ids; pages as in `containers`."""
        ...

    async def unfinished(self, node: str) -> tuple[Versioned[Operation], ...]:
        """Operations of `node` that have not ended and can be read, found by the locks they hold."""
        ...

    async def list_locks(self) -> tuple[Lock, ...]:
        """Every lock there is, of any node."""
        ...

    async def request(self, request_id: str) -> RequestRecord | None:
        """What a request id stood for."""
        ...

    async def image_origin(self, node: str, image_id: str) -> ImageOrigin | None:
        """Where an image of a node's engine came from; None where gpudock does not know."""
        ...

    async def image_origins(self, node: str) -> tuple[ImageOrigin, ...]:
        """The origins of a node's images, as far as gpudock knows them."""
        ...

    async def nodes(self) -> tuple[NodeRecord, ...]:
        """Every daemon that is alive."""
        ...

    async def ping(self) -> str:
        """The store's version; raises StoreUnavailable. One that is full answers."""
        ...

    async def usage(self) -> StoreUsage:
        """How full it is. Raises StoreUnavailable."""
        ...
