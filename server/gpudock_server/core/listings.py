"""Whole listings of the store, each as of one moment, and what use cases of several resources read from them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol, TypeVar

from gpudock_server.errors import ResumeTokenExpired, StoreUnavailable
from gpudock_server.model.volume import Volume
from gpudock_server.ports import ContainerView, Page, Store

T = TypeVar("T")

_PAGE_SIZE = 500
# Somebody who compacts the store more often than this within one reading does nothing else.
_MAX_READS = 10


class ListRequest(Protocol[T]):
    """One of the store's listings."""

    async def __call__(self, *, page_size: int, page_token: str) -> Page[T]:
        """A page of it."""
        ...


async def read_all_pages(listing: ListRequest[T]) -> Page[T]:
    """The whole listing as one page.

    etcd may be compacted between two pages, and then no longer has the moment of the first: the listing is read again
    from its beginning. Raises StoreUnavailable.
    """
    for _ in range(_MAX_READS):
        try:
            pages = [page async for page in _pages(listing)]
        except ResumeTokenExpired:
            continue
        return Page(
            items=tuple(item for page in pages for item in page.items),
            next_token="",
            unreadable=tuple(one for page in pages for one in page.unreadable),
        )
    raise StoreUnavailable(detail=f"it was compacted {_MAX_READS} times in a row while a listing was read")


async def _pages(listing: ListRequest[T]) -> AsyncIterator[Page[T]]:
    token = ""
    while True:
        page = await listing(page_size=_PAGE_SIZE, page_token=token)
        yield page
        token = page.next_token
        if not token:
            return


async def all_containers(store: Store) -> tuple[ContainerView, ...]:
    """Every container of every node."""
    return (await read_all_pages(store.containers)).items


async def all_volumes(store: Store) -> tuple[Volume, ...]:
    """Every volume of every node."""
    return tuple(view.volume for view in (await read_all_pages(store.volumes)).items)


async def containers_mounting(store: Store, volume: str) -> tuple[ContainerView, ...]:
    """The containers whose specs mount a volume, by name: the one truth of what is attached."""
    return tuple(view for view in await all_containers(store) if mounts_volume(view, volume))


def mounts_volume(view: ContainerView, volume: str) -> bool:
    """Whether a container's spec mounts a volume."""
    return any(mount.volume == volume for mount in view.container.spec.mounts)


async def node_address(store: Store, node: str) -> str:
    """The address of a node's daemon; empty where none is alive."""
    return next((one.address for one in await store.nodes() if one.node == node), "")
