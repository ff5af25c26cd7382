"""Helpers for tests of the store port: reading a watch, and writing records of containers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from gpudock_server.model.store_changes import DeleteContainer, PutContainer, StoreChange
from gpudock_server.ports import ContainerView, Store, StoreEvent

from tests.engine.etcd_examples import container
from tests.rig.patience import limit

SOON = 10.0
"""The limit in seconds until a watch sends a change, on an idle machine."""

Forget = Callable[[], Awaitable[None]]
"""Discards the history of a store, so that all earlier tokens have expired."""


class Reader:
    """Reads a watch."""

    def __init__(self, watch: AsyncGenerator[StoreEvent[ContainerView], None]) -> None:
        self.watch = watch
        self.token = ""

    async def next_event(self) -> StoreEvent[ContainerView]:
        """The next event."""
        async with asyncio.timeout(limit(SOON)):
            event = await anext(self.watch)
        self.token = event.token
        return event

    async def next_changes(self, count: int) -> list[tuple[str, str]]:
        """The next changes of containers as (before, after), each as `text` returns it; checkpoints are skipped."""
        changes: list[tuple[str, str]] = []
        while len(changes) < count:
            event = await self.next_event()
            if event.before or event.after:
                changes.append((text(event.before), text(event.after)))
        return changes


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
    """Delete a head of any version."""
    view = await store.container(name)
    assert view is not None
    return await store.apply([DeleteContainer(name, view.container.uid, view.version), *others])
