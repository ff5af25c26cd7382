"""Builds the use cases and the reconciler of a node from its ports. No other module of core imports this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.containers.history import History, HistoryDefaults
from gpudock_server.core.containers.images import ImagePolicy, Images
from gpudock_server.core.containers.mounts import Mounts
from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.core.containers.retention import Retention
from gpudock_server.core.containers.service import Containers, ContainerUseCases
from gpudock_server.core.operations.engine import Operations
from gpudock_server.core.placement.allocator import Allocator
from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.core.reconcile.drift import DriftTracker
from gpudock_server.core.reconcile.loop import Reconciler
from gpudock_server.core.volumes.adoption_rules import AdoptionRules
from gpudock_server.core.volumes.backends import VolumeBackends
from gpudock_server.core.volumes.engine_volumes import EngineVolumes
from gpudock_server.core.volumes.resource import VolumeResource
from gpudock_server.core.volumes.service import Volumes, VolumeUseCases
from gpudock_server.model.engine import HostCapacity, NodeLimits
from gpudock_server.model.volume import VolumeBackendKind
from gpudock_server.ports import (
    Engine,
    HostPaths,
    LayerStore,
    RevisionBackupStore,
    SnapshotStore,
    Store,
    VolumeBackend,
    VolumeCopier,
)


@dataclass(frozen=True, slots=True)
class Ports:
    """The adapters of a node. `backends` are in order of preference."""

    store: Store
    engine: Engine
    layers: LayerStore
    snapshots: SnapshotStore
    revision_backups: RevisionBackupStore
    host_paths: HostPaths
    backends: Sequence[VolumeBackend]
    copier: VolumeCopier


@dataclass(frozen=True, slots=True)
class NodePolicy:
    """The settings of a node that core uses.

    `stop_seconds`, `settle_seconds` and `start_watch_seconds` are described in EngineContainers, `pool_path`,
    `forced_backend` and `overcommit` in VolumeBackends.
    """

    node: str
    host: str
    stop_seconds: float
    settle_seconds: float
    pool_path: str
    start_watch_seconds: float = 0
    forced_backend: VolumeBackendKind | None = None
    overcommit: float = 1.0
    history: HistoryDefaults = field(default_factory=HistoryDefaults)
    adoption: AdoptionRules = field(default_factory=AdoptionRules)
    images: ImagePolicy = field(default_factory=ImagePolicy)
    limits: NodeLimits = field(default_factory=NodeLimits)


class NodeCore:
    """The use cases and services of one node."""

    def __init__(
        self, ports: Ports, policy: NodePolicy, allocator: Allocator, host: HostCapacity, *, recovering: bool = False
    ) -> None:
        """`recovering` is described in Operations."""
        store, engine, node = ports.store, ports.engine, policy.node
        self.ports = ports
        self._policy = policy
        self.claims = HostClaims(policy.host, node)
        self.container_resource = ContainerResource(store, node, engine)
        self.volume_resource = VolumeResource(store, node, engine, policy.adoption)
        self.engine_containers = EngineContainers(
            engine, ports.host_paths, policy.stop_seconds, policy.settle_seconds, policy.start_watch_seconds
        )
        self.engine_volumes = EngineVolumes(engine, node)
        self.backends = VolumeBackends(
            store, node, ports.backends, policy.pool_path, policy.forced_backend, policy.overcommit
        )
        self.images = Images(store, engine, ports.layers, node, policy.images)
        self.history = History(store, engine, ports.snapshots, ports.revision_backups, policy.history)
        self.container_use_cases = ContainerUseCases(
            engine=engine,
            layers=ports.layers,
            revision_files=ports.snapshots,
            revision_backups=ports.revision_backups,
            containers=self.container_resource,
            engine_containers=self.engine_containers,
            mounts=Mounts(self.volume_resource, self.engine_volumes, ports.host_paths),
            images=self.images,
            history=self.history,
            allocator=allocator,
            claims=self.claims,
            limits=policy.limits,
        )
        self.volume_use_cases = VolumeUseCases(
            store=store,
            engine=engine,
            volumes=self.volume_resource,
            engine_volumes=self.engine_volumes,
            backends=self.backends,
            copier=ports.copier,
            adoption=policy.adoption,
            processes=self.engine_containers,
            draft_unmount=self.container_use_cases.update.draft_unmount,
        )
        self.operations = Operations(
            store,
            node,
            [self.container_resource, self.volume_resource],
            self.container_use_cases.saga_builders | self.volume_use_cases.saga_builders,
            recovering=recovering,
        )
        self.containers = Containers(
            self.container_use_cases,
            self.operations,
            store=store,
            containers=self.container_resource,
            history=self.history,
            host=host,
        )
        self.volumes = Volumes(
            self.volume_use_cases, self.operations, store=store, volumes=self.volume_resource, backends=self.backends
        )

    def retention(self, interval: float) -> Retention:
        """The task that prunes history; `interval` is described in Retention."""
        return Retention(
            self.history,
            self.containers,
            store=self.ports.store,
            snapshots=self.ports.snapshots,
            revision_backups=self.ports.revision_backups,
            node=self._policy.node,
            interval=interval,
        )

    def reconciler(
        self, drift: DriftTracker, *, interval: float, orphan_grace: float, start_retry_delays: tuple[float, float]
    ) -> Reconciler:
        """The task that compares records with the engine; the settings are described in Reconciler."""
        return Reconciler(
            self.operations,
            drift,
            store=self.ports.store,
            engine=self.ports.engine,
            snapshots=self.ports.snapshots,
            revision_backups=self.ports.revision_backups,
            host_paths=self.ports.host_paths,
            engine_containers=self.engine_containers,
            images=self.images,
            history=self.history,
            claims=self.claims,
            limits=self._policy.limits,
            engine_volumes=self.engine_volumes,
            backends=self.backends,
            draft_start=self.container_use_cases.lifecycle.draft_start,
            draft_stop=self.container_use_cases.stop.draft_enforced,
            interval=interval,
            orphan_grace=orphan_grace,
            start_retry_delays=start_retry_delays,
        )
