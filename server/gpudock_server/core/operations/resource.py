"""One kind of resource, as operations see it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from gpudock_server.errors import GpudockError
from gpudock_server.model.container import Container
from gpudock_server.model.resource import ResourceKind, ResourceRef
from gpudock_server.model.volume import Volume
from gpudock_server.ports import Store

# A record with the version to compare and set against, as the store shows it.
V = TypeVar("V")


class Resource(ABC, Generic[V]):
    """How the record of a resource is read, and the errors that name the resource."""

    kind: ClassVar[ResourceKind]

    def __init__(self, store: Store) -> None:
        self._store = store

    @abstractmethod
    async def view(self, name: str) -> V | None:
        """The record of a resource of any node; None where there is none."""

    @abstractmethod
    def record(self, view: V) -> Container | Volume:
        """The record that a view shows."""

    @abstractmethod
    def exists_error(self, name: str) -> GpudockError:
        """The error for a name that is taken."""

    @abstractmethod
    def busy_error(self, name: str, operation_id: str) -> GpudockError:
        """The error for a resource that an operation has locked."""

    @abstractmethod
    def wrong_node_error(self, name: str, node: str, address: str) -> GpudockError:
        """The error for a resource of another node; `address` is where its daemon is reached, empty if nowhere."""

    async def view_of(self, ref: ResourceRef) -> V | None:
        """The record that a reference means; None where it is gone, or another resource has its name."""
        view = await self.view(ref.name)
        return view if view is not None and self.record(view).uid == ref.uid else None
