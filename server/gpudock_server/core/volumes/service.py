"""Reads volumes and begins operations on them.

`commands` has one command for each operation. The module of the same name checks the command and drafts the operation,
whose saga then carries it out.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from functools import partial

from gpudock_server.core.listings import all_containers, containers_mounting
from gpudock_server.core.operations.commands import Commands, Drafter
from gpudock_server.core.operations.engine import Operations, RequestKey
from gpudock_server.core.operations.saga import SagaBuilder
from gpudock_server.core.volumes.adopt import AdoptSaga, AdoptVolume
from gpudock_server.core.volumes.adoption_rules import AdoptionRules
from gpudock_server.core.volumes.backends import VolumeBackends
from gpudock_server.core.volumes.commands import Adopt, Command, Create, Delete, Resize
from gpudock_server.core.volumes.create import CreateSaga, CreateVolume
from gpudock_server.core.volumes.delete import DeleteSaga, DeleteVolume, DraftUnmount
from gpudock_server.core.volumes.engine_volumes import EngineVolumes
from gpudock_server.core.volumes.resize import ContainerProcesses, ResizeVolume
from gpudock_server.core.volumes.resource import VolumeResource
from gpudock_server.errors import GpudockError
from gpudock_server.model.operation import OperationKind
from gpudock_server.model.volume import Volume, VolumeRevision, VolumeState
from gpudock_server.ports import Engine, Page, Store, VolumeCopier, VolumeDetails, VolumeView

# Without a size, usage is counted file by file; after this timeout it is reported as unknown.
_USAGE_TIMEOUT_SECONDS = 10.0
# Each read of usage is a short child process.
_MAX_PARALLEL_USAGE_READS = 4


class VolumeUseCases:
    """The use cases of volumes: each drafts an operation, which a saga carries out."""

    def __init__(
        self,
        *,
        store: Store,
        engine: Engine,
        volumes: VolumeResource,
        engine_volumes: EngineVolumes,
        backends: VolumeBackends,
        copier: VolumeCopier,
        adoption: AdoptionRules,
        processes: ContainerProcesses,
        draft_unmount: DraftUnmount,
    ) -> None:
        """Give each use case the ports and services that it uses."""
        self._create = CreateVolume(store, engine, volumes, engine_volumes, backends)
        self._resize = ResizeVolume(store, engine, volumes, backends, copier, processes)
        self._delete = DeleteVolume(store, engine, volumes, backends, draft_unmount)
        self._adopt = AdoptVolume(store, engine, volumes, engine_volumes, backends, copier, adoption)

    @property
    def saga_builders(self) -> dict[OperationKind, SagaBuilder]:
        """Builders of the sagas of recorded operations, by kind."""
        return {
            OperationKind.CREATE_VOLUME: partial(CreateSaga, self._create),
            OperationKind.RESIZE_VOLUME: self._resize.saga,
            OperationKind.DELETE_VOLUME: partial(DeleteSaga, self._delete),
            OperationKind.ADOPT_VOLUME: partial(AdoptSaga, self._adopt),
        }

    @property
    def drafters(self) -> dict[type, Drafter]:
        """Drafters of operations, by type of command."""
        return {
            Create: self._create.draft,
            Resize: self._resize.draft,
            Delete: self._delete.draft,
            Adopt: self._adopt.draft,
        }


class Volumes(Commands):
    """Reads volumes, and begins operations on them."""

    def __init__(
        self,
        use_cases: VolumeUseCases,
        operations: Operations,
        *,
        store: Store,
        volumes: VolumeResource,
        backends: VolumeBackends,
    ) -> None:
        """`operations` must have been built with the saga builders of `use_cases`."""
        super().__init__(operations, use_cases.drafters)
        self._store = store
        self._volumes = volumes
        self._backends = backends
        self._usage_reads = asyncio.Semaphore(_MAX_PARALLEL_USAGE_READS)

    async def get(self, name: str) -> VolumeDetails:
        """A volume of any node. Raises VolumeNotFound."""
        view = await self._volumes.get(name)
        holders = await containers_mounting(self._store, name)
        names = tuple(holder.container.name for holder in holders)
        return VolumeDetails(view, names, await self._used_bytes(view.volume))

    async def list(self, *, page_size: int, page_token: str) -> Page[VolumeDetails]:
        """List the volumes of all nodes by name. Raises ResumeTokenExpired.

        Usage is read only for volumes with a size: counting the files of the others would take too long.
        """
        page = await self._store.volumes(page_size=page_size, page_token=page_token)
        holders = await self._mounting_containers() if page.items else {}
        sized = [view.volume if view.volume.size_bytes else None for view in page.items]
        used = await asyncio.gather(*(self._used_bytes(volume) for volume in sized))
        details = [
            VolumeDetails(view, tuple(holders.get(view.volume.name, ())), bytes_used)
            for view, bytes_used in zip(page.items, used, strict=True)
        ]
        return Page(tuple(details), page.next_token, page.watch_token)

    async def _mounting_containers(self) -> Mapping[str, Sequence[str]]:
        found: defaultdict[str, deque[str]] = defaultdict(deque)
        for view in await all_containers(self._store):
            for volume in dict.fromkeys(mount.volume for mount in view.container.spec.mounts if mount.volume):
                found[volume].append(view.container.name)
        return found

    async def _used_bytes(self, volume: Volume | None) -> int | None:
        if volume is None or volume.backing is None or volume.state is not VolumeState.READY:
            return None
        if volume.node != self._volumes.node:
            return None
        try:
            async with self._usage_reads, asyncio.timeout(_USAGE_TIMEOUT_SECONDS):
                return (await self._backends.of_kind(volume.backing.kind).usage(volume.backing)).used_bytes
        except (GpudockError, TimeoutError):
            return None

    async def revisions(self, name: str, *, page_size: int, page_token: str) -> Page[VolumeRevision]:
        """A volume's history, oldest first. Raises VolumeNotFound, ResumeTokenExpired."""
        volume = (await self._volumes.get(name)).volume
        return await self._store.volume_revisions(volume.uid, page_size=page_size, page_token=page_token)

    async def run(self, command: Command, request: RequestKey | None) -> VolumeDetails:
        """Begin an operation, wait for its end, and return the resulting volume."""
        result = await self._run(command, request)
        if not isinstance(result, Volume):
            raise TypeError(f"{type(command).__name__} has no volume as its result")
        return VolumeDetails(VolumeView(result, 0, ""), ())
