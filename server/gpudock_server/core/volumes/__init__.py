"""Volumes: what can be asked of them, and the saga behind each request.

`commands` names the requests. Each is drafted by the module of its name, which checks it, chooses what it is made of,
and says what it will do; the saga it builds does it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from gpudock_server.core.containers.mounts import all_containers, containers_mounting, volume_not_found
from gpudock_server.core.operations.commands import Commands
from gpudock_server.core.operations.engine import Operations, RequestKey
from gpudock_server.core.operations.saga import OperationDraft, Saga, SagaBuilder
from gpudock_server.core.volumes import adopt, create, delete, resize
from gpudock_server.core.volumes.adopt import AdoptSaga
from gpudock_server.core.volumes.commands import Adopt, Command, Create, Delete, Resize
from gpudock_server.core.volumes.create import CreateSaga, choose_backend
from gpudock_server.core.volumes.delete import DeleteSaga
from gpudock_server.core.volumes.storage import Storage
from gpudock_server.errors import GpudockError
from gpudock_server.model.operation import Operation, OperationKind
from gpudock_server.model.volume import Volume, VolumeRevision, VolumeState
from gpudock_server.ports import Page, VolumeDetails, VolumeView

__all__ = ["Storage", "Volumes", "choose_backend", "saga_builders"]

# What has not been measured by then is not told: a volume without a size is counted file by file.
_USAGE_TIMEOUT_SECONDS = 10.0
# Looks into volumes at one time; each is a child process for a moment.
_MAX_PARALLEL_USAGE_READS = 4


def saga_builders(storage: Storage) -> dict[OperationKind, SagaBuilder]:
    """Makes the saga of a recorded operation on a volume, by its kind."""
    sagas: dict[OperationKind, Callable[[Storage, Operation], Saga[Any]]] = {
        OperationKind.CREATE_VOLUME: CreateSaga,
        OperationKind.RESIZE_VOLUME: resize.build_resize_saga,
        OperationKind.DELETE_VOLUME: DeleteSaga,
        OperationKind.ADOPT_VOLUME: AdoptSaga,
    }
    return {kind: partial(saga, storage) for kind, saga in sagas.items()}


class Volumes(Commands):
    """Reads volumes, and begins operations on them."""

    def __init__(self, storage: Storage, operations: Operations) -> None:
        """`operations` must have been built with `saga_builders`."""
        super().__init__(operations, {command: partial(draft, storage) for command, draft in _DRAFTERS.items()})
        self._storage = storage
        self._store = storage.world.store
        self._usage_reads = asyncio.Semaphore(_MAX_PARALLEL_USAGE_READS)

    async def get(self, name: str) -> VolumeDetails:
        """A volume of any node. Raises VolumeNotFound."""
        view = await self._view(name)
        holders = await containers_mounting(self._store, name)
        names = tuple(holder.container.name for holder in holders)
        return VolumeDetails(view, names, await self._used_bytes(view.volume))

    async def _view(self, name: str) -> VolumeView:
        view = await self._store.volume(name)
        if view is None:
            raise await volume_not_found(self._storage.world, name)
        return view

    async def list(self, *, page_size: int, page_token: str) -> Page[VolumeDetails]:
        """Volumes of all nodes in the order of their names. Raises ResumeTokenExpired.

        What is in use is told of those that have a size: to count the files of all others would take too long.
        """
        page = await self._store.volumes(page_size=page_size, page_token=page_token)
        holders = await self._mounting_containers() if page.items else {}
        sized = [view.volume if view.volume.size_bytes else None for view in page.items]
        used = await asyncio.gather(*(self._used_bytes(volume) for volume in sized))
        seen = [
            VolumeDetails(view, tuple(holders.get(view.volume.name, ())), bytes_used)
            for view, bytes_used in zip(page.items, used, strict=True)
        ]
        return Page(tuple(seen), page.next_token, page.watch_token)

    async def _mounting_containers(self) -> Mapping[str, Sequence[str]]:
        found: defaultdict[str, deque[str]] = defaultdict(deque)
        for view in await all_containers(self._store):
            for volume in dict.fromkeys(mount.volume for mount in view.container.spec.mounts if mount.volume):
                found[volume].append(view.container.name)
        return found

    async def _used_bytes(self, volume: Volume | None) -> int | None:
        if volume is None or volume.backing is None or volume.state is not VolumeState.READY:
            return None
        if volume.node != self._storage.world.node:
            return None
        try:
            async with self._usage_reads, asyncio.timeout(_USAGE_TIMEOUT_SECONDS):
                return (await self._storage.backend(volume.backing.kind).usage(volume.backing)).used_bytes
        except (GpudockError, TimeoutError):
            return None

    async def revisions(self, name: str, *, page_size: int, page_token: str) -> Page[VolumeRevision]:
        """A volume's history, oldest first. Raises VolumeNotFound, ResumeTokenExpired."""
        volume = (await self._view(name)).volume
        return await self._store.volume_revisions(volume.uid, page_size=page_size, page_token=page_token)

    async def run(self, command: Command, request: RequestKey | None) -> VolumeDetails:
        """Begin an operation and wait for its end; the volume that it leaves."""
        result = await self._run(command, request)
        if not isinstance(result, Volume):
            raise TypeError(f"{type(command).__name__} leaves no volume")
        return VolumeDetails(VolumeView(result, 0, ""), ())


_DRAFTERS: dict[type, Callable[[Storage, Any], Awaitable[OperationDraft]]] = {
    Create: create.draft,
    Resize: resize.draft,
    Delete: delete.draft,
    Adopt: adopt.draft,
}
