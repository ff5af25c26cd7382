"""Complete listings of the store, each as of one store revision, and lookups that read them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol, TypeVar

from gpudock_server.errors import ResumeTokenExpired, StoreUnavailable
from gpudock_server.model.volume import Volume
from gpudock_server.ports import ContainerView, Page, Store

T = TypeVar("T")

_PAGE_SIZE = 500
# Compactions during one listing: more than this many in a row are no coincidence.
_MAX_READS = 10


class StoreListing(Protocol[T]):
    """A paged listing of the store."""

    async def __call__(self, *, page_size: int, page_token: str) -> Page[T]:
        """A page of the listing."""
        ...


async def read_all_pages(listing: StoreListing[T]) -> Page[T]:
    """The complete listing as one page, as of one store revision.

    Where etcd is compacted between two pages, it no longer has the revision of the first page: the listing is then read
    again from its beginning. Raises StoreUnavailable.
    """
    for _ in range(_MAX_READS):
        try:
            pages = [page async for page in _pages(listing)]
        except ResumeTokenExpired:
            continue
        return Page(
            items=tuple(item for page in pages for item in page.items),
            next_token="",
            unreadable=tuple(key for page in pages for key in page.unreadable),
        )
    raise StoreUnavailable(detail=f"the store was compacted during {_MAX_READS} reads of one listing")


async def _pages(listing: StoreListing[T]) -> AsyncIterator[Page[T]]:
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
    """The containers whose specs mount a volume, by its name. The specs alone decide what is attached."""
    return tuple(view for view in await all_containers(store) if mounts_volume(view, volume))


def mounts_volume(view: ContainerView, volume: str) -> bool:
    """Whether a container's spec mounts a volume."""
    return any(mount.volume == volume for mount in view.container.spec.mounts)


async def node_address(store: Store, node: str) -> str:
    """The address of a node's daemon; empty where no daemon of the node is alive."""
    return next((heartbeat.address for heartbeat in await store.nodes() if heartbeat.node == node), "")
