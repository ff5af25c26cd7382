"""The life of an engine container, as the verbs by which everything else changes it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gpudock_server.core.containers.status import has_just_restarted, observed_status
from gpudock_server.core.operations.saga import StepResult
from gpudock_server.errors import EngineRejected, EngineUnavailable
from gpudock_server.model.container import Container, Placement
from gpudock_server.model.engine import (
    LABEL_NAME,
    LABEL_NODE,
    LABEL_OPERATION,
    LABEL_OWNER,
    LABEL_REVISION,
    LABEL_UID,
    EngineContainer,
    EngineContainerSpec,
    EngineState,
)
from gpudock_server.model.names import engine_container_name
from gpudock_server.model.operation import Operation
from gpudock_server.model.record import Record
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.ports import Engine, HostPaths

# What an engine that answers needs, after a grace period, to kill a process and report it.
_KILL_SECONDS = 5.0
_POLL_SECONDS = 0.05


class CreatedEngineContainer(Record):
    """The engine container that an operation created, its name, and the image that it was created from."""

    engine_id: str
    engine_name: str
    image_id: str


CREATED = StepResult("create", CreatedEngineContainer)


@dataclass(frozen=True, slots=True)
class EngineContainers:
    """Creates, starts, stops, freezes and removes the engine containers of a node.

    Nothing else creates, starts or removes one, so that its host paths are bound before, checked again, and released
    after. `stop_seconds` is how long a process whose spec does not say has from its stop signal to SIGKILL.
    `settle_seconds` is how long the process of a replacement must live before it counts as running;
    `start_watch_seconds` how long one that replaces none is watched before its start is reported, 0 for not at all.
    """

    engine: Engine
    host_paths: HostPaths
    stop_seconds: float
    settle_seconds: float
    start_watch_seconds: float = 0

    @property
    def watches_starts(self) -> bool:
        """Whether a process that replaces none is watched before its start is reported."""
        return self.start_watch_seconds > 0

    async def observe(self, container: Container, engine_id: str) -> Container:
        """The container with the status that the engine shows."""
        return container.changed(status=observed_status(container, await self.engine.inspect(engine_id)))

    async def create(
        self,
        operation: Operation,
        *,
        image_id: str,
        spec: ContainerSpec,
        placement: Placement,
        revision: int,
        owner: str,
        mounted: dict[str, str],
        anonymous: dict[str, str] | None = None,
    ) -> CreatedEngineContainer:
        """Create the engine container of an operation, its host paths bound.

        Its labels mark it as ours and, with its spec, make up its record. `mounted` and `anonymous` are `mounted` and
        `volumes` of EngineContainerSpec. Raises HostPathForbidden, HostPathFailed.
        """
        name = engine_container_name(operation.target.name, operation.id)
        labels = {
            LABEL_UID: operation.target.uid,
            LABEL_NAME: operation.target.name,
            LABEL_NODE: operation.node,
            LABEL_REVISION: str(revision),
            LABEL_OPERATION: operation.id,
            LABEL_OWNER: owner,
        }
        engine_id = await self.engine.create(
            EngineContainerSpec(
                name=name,
                image_id=image_id,
                spec=spec,
                placement=placement,
                hostname=spec.hostname or operation.target.name,
                labels=labels,
                volumes=anonymous or {},
                mounted=mounted,
                bound=await self.host_paths.bind(name, spec.host_paths),
            )
        )
        return CreatedEngineContainer(engine_id=engine_id, engine_name=name, image_id=image_id)

    async def start(self, engine_id: str, spec: ContainerSpec | None = None, *, renew: bool = True) -> None:
        """Start an engine container, whose host paths are resolved and bound again before.

        `spec` is what it was made from; None is what its labels say. With `renew` False what is bound stays as it is:
        the container is to run again as it did before. Raises HostPathForbidden, HostPathFailed.
        """
        if spec is None or spec.host_paths:
            seen = await self.engine.inspect(engine_id)
            if seen is not None:
                await self.rebind_host_paths(seen, renew=renew)
        await self.engine.start(engine_id)

    async def remove(self, engine_id: str, engine_name: str, *, own_volumes: bool = False) -> None:
        """Remove an engine container, killing what runs, and what was bound for it.

        `own_volumes`: with the anonymous volumes that the engine made with it; else its volumes stay.
        """
        await self.engine.remove(engine_id, own_volumes=own_volumes)
        await self.host_paths.release(engine_name)

    async def remove_created(self, operation: Operation) -> None:
        """Remove what an operation created, found by its name, and the anonymous volumes made with it.

        The engine removes both in one call: were it killed between two, nobody would know of the volumes any more.
        """
        name = engine_container_name(operation.target.name, operation.id)
        seen = await self.engine.inspect(name)
        if seen is None or seen.labels.get(LABEL_OPERATION) != operation.id:
            await self.host_paths.release(name)
            return
        await self.remove(seen.id, name, own_volumes=True)

    async def has_unbound_host_paths(self, container: Container) -> bool:
        """Whether the engine resolves host paths of this container itself: an older version made it."""
        if not container.spec.host_paths or container.engine is None:
            return False
        seen = await self.engine.inspect(container.engine.engine_id)
        return seen is not None and bool(self.unbound_host_paths(seen))

    def unbound_host_paths(self, seen: EngineContainer) -> tuple[str, ...]:
        """The host paths that an engine container mounts by their own names."""
        spec, name = seen.spec, seen.created_name
        if spec is None:
            return ()
        mounts = [mount for mount in spec.mounts if mount.host_path]
        return tuple(
            mount.host_path
            for mount in mounts
            if seen.binds.get(mount.target, "") != self.host_paths.source(name, mount.host_path)
        )

    async def rebind_host_paths(self, seen: EngineContainer, *, renew: bool) -> None:
        """Have the host paths of an engine container bound, or, of one that mounts them by their names, checked."""
        if seen.spec is None or not seen.spec.host_paths:
            return
        unbound = self.unbound_host_paths(seen)
        await self.host_paths.check(unbound)
        bound = [path for path in seen.spec.host_paths if path not in unbound]
        await self.host_paths.bind(seen.created_name, bound, renew=renew)

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

    async def wait_for_exit(self, engine_id: str, seconds: float) -> int | None:
        """The exit code of the process that was just started, if it ends within `seconds`; else None.

        One that its restart policy has started again by then has ended too; the engine shows with which exit code only
        until the next run begins, so that of one of the next runs is taken.
        """
        code = await self.engine.exited_within(engine_id, seconds)
        seen = await self.engine.inspect(engine_id)
        while seen is not None and has_just_restarted(seen):
            await asyncio.sleep(_POLL_SECONDS)
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

    async def thaw_if_frozen(self, engine_id: str) -> None:
        """Undo `freeze`. One that is gone or not frozen is left."""
        seen = await self.engine.inspect(engine_id)
        if seen is not None and seen.state is EngineState.PAUSED:
            await self.engine.unpause(engine_id)

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
