"""What the tests of the store port share: reading a watch, and writing heads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from gpudock_server.model.store_changes import DeleteContainer, PutContainer, StoreChange
from gpudock_server.ports import ContainerView, Store, StoreEvent

from tests.engine.etcd_examples import container
from tests.rig.patience import limit

SOON = 10.0
"""Seconds within which a watch shows what has happened; a busy machine needs some of them."""

Forget = Callable[[], Awaitable[None]]
"""Makes a store forget its past: all tokens given out before have expired."""


class Reader:
    """Reads a watch. `told` gives each change as (before, after), each with its operation; checkpoints are left out."""

    def __init__(self, watch: AsyncGenerator[StoreEvent[ContainerView], None]) -> None:
        self.watch = watch
        self.token = ""

    async def seen(self) -> StoreEvent[ContainerView]:
        """The next event."""
        async with asyncio.timeout(limit(SOON)):
            seen = await anext(self.watch)
        self.token = seen.token
        return seen

    async def told(self, count: int) -> list[tuple[str, str]]:
        """The next changes of containers."""
        told: list[tuple[str, str]] = []
        while len(told) < count:
            seen = await self.seen()
            if seen.before or seen.after:
                told.append((text(seen.before), text(seen.after)))
        return told


def text(view: ContainerView | None) -> str:
    """A head and its lock: `NAME.GENERATION OPERATION`; empty for None."""
    if view is None:
        return ""
    return f"{view.container.name}.{view.container.generation} {view.operation_id}".strip()


@asynccontextmanager
async def watching(store: Store, token: str = "", *, listing: bool = True) -> AsyncIterator[Reader]:
    """A watch of containers, closed at the end."""
    async with aclosing(store.watch_containers(token=token, listing=listing)) as watch:
        yield Reader(watch)


async def put(store: Store, name: str, generation: int, *others: StoreChange, **fields: object) -> int:
    """Write a head unconditionally."""
    view = await store.container(name)
    head = container(name, generation=generation, **fields)
    return await store.apply([PutContainer(head, expect=view.version if view else 0), *others])


async def delete(store: Store, name: str, *others: StoreChange) -> int:
    """Delete a head, whatever version it has."""
    view = await store.container(name)
    assert view is not None
    return await store.apply([DeleteContainer(name, view.container.uid, view.version), *others])
