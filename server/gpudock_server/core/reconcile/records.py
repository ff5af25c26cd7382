"""What one pass sees of the engine and the store."""

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
    """Every head there is, of whatever node, by name; and those that cannot be read."""

    views: Mapping[str, ContainerView]
    unreadable: tuple[UnreadableKey, ...]

    def of(self, node: str) -> tuple[ContainerView, ...]:
        """Those of one node."""
        return tuple(view for view in self.views.values() if view.container.node == node)

    @property
    def uids(self) -> frozenset[str]:
        """Every uid that has a head."""
        return frozenset(view.container.uid for view in self.views.values())

    @property
    def bound(self) -> frozenset[str]:
        """Every engine container that a head binds."""
        return frozenset(view.container.engine.engine_id for view in self.views.values() if view.container.engine)

    @property
    def unreadable_names(self) -> frozenset[str]:
        """Names whose head cannot be read: nothing of theirs is touched."""
        return frozenset(one.name for one in self.unreadable)


async def read_container_records(store: Store) -> ContainerRecords:
    """All of them, as of one moment."""
    listed = await read_all_pages(store.containers)
    return ContainerRecords({view.container.name: view for view in listed.items}, listed.unreadable)


@dataclass(frozen=True, slots=True)
class EngineContainerLabels:
    """What an engine container's labels say that it is."""

    uid: str
    name: str
    operation_id: str
    revision: int

    @classmethod
    def of(cls, one: EngineContainer) -> EngineContainerLabels:
        """Read them; a revision that is no number is 0."""
        revision = one.labels.get(LABEL_REVISION, "")
        return cls(
            uid=one.labels.get(LABEL_UID, ""),
            name=one.labels.get(LABEL_NAME, ""),
            operation_id=one.labels.get(LABEL_OPERATION, ""),
            revision=int(revision) if revision.isascii() and revision.isdecimal() else 0,
        )


def created_by_gpudock(seen: Mapping[str, EngineContainer]) -> Iterator[EngineContainer]:
    """Those that an operation of ours made.

    Labels alone do not prove that: whoever commits a container of ours and runs the image has them too, but not the
    name that goes with them.
    """
    for one in seen.values():
        if one.name == one.created_name:
            yield one


def placement_of(spec: ContainerSpec, one: EngineContainer) -> Placement:
    """What an engine container was given, its ports in the order in which `spec` asks for them."""
    left = list(one.ports)
    ordered: list[PortBinding] = []
    for request in spec.ports:
        binding = next((port for port in left if port.serves(request)), None)
        if binding is not None:
            left.remove(binding)
            ordered.append(binding)
    return Placement(gpu_uuids=one.gpu_uuids, ports=(*ordered, *left))


def claim_text(key: ClaimKey) -> str:
    """A claim in a word: a card's UUID, or `tcp/8080`."""
    return key.uuid if isinstance(key, GpuKey) else f"{key.protocol.value}/{key.port}"
