"""Volumes: what can be asked of them, and the saga behind each request.

`commands` names the requests. Each is drafted by the module of its name, which checks it, chooses what it is made of,
and says what it will do; the saga it builds does it.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from gpudock_server.core.containers.mounts import all_containers, containers_mounting, volume_not_found
from gpudock_server.core.operations.engine import Draft, Operations, RequestKey, planned_operation
from gpudock_server.core.operations.saga import Saga
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

__all__ = ["Storage", "Volumes", "build_saga", "choose_backend"]

# What has not been measured by then is not told: a volume without a size is counted file by file.
_USAGE_TIMEOUT_SECONDS = 10.0
# Looks into volumes at one time; each is a child process for a moment.
_MAX_PARALLEL_USAGE_READS = 4


def build_saga(storage: Storage, operation: Operation) -> Saga[Any]:
    """Makes the saga of a recorded operation on a volume."""
    match operation.kind:
        case OperationKind.CREATE_VOLUME:
            return CreateSaga(storage, operation)
        case OperationKind.RESIZE_VOLUME:
            return resize.build_resize_saga(storage, operation)
        case OperationKind.DELETE_VOLUME:
            return DeleteSaga(storage, operation)
        case OperationKind.ADOPT_VOLUME:
            return AdoptSaga(storage, operation)
        case kind:
            raise ValueError(f"{kind} is not done to volumes")


class Volumes:
    """Reads volumes, and begins operations on them."""

    def __init__(self, storage: Storage, operations: Operations) -> None:
        """`operations` must have been built with `saga_factory` (core/saga_factory.py)."""
        self._storage = storage
        self._store = storage.world.store
        self._operations = operations
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

    async def begin(self, command: Command, request: RequestKey | None) -> str:
        """Begin what is asked for; the id of its operation. Nothing has been done before this returns."""
        return await self._operations.begin(lambda: self._draft(command), request)

    async def run(self, command: Command, request: RequestKey | None) -> VolumeDetails:
        """Begin what is asked for and wait for its end, which it reaches even when the caller does not."""
        operation_id = await self.begin(command, request)
        left = await self._operations.result(operation_id)
        if not isinstance(left, Volume):
            raise TypeError(f"{command} left {left}")
        return VolumeDetails(VolumeView(left, 0, ""), ())

    async def run_to_end(self, command: Command, request: RequestKey | None) -> None:
        """`run` for what leaves nothing: a deletion."""
        await self._operations.done(await self.begin(command, request))

    async def preview(self, command: Command) -> Operation:
        """What `begin` would do, with nothing done: an operation that is PLANNED and has no id."""
        return planned_operation(await self._draft(command), self._storage.world.node)

    async def _draft(self, command: Command) -> Draft:
        return await _DRAFTERS[type(command)](self._storage, command)


_DRAFTERS: dict[type, Callable[[Storage, Any], Awaitable[Draft]]] = {
    Create: create.draft,
    Resize: resize.draft,
    Delete: delete.draft,
    Adopt: adopt.draft,
}
