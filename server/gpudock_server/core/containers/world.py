"""What the use cases reach: the ports, and where this daemon is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from gpudock_server.core.adoption_rules import AdoptionRules
from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.containers.images import ImagePolicy
from gpudock_server.core.containers.status import observed_status
from gpudock_server.core.placement.allocator import Allocator
from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.errors import (
    ContainerBusy,
    ContainerNotFound,
    StaleEtag,
    WrongNode,
)
from gpudock_server.model.container import ContainerState
from gpudock_server.model.engine import (
    HostCapacity,
    NodeLimits,
)
from gpudock_server.model.spec import SnapshotPolicy
from gpudock_server.ports import ContainerView, Engine, HostPaths, LayerStore, RevisionBackupStore, SnapshotStore, Store


@dataclass(frozen=True, slots=True)
class HistoryDefaults:
    """How history is kept where neither a call nor a container says. `keep_seconds` 0 is for ever.

    `on_stop`: the files of a container are kept when a user stops it, too.
    """

    snapshots: SnapshotPolicy = SnapshotPolicy.ALWAYS
    keep_revisions: int = 20
    keep_seconds: float = 0.0
    on_stop: bool = False


@dataclass(frozen=True, slots=True)
class World:
    """Handed to every use case and every saga.

    `settle_seconds` is how long the process of a replacement must live before it counts as running;
    `start_watch_seconds` how long one that replaces none is watched before its start is reported, 0 for not at all.
    """

    store: Store
    engine: Engine
    layers: LayerStore
    snapshots: SnapshotStore
    host_paths: HostPaths
    ledger: RevisionBackupStore
    allocator: Allocator
    engine_containers: EngineContainers
    claims: HostClaims
    node: str
    settle_seconds: float
    start_watch_seconds: float = 0
    history: HistoryDefaults = HistoryDefaults()
    adoption: AdoptionRules = field(default_factory=AdoptionRules)
    images: ImagePolicy = field(default_factory=ImagePolicy)
    limits: NodeLimits = field(default_factory=NodeLimits)
    capacity: HostCapacity = field(default_factory=HostCapacity)

    async def lookup(self, name: str, etag: str = "") -> ContainerView:
        """A container of this node, as the caller has seen it, that no operation is at work on.

        One that is recorded as FAILED and that the engine has again is as the engine shows it, which a full comparison
        would record a moment later. Raises ContainerNotFound, WrongNode, StaleEtag, ContainerBusy.
        """
        view = await self.find(name)
        container = view.container
        if etag and etag != container.etag:
            raise StaleEtag(container=name, etag=etag, current_etag=container.etag)
        if view.operation_id:
            raise ContainerBusy(container=name, operation_id=view.operation_id)
        if container.status.state is ContainerState.FAILED and container.engine is not None:
            seen = await self.engine.inspect(container.engine.engine_id)
            return replace(view, container=container.changed(status=observed_status(container, seen)))
        return view

    async def find(self, name: str) -> ContainerView:
        """A container of this node, whatever is done to it. Raises ContainerNotFound, WrongNode."""
        view = await self.store.container(name)
        if view is None:
            raise ContainerNotFound(container=name)
        container = view.container
        if container.node != self.node:
            address = next((node.address for node in await self.store.nodes() if node.node == container.node), "")
            raise WrongNode(container=name, node=container.node, address=address)
        return view

    @property
    def watches_starts(self) -> bool:
        """Whether a process that replaces none is watched before its start is reported."""
        return self.start_watch_seconds > 0
