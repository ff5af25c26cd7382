"""Keeps records and the engine in agreement: by the engine's events, and by a full pass now and then.

What the engine shows becomes status. What is ours by its labels and known to nobody is removed after a grace. What a
container holds is given back when the container is gone. An engine or a store that does not answer changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import structlog

from gpudock_server.core.containers.leftovers import sweep_images
from gpudock_server.core.containers.observation import observed
from gpudock_server.core.containers.world import World
from gpudock_server.core.operations import Operations
from gpudock_server.errors import EngineUnavailable, GpudockError
from gpudock_server.model.changes import Change, PutContainer, Release
from gpudock_server.model.claims import ClaimTable, keys_of
from gpudock_server.model.container import Container, ContainerState, Placement
from gpudock_server.model.engine import LABEL_NAME, LABEL_NODE, LABEL_OPERATION, LABEL_UID, EngineContainer
from gpudock_server.model.record import now
from gpudock_server.ports import ContainerView, StoreConflict

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

_PAGE = 500
_RECONNECT_SECONDS = 1.0
# A status that loses its race this often is left to the next event or pass.
_TRIES = 5


class Reconciler:
    """Watches the engine of this node."""

    def __init__(self, world: World, operations: Operations, *, interval: float, orphan_grace: float) -> None:
        """Seconds between full passes, and seconds that something unknown is left alone."""
        self._world = world
        self._operations = operations
        self._interval = interval
        self._orphan_grace = orphan_grace
        self._strays: dict[str, float] = {}
        # Events before this moment are in what a full pass has seen.
        self._since = time.time_ns()

    async def run(self) -> None:
        """Follow the engine's events for ever; a full pass whenever some may have been missed."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            tasks.create_task(self._pass_regularly())

    async def _follow(self) -> None:
        while True:
            try:
                async for event in self._world.engine.events(self._since):
                    self._since = event.time_nanos + 1
                    await self._attempt_refresh(event.labels.get(LABEL_NAME, ""), event.labels.get(LABEL_UID, ""))
            except EngineUnavailable as error:
                log.warning("the engine's events broke off", detail=error.message)
            # An engine that was restarted has forgotten its events. Until a pass has seen all that it has, nothing that
            # its stream tells later is enough.
            seen = False
            while not seen:
                await asyncio.sleep(_RECONNECT_SECONDS)
                seen = await self._attempt_pass()

    async def _pass_regularly(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._attempt_pass()

    async def _attempt_refresh(self, name: str, uid: str) -> None:
        try:
            view = await self._world.store.container(name)
            if view is not None and view.container.uid == uid:
                await self._refresh(view)
        except GpudockError as error:
            log.warning("a status was not refreshed", container=name, detail=error.message)

    async def _attempt_pass(self) -> bool:
        try:
            await self.full_pass()
        except GpudockError as error:
            log.warning("reconcile pass broken off; nothing was guessed", detail=error.message)
            return False
        return True

    async def full_pass(self) -> None:
        """Compare everything once. Raises EngineUnavailable, StoreUnavailable."""
        # The order matters. Whatever is older than the records that are read last is in them, or is nobody's.
        seen = {one.id: one for one in await self._world.engine.find({LABEL_NODE: self._world.node})}
        claims = await self._world.store.claims(self._world.host)
        await self._operations.resume()
        unfinished = {stored.value.id for stored in await self._world.store.unfinished(self._world.node)}
        views = await self._views()
        for view in views:
            await self._refresh(view, seen)
        await self._release_ownerless(claims, {view.container.uid for view in views})
        known = {view.container.engine.engine_id for view in views if view.container.engine is not None}
        await self._remove_strays(seen, known, unfinished)
        await sweep_images(self._world)

    async def _views(self) -> list[ContainerView]:
        views: list[ContainerView] = []
        token = ""
        while True:
            page = await self._world.store.containers(page_size=_PAGE, page_token=token)
            views += [view for view in page.items if view.container.node == self._world.node]
            token = page.next_token
            if not token:
                return views

    async def _refresh(self, view: ContainerView, seen: Mapping[str, EngineContainer] | None = None) -> None:
        """Make one status what the engine shows. A container with an operation at work is that operation's."""
        for _ in range(_TRIES):
            container = view.container
            if view.operation_id or container.engine is None or container.node != self._world.node:
                return
            shown = (seen or {}).get(container.engine.engine_id)
            if shown is None:
                shown = await self._world.engine.inspect(container.engine.engine_id)
            status = observed(container, shown)
            if status == container.status:
                return
            try:
                await self._world.store.apply(self._observation(container, container.changed(status=status), view))
            except StoreConflict:
                again = await self._world.store.container(container.name)
                if again is None or again.container.uid != container.uid:
                    return
                view, seen = again, None
            else:
                return

    def _observation(self, before: Container, after: Container, view: ContainerView) -> list[Change]:
        after = after.changed(update_time=now())
        if after.status.state is not ContainerState.FAILED:
            return [PutContainer(after, expect=view.version)]
        log.warning("a container's engine container is gone", container=before.name)
        released = after.with_status(placement=Placement(), holds_resources=False)
        return [
            PutContainer(released, expect=view.version),
            *(Release(self._world.host, key, before.uid) for key in keys_of(before.status.placement)),
        ]

    async def _release_ownerless(self, claims: ClaimTable, uids: set[str]) -> None:
        ownerless: list[Change] = [
            Release(self._world.host, key, holder.uid)
            for key, holder in claims.claims.items()
            if holder.node == self._world.node and holder.uid not in uids
        ]
        for change in ownerless:
            log.warning("a claim has no container and is released", claim=str(change))
            await self._world.store.apply([change])

    def _made(self, one: EngineContainer) -> bool:
        """Whether one of our operations made it.

        Labels alone do not prove that: whoever commits a container of ours and runs the image has them too, but not the
        name that goes with them.
        """
        return one.name == self._world.engine_name(one.labels.get(LABEL_NAME, ""), one.labels.get(LABEL_OPERATION, ""))

    async def _remove_strays(self, seen: Mapping[str, EngineContainer], known: set[str], unfinished: set[str]) -> None:
        strays = {
            one.id: one
            for one in seen.values()
            if one.id not in known and one.labels.get(LABEL_OPERATION, "") not in unfinished and self._made(one)
        }
        moment = time.monotonic()
        self._strays = {engine_id: self._strays.get(engine_id, moment) for engine_id in strays}
        for engine_id, first_seen in list(self._strays.items()):
            if moment - first_seen >= self._orphan_grace:
                log.warning("an engine container that nobody knows is removed", engine_name=strays[engine_id].name)
                await self._world.engine.remove(engine_id)
                del self._strays[engine_id]
