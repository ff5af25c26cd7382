"""What the use cases reach: the ports, and where this daemon is."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from gpudock_server.core.adoption_rules import AdoptionRules
from gpudock_server.core.containers.images import ImagePolicy
from gpudock_server.core.containers.status import has_just_restarted, observed_status
from gpudock_server.core.placement.allocator import Allocator
from gpudock_server.errors import (
    ContainerBusy,
    ContainerNotFound,
    EngineRejected,
    EngineUnavailable,
    StaleEtag,
    WrongNode,
)
from gpudock_server.model.claims import Holder
from gpudock_server.model.container import Container, ContainerState
from gpudock_server.model.engine import (
    LABEL_NAME,
    LABEL_OPERATION,
    EngineContainer,
    EngineContainerSpec,
    EngineState,
    HostCapacity,
    NodeLimits,
)
from gpudock_server.model.spec import ContainerSpec, SnapshotPolicy
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


# What an engine that answers needs, after a grace period, to kill a process and say so.
_KILL_SECONDS = 5.0
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class World:
    """Handed to every use case and every saga.

    `settle_seconds` is how long the process of a replacement must live before it counts as running;
    `start_watch_seconds` how long one that replaces none is watched before its start is reported, 0 for not at all;
    `stop_seconds` how long a container that does not say has from its stop signal to SIGKILL.
    Engine containers are created, started and removed through here and never by the engine alone, so that their host
    paths are bound before, checked again, and released after.
    """

    store: Store
    engine: Engine
    layers: LayerStore
    snapshots: SnapshotStore
    host_paths: HostPaths
    ledger: RevisionBackupStore
    allocator: Allocator
    node: str
    host: str
    settle_seconds: float
    stop_seconds: float
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

    def holder(self, container: Container) -> Holder:
        """What a settled claim of `container` says."""
        return Holder(container=container.name, uid=container.uid, node=self.node)

    def engine_name(self, container: str, operation_id: str) -> str:
        """The engine's name for what an operation makes: unique to it, so that making it twice is making it once."""
        return f"gpudock-{container}-{operation_id[-8:]}"

    async def create(self, engine_spec: EngineContainerSpec) -> str:
        """Create an engine container, its host paths bound; its engine id. Raises HostPathForbidden, HostPathFailed."""
        bound = await self.host_paths.bind(engine_spec.name, engine_spec.spec.host_paths)
        return await self.engine.create(replace(engine_spec, bound=bound))

    async def start(self, engine_id: str, spec: ContainerSpec | None = None, *, renew: bool = True) -> None:
        """Start an engine container, whose host paths are resolved and bound again before.

        `spec` is what it was made from; None is what its labels say. With `renew` False what is bound stays as it is:
        the container is to run again as it did before. Raises HostPathForbidden, HostPathFailed.
        """
        if spec is None or spec.host_paths:
            seen = await self.engine.inspect(engine_id)
            if seen is not None:
                await self.bind_again(seen, renew=renew)
        await self.engine.start(engine_id)

    async def remove(self, engine_id: str, engine_name: str, *, own_volumes: bool = False) -> None:
        """Remove an engine container, killing what runs, and what was bound for it.

        `own_volumes`: with the anonymous volumes that the engine made with it; else its volumes stay.
        """
        await self.engine.remove(engine_id, own_volumes=own_volumes)
        await self.host_paths.release(engine_name)

    async def mounts_unbound(self, container: Container) -> bool:
        """Whether the engine resolves host paths of this container itself: an older version made it."""
        if not container.spec.host_paths or container.engine is None:
            return False
        seen = await self.engine.inspect(container.engine.engine_id)
        return seen is not None and bool(self.unbound_paths(seen))

    def unbound_paths(self, seen: EngineContainer) -> tuple[str, ...]:
        """The host paths that an engine container mounts by their own names."""
        spec, name = seen.spec, self.made_as(seen)
        if spec is None:
            return ()
        mounts = [mount for mount in spec.mounts if mount.host_path]
        return tuple(
            mount.host_path
            for mount in mounts
            if seen.binds.get(mount.target, "") != self.host_paths.source(name, mount.host_path)
        )

    async def bind_again(self, seen: EngineContainer, *, renew: bool) -> None:
        """Have the host paths of an engine container bound, or, of one that mounts them by their names, checked."""
        if seen.spec is None or not seen.spec.host_paths:
            return
        unbound = self.unbound_paths(seen)
        await self.host_paths.check(unbound)
        bound = [path for path in seen.spec.host_paths if path not in unbound]
        await self.host_paths.bind(self.made_as(seen), bound, renew=renew)

    def made_as(self, seen: EngineContainer) -> str:
        """The name that an engine container was made with; somebody may have given it another one."""
        return self.engine_name(seen.labels.get(LABEL_NAME, ""), seen.labels.get(LABEL_OPERATION, ""))

    async def stop(self, engine_id: str, spec: ContainerSpec, asked_seconds: float | None, *, frozen: bool) -> None:
        """Stop an engine container within what was asked for, else what its spec says, else this daemon's default.

        Cancelled, it still waits for the end: the engine stops it all the same, and whoever starts it again before that
        would see it killed a moment later.
        """
        if frozen:
            await self._thaw(engine_id)
        own = None if spec.stop_timeout is None else spec.stop_timeout.total_seconds()
        timeouts = (seconds for seconds in (asked_seconds, own, self.stop_seconds) if seconds is not None)
        grace = next(timeouts)
        stopping = asyncio.ensure_future(self._stopped(engine_id, grace))
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            # How it ended is for who starts it again to find.
            stopping.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            try:
                await asyncio.wait((stopping,), timeout=grace + _KILL_SECONDS)
            finally:
                stopping.cancel()
            raise

    @property
    def watches_starts(self) -> bool:
        """Whether a process that replaces none is watched before its start is reported."""
        return self.start_watch_seconds > 0

    async def end_of_start(self, engine_id: str, seconds: float) -> int | None:
        """The exit code of the process that was just started, if it ends within `seconds`; else None.

        One that its restart policy has started again by then has ended too; the engine shows with which exit code only
        until the next run begins, so that of one of the next runs is taken.
        """
        code = await self.engine.exited_within(engine_id, seconds)
        seen = await self.engine.inspect(engine_id)
        while seen is not None and has_just_restarted(seen):
            await asyncio.sleep(_LOOK_SECONDS)
            seen = await self.engine.inspect(engine_id)
        return seen.exit_code if seen is not None and seen.state is EngineState.RESTARTING else code

    async def freeze(self, engine_id: str) -> None:
        """Freeze every process of an engine container. One that runs none, now or between two restarts, is left."""
        seen = await self.engine.inspect(engine_id)
        if seen is None or seen.state is not EngineState.RUNNING:
            return
        try:
            await self.engine.pause(engine_id)
        except EngineRejected:
            # Its process may have ended since.
            seen = await self.engine.inspect(engine_id)
            if seen is None or seen.state is EngineState.RUNNING:
                raise

    async def _thaw(self, engine_id: str) -> None:
        try:
            await self.engine.unpause(engine_id)
        except EngineRejected:
            # A daemon that was killed may have come as far as its end, where there is nothing to thaw.
            seen = await self.engine.inspect(engine_id)
            if seen is None or seen.running:
                raise

    async def _stopped(self, engine_id: str, grace: float) -> None:
        try:
            await self.engine.stop(engine_id, grace)
        except EngineUnavailable:
            # It may be stopping it all the same. Whoever started it again now would be told that it runs, and would see
            # it killed a moment later.
            if await self.engine.exited_within(engine_id, grace + _KILL_SECONDS) is None:
                raise
