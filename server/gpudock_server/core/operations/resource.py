"""One kind of resource, as operations see it."""

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
    """A record with the operation that has it locked."""

    @property
    def operation_id(self) -> str:
        """Empty where no operation has it locked."""
        ...


# A record with the version to compare and set against, as the store shows it.
V = TypeVar("V", bound=LockedView)


class Resource(ABC, Generic[V]):
    """How the record of a resource is found, and the errors that name the resource."""

    kind: ClassVar[ResourceKind]

    def __init__(self, store: Store, node: str) -> None:
        """`node` is this node, whose resources `find` finds."""
        self._store = store
        self.node = node

    @abstractmethod
    async def view(self, name: str) -> V | None:
        """The record of a resource of any node; None where there is none."""

    @abstractmethod
    def record(self, view: V) -> Container | Volume:
        """The record that a view shows."""

    @abstractmethod
    async def not_found_error(self, name: str) -> GpudockError:
        """The error for a name that no resource has."""

    @abstractmethod
    def exists_error(self, name: str) -> GpudockError:
        """The error for a name that is taken."""

    @abstractmethod
    def busy_error(self, name: str, operation_id: str) -> GpudockError:
        """The error for a resource that an operation has locked."""

    @abstractmethod
    def stale_etag_error(self, name: str, etag: str, current: str) -> GpudockError:
        """The error for a resource that has changed since the caller read it."""

    @abstractmethod
    def wrong_node_error(self, name: str, node: str, address: str) -> GpudockError:
        """The error for a resource of another node; `address` is where its daemon is reached, empty if nowhere."""

    async def view_of(self, ref: ResourceRef) -> V | None:
        """The record that a reference means; None where it is gone, or another resource has its name."""
        view = await self.view(ref.name)
        return view if view is not None and self.record(view).uid == ref.uid else None

    async def find(self, name: str, etag: str = "") -> V:
        """A resource of this node as the caller has read it; an empty `etag` is not compared.

        Raises the errors for a resource that is not found, of another node, or changed since.
        """
        view = await self.view(name)
        if view is None:
            raise await self.not_found_error(name)
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
        """`find` for a resource that no operation is at work on. Raises also the error for one that is locked."""
        view = await self.find(name, etag)
        if view.operation_id:
            raise self.busy_error(name, view.operation_id)
        return view
