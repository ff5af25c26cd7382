"""The interface that operations need of a kind of resource."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, Protocol, TypeVar

from gpudock_server.core.listings import node_address
from gpudock_server.errors import GpudockError
from gpudock_server.model.container import Container
from gpudock_server.model.resource import ResourceKind, ResourceRef
from gpudock_server.model.volume import Volume
from gpudock_server.ports import Store


class LockedView(Protocol):
    """A record with the operation that holds its lock."""

    @property
    def operation_id(self) -> str:
        """The operation that holds the lock; empty where none does."""
        ...


# The store's view of a record, with the version for compare-and-set.
V = TypeVar("V", bound=LockedView)


class Resource(ABC, Generic[V]):
    """Finds the records of one kind of resource, and makes the errors that name a resource."""

    kind: ClassVar[ResourceKind]

    def __init__(self, store: Store, node: str) -> None:
        """`node` is this node; `find` refuses resources of other nodes."""
        self._store = store
        self.node = node

    @abstractmethod
    async def view(self, name: str) -> V | None:
        """The view of a resource of any node; None where none has that name."""

    @abstractmethod
    def record(self, view: V) -> Container | Volume:
        """The record of a view."""

    @abstractmethod
    async def not_found_error(self, name: str) -> GpudockError:
        """The error for a name that no resource has."""

    @abstractmethod
    def exists_error(self, name: str) -> GpudockError:
        """The error for a name that is taken."""

    @abstractmethod
    def busy_error(self, name: str, operation_id: str) -> GpudockError:
        """The error for a resource that an operation holds the lock of."""

    @abstractmethod
    def stale_etag_error(self, name: str, etag: str, current: str) -> GpudockError:
        """The error for a resource that has changed since the caller read it."""

    @abstractmethod
    def wrong_node_error(self, name: str, node: str, address: str) -> GpudockError:
        """The error for a resource of another node; `address` is that of its daemon, empty if none is alive."""

    async def view_of(self, ref: ResourceRef) -> V | None:
        """The view of a referenced resource; None where it is gone or another resource has its name."""
        view = await self.view(ref.name)
        return view if view is not None and self.record(view).uid == ref.uid else None

    async def get(self, name: str) -> V:
        """The view of a resource of any node. Raises the error for a resource that is not found."""
        view = await self.view(name)
        if view is None:
            raise await self.not_found_error(name)
        return view

    async def find(self, name: str, etag: str = "") -> V:
        """The view of a resource of this node. A non-empty `etag` must be the current one.

        Raises the errors for a resource that is not found, of another node, or changed since.
        """
        view = await self.get(name)
        record = self.record(view)
        await self.require_this_node(record)
        if etag and etag != record.etag:
            raise self.stale_etag_error(name, etag, record.etag)
        return view

    async def require_this_node(self, record: Container | Volume) -> None:
        """Raises the error for a resource of another node."""
        if record.node != self.node:
            raise self.wrong_node_error(record.name, record.node, await node_address(self._store, record.node))

    async def find_unlocked(self, name: str, etag: str = "") -> V:
        """`find` for a resource without a lock. Raises also the error for a locked one."""
        view = await self.find(name, etag)
        if view.operation_id:
            raise self.busy_error(name, view.operation_id)
        return view
