"""The lifecycle of an engine container: create, start, stop, freeze, thaw and remove."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from gpudock_server.core.containers.status import has_just_restarted, observed_status
from gpudock_server.core.operations.saga import StepResult
from gpudock_server.errors import EngineRejected, EngineUnavailable, SnapshotFailed
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

# Seconds that the engine needs after the grace period to kill a process and report its end.
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

    No other code creates, starts or removes one, so that host paths are always bound before, checked again at a start,
    and released after. `stop_seconds`: seconds from stop signal to SIGKILL where the spec sets none. `settle_seconds`:
    seconds that the process of a successor must run to count as running. `start_watch_seconds`: seconds that any other
    process is watched before its start is reported; 0 for not at all.
    """

    engine: Engine
    host_paths: HostPaths
    stop_seconds: float
    settle_seconds: float
    start_watch_seconds: float = 0

    @property
    def watches_starts(self) -> bool:
        """Whether a process is watched before its start is reported, if it is not that of a successor."""
        return self.start_watch_seconds > 0

    async def observe(self, container: Container, engine_id: str) -> Container:
        """The container with the status that the engine reports."""
        return container.changed(status=observed_status(container, await self.engine.inspect(engine_id)))

    async def inspect_for_copy(self, engine_id: str) -> EngineContainer:
        """An engine container whose files are copied. Raises SnapshotFailed if it was removed."""
        engine_container = await self.engine.inspect(engine_id)
        if engine_container is None:
            raise SnapshotFailed(detail=f"engine container {engine_id[:12]} was removed during the operation")
        return engine_container

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
        """Create the engine container of an operation, with its host paths bound.

        The labels mark it as gpudock's; reconcile restores a lost record from them. `mounted` and `anonymous` are
        `mounted` and `volumes` of EngineContainerSpec. Raises HostPathForbidden, HostPathFailed.
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
        """Resolve and bind the host paths of an engine container again, then start it.

        `spec`: its spec; None reads it from the labels. `renew` False keeps the bound host paths, so that the container
        runs as before. Raises HostPathForbidden, HostPathFailed.
        """
        if spec is None or spec.host_paths:
            engine_container = await self.engine.inspect(engine_id)
            if engine_container is not None:
                await self.rebind_host_paths(engine_container, renew=renew)
        await self.engine.start(engine_id)

    async def remove(self, engine_id: str, engine_name: str, *, own_volumes: bool = False) -> None:
        """Kill and remove an engine container, and release its host paths.

        `own_volumes`: also remove the anonymous volumes that the engine created with it; otherwise volumes stay.
        """
        await self.engine.remove(engine_id, own_volumes=own_volumes)
        await self.host_paths.release(engine_name)

    async def remove_created(self, operation: Operation) -> None:
        """Remove the engine container that an operation created, found by name, with its anonymous volumes.

        The engine removes both in one call: between two calls, a crash would lose track of the volumes.
        """
        name = engine_container_name(operation.target.name, operation.id)
        engine_container = await self.engine.inspect(name)
        if engine_container is None or engine_container.labels.get(LABEL_OPERATION) != operation.id:
            await self.host_paths.release(name)
            return
        await self.remove(engine_container.id, name, own_volumes=True)

    async def has_unbound_host_paths(self, container: Container) -> bool:
        """Whether the engine itself resolves host paths of this container, which an older version created."""
        if not container.spec.host_paths or container.engine is None:
            return False
        engine_container = await self.engine.inspect(container.engine.engine_id)
        return engine_container is not None and bool(self.unbound_host_paths(engine_container))

    def unbound_host_paths(self, engine_container: EngineContainer) -> tuple[str, ...]:
        """The host paths that an engine container mounts directly instead of by a bound path."""
        spec, name = engine_container.spec, engine_container.created_name
        if spec is None:
            return ()
        mounts = [mount for mount in spec.mounts if mount.host_path]
        return tuple(
            mount.host_path
            for mount in mounts
            if engine_container.binds.get(mount.target, "") != self.host_paths.source(name, mount.host_path)
        )

    async def rebind_host_paths(self, engine_container: EngineContainer, *, renew: bool) -> None:
        """Bind the host paths of an engine container again; only check those that it mounts directly."""
        if engine_container.spec is None or not engine_container.spec.host_paths:
            return
        unbound = self.unbound_host_paths(engine_container)
        await self.host_paths.check(unbound)
        bound = [path for path in engine_container.spec.host_paths if path not in unbound]
        await self.host_paths.bind(engine_container.created_name, bound, renew=renew)

    async def stop(self, engine_id: str, spec: ContainerSpec, timeout: float | None, *, frozen: bool) -> None:
        """Stop an engine container. SIGKILL follows after `timeout` seconds, else the spec's, else the daemon's.

        A cancelled call still waits until the container stopped: the engine continues to stop it, and would kill the
        process of an earlier start.
        """
        if frozen:
            await self._thaw(engine_id)
        of_spec = None if spec.stop_timeout is None else spec.stop_timeout.total_seconds()
        grace = next(seconds for seconds in (timeout, of_spec, self.stop_seconds) if seconds is not None)
        stopping = asyncio.ensure_future(self._stopped(engine_id, grace))
        try:
            await asyncio.shield(stopping)
        except asyncio.CancelledError:
            # The result is read so that asyncio does not log it; the next start inspects the container itself.
            stopping.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            try:
                await asyncio.wait((stopping,), timeout=grace + _KILL_SECONDS)
            finally:
                stopping.cancel()
            raise

    async def wait_for_exit(self, engine_id: str, seconds: float) -> int | None:
        """The exit code of the process that was just started, if it exits within `seconds`; else None.

        A process that the restart policy started again has exited too. The engine shows its exit code only until the
        next run begins, so the exit code of one of the next runs is returned.
        """
        code = await self.engine.exited_within(engine_id, seconds)
        engine_container = await self.engine.inspect(engine_id)
        while engine_container is not None and has_just_restarted(engine_container):
            await asyncio.sleep(_POLL_SECONDS)
            engine_container = await self.engine.inspect(engine_id)
        return (
            engine_container.exit_code
            if engine_container is not None and engine_container.state is EngineState.RESTARTING
            else code
        )

    async def freeze(self, engine_id: str) -> None:
        """Freeze every process of an engine container; does nothing if it does not run or is between restarts."""
        engine_container = await self.engine.inspect(engine_id)
        if engine_container is None or engine_container.state is not EngineState.RUNNING:
            return
        try:
            await self.engine.pause(engine_id)
        except EngineRejected:
            # The process may have exited since.
            engine_container = await self.engine.inspect(engine_id)
            if engine_container is None or engine_container.state is EngineState.RUNNING:
                raise

    async def thaw_if_frozen(self, engine_id: str) -> None:
        """Undo `freeze`; does nothing if the engine container is not frozen or was removed."""
        engine_container = await self.engine.inspect(engine_id)
        if engine_container is not None and engine_container.state is EngineState.PAUSED:
            await self.engine.unpause(engine_id)

    async def _thaw(self, engine_id: str) -> None:
        try:
            await self.engine.unpause(engine_id)
        except EngineRejected:
            # An earlier attempt, before the daemon was killed, may have stopped the container already.
            engine_container = await self.engine.inspect(engine_id)
            if engine_container is None or engine_container.running:
                raise

    async def _stopped(self, engine_id: str, grace: float) -> None:
        try:
            await self.engine.stop(engine_id, grace)
        except EngineUnavailable:
            # The engine may still be stopping the container, and would kill the process of a start before that.
            if await self.engine.exited_within(engine_id, grace + _KILL_SECONDS) is None:
                raise
