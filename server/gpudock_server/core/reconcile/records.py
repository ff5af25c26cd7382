"""What a reconcile pass reads from the store, and from the labels of engine containers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gpudock_server.core.listings import read_all_pages
from gpudock_server.model.claims import ClaimKey, GpuKey
from gpudock_server.model.container import Placement, PortBinding
from gpudock_server.model.engine import LABEL_NAME, LABEL_OPERATION, LABEL_REVISION, LABEL_UID, EngineContainer
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.ports import ContainerView, Store, UnreadableKey


@dataclass(frozen=True, slots=True)
class ContainerRecords:
    """The container records of every node, by name, and the keys of unreadable ones."""

    views: Mapping[str, ContainerView]
    unreadable: tuple[UnreadableKey, ...]

    def of(self, node: str) -> tuple[ContainerView, ...]:
        """The records of one node."""
        return tuple(view for view in self.views.values() if view.container.node == node)

    @property
    def uids(self) -> frozenset[str]:
        """The uids of all containers with a record."""
        return frozenset(view.container.uid for view in self.views.values())

    @property
    def bound(self) -> frozenset[str]:
        """The ids of all engine containers that a record binds."""
        return frozenset(view.container.engine.engine_id for view in self.views.values() if view.container.engine)

    @property
    def unreadable_names(self) -> frozenset[str]:
        """Names whose record is unreadable. Nothing of these containers is changed."""
        return frozenset(key.name for key in self.unreadable)


async def read_container_records(store: Store) -> ContainerRecords:
    """The container records, as of one store revision."""
    page = await read_all_pages(store.containers)
    return ContainerRecords({view.container.name: view for view in page.items}, page.unreadable)


@dataclass(frozen=True, slots=True)
class EngineContainerLabels:
    """What the labels of an engine container say: its container, and the operation and revision that made it."""

    uid: str
    name: str
    operation_id: str
    revision: int

    @classmethod
    def of(cls, engine_container: EngineContainer) -> EngineContainerLabels:
        """Read the labels of an engine container; a revision that is no number is 0."""
        labels = engine_container.labels
        revision = labels.get(LABEL_REVISION, "")
        return cls(
            uid=labels.get(LABEL_UID, ""),
            name=labels.get(LABEL_NAME, ""),
            operation_id=labels.get(LABEL_OPERATION, ""),
            revision=int(revision) if revision.isascii() and revision.isdecimal() else 0,
        )


def created_by_gpudock(engine_containers: Mapping[str, EngineContainer]) -> Iterator[EngineContainer]:
    """The engine containers that an operation of gpudock created.

    Labels alone do not prove this: a container of an image that was committed from one of gpudock's has the labels too,
    but not the name that belongs to them.
    """
    for engine_container in engine_containers.values():
        if engine_container.name == engine_container.created_name:
            yield engine_container


def placement_of(spec: ContainerSpec, engine_container: EngineContainer) -> Placement:
    """The GPUs and ports of an engine container, the ports in the order of the port requests in `spec`."""
    remaining = list(engine_container.ports)
    ordered: list[PortBinding] = []
    for request in spec.ports:
        binding = next((port for port in remaining if port.serves(request)), None)
        if binding is not None:
            remaining.remove(binding)
            ordered.append(binding)
    return Placement(gpu_uuids=engine_container.gpu_uuids, ports=(*ordered, *remaining))


def claim_text(key: ClaimKey) -> str:
    """A claim for people: the UUID of a GPU, or a port as `tcp/8080`."""
    return key.uuid if isinstance(key, GpuKey) else f"{key.protocol.value}/{key.port}"
