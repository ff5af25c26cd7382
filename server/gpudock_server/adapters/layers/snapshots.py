"""SnapshotStore for the folders of Docker's overlay2 driver."""

from __future__ import annotations

import asyncio
import errno
import os
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

from gpudock_server.adapters.host.disk_space import available, require_disk_space
from gpudock_server.adapters.host.filesystem import open_directory
from gpudock_server.adapters.host.privileges import copy_unavailable_reason
from gpudock_server.adapters.host.stalls import DEFAULT_STALL_SECONDS, StalledError
from gpudock_server.adapters.host.threads import run_to_end
from gpudock_server.adapters.host.trees.entry_copy import can_clone
from gpudock_server.adapters.host.trees.jobs import TREE_NAME, JobRefusedError
from gpudock_server.adapters.host.trees.limits import Limits, TreeTooLargeError
from gpudock_server.adapters.host.trees.worker import TreeWorker
from gpudock_server.adapters.layers.overlay2 import Layer, LayerRefusedError, layer_of
from gpudock_server.adapters.layers.snapshot_folders import Meta, SnapshotFolders, require_uuid
from gpudock_server.errors import DiskFull, SnapshotFailed
from gpudock_server.model.engine import EngineContainer
from gpudock_server.model.operation import new_operation_id
from gpudock_server.model.record import now
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotKind, SnapshotMethod
from gpudock_server.ports import LayerTooLarge, Progress, SnapshotPlan, SnapshotStore

# Workers that are kept between the calls of their operations, with the indexes in their memory; other workers read the
# indexes from disk again.
_MAX_IDLE_WORKERS: Final = 8
# Concurrent snapshots and restores outside the downtime of containers; each may take the memory of the limits.
_MAX_CONCURRENT_BULK: Final = 8
_DEFAULT_LIMITS: Final = Limits()
_NO_SPACE_ERRNOS: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class _ProgressTotal:
    """The latest progress of a job."""

    def __init__(self, progress: Progress) -> None:
        self._report = progress
        self.known = 0

    def __call__(self, current: int, total: int) -> None:
        self.known = total or current
        self._report(current, total)


@dataclass(frozen=True, slots=True)
class _SnapshotRequest:
    """The container, key, operation and previous snapshot of a new snapshot."""

    old: EngineContainer
    key: SnapshotKey
    operation_id: str
    previous: SnapshotKey | None


class OverlaySnapshotStore(SnapshotStore):
    """Implements ports.SnapshotStore with folders below `root`; extents are shared if it is on the layers' filesystem.

    `engine_root` is the engine's data folder as the engine reports it; `local`: the engine runs on this host. `root` is
    created with the first snapshot; its parent must exist. Calls for different operations may run concurrently, calls
    for the same operation may not.

    The trees belong to tenants. A child process (`TreeWorker`) with limited memory walks them, and is killed if it
    makes no progress for `stall_seconds`. No snapshot is made of a tree that exceeds `limits`.
    """

    def __init__(
        self,
        root: str,
        engine_root: str,
        *,
        local: bool,
        limits: Limits = _DEFAULT_LIMITS,
        stall_seconds: float = DEFAULT_STALL_SECONDS,
    ) -> None:
        self._folders = SnapshotFolders(root)
        self._engine_root = engine_root
        self._local = local
        self._limits = limits
        self._stall_seconds = stall_seconds
        self._clones: bool | None = None
        self._workers: OrderedDict[str, TreeWorker] = OrderedDict()
        self._bulk = asyncio.Semaphore(_MAX_CONCURRENT_BULK)

    async def method(self, old: EngineContainer) -> tuple[SnapshotMethod | None, str]:
        """See the protocol. The first call creates the root and tests whether extents can be shared."""
        with self._snapshot_errors():
            return await run_to_end(self._method, old)

    async def plan(self, old: EngineContainer, previous: SnapshotKey | None) -> SnapshotPlan:
        """See the protocol. Raises SnapshotFailed if `method` returns None."""
        method, reason = await self.method(old)
        if method is None:
            raise SnapshotFailed(detail=reason)
        with self._snapshot_errors():
            source = await run_to_end(self._source, old)
            shared = await run_to_end(self._shared_with, previous) if method is SnapshotMethod.LINK else ""
            try:
                async with self._one_off_worker() as worker:
                    found = await worker.call("measure", source=source, previous=shared, limits=self._limit_values)
            except TreeTooLargeError as error:
                return SnapshotPlan(method=method, too_large=str(error))
            needed = int(found["bytes"]) if method is SnapshotMethod.LINK else 0
            free = await run_to_end(require_disk_space, str(self._folders.root), needed)
        return SnapshotPlan(method=method, bytes_to_copy=needed, bytes_available=free)

    async def gather(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        """See the protocol."""
        async with self._bulk:
            await self._make("gather", _SnapshotRequest(old, key, operation_id, previous), progress)

    async def complete(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        """See the protocol."""
        await self._make("complete", _SnapshotRequest(old, key, operation_id, previous), progress)

    async def seal(self, key: SnapshotKey, operation_id: str, image_id: str) -> Snapshot:
        """See the protocol."""
        with self._snapshot_errors():
            before = await run_to_end(self._folders.meta, key)
            if before and before.operation_id == operation_id:
                return before.snapshot
            if not image_id:
                raise LayerRefusedError("the image id of the snapshot is missing")
            folder = self._folders.partial(key, operation_id)
            try:
                found = await self._worker(operation_id).call("check", partial=str(folder))
            finally:
                await self._close(operation_id)
            snapshot = Snapshot(
                kind=SnapshotKind.TREE,
                image_id=image_id,
                method=SnapshotMethod.REFLINK if found["cloned"] else SnapshotMethod.LINK,
                layer_bytes=found["bytes"],
                entries=found["entries"],
                new_bytes=found["new_bytes"],
                create_time=now(),
            )
            if before:
                # The sealed snapshot is of an operation that the store lost. If the daemon dies here, the new one still
                # exists as a partial snapshot.
                await self._drop(self._folders.sealed(key))
            meta = Meta(key=key, operation_id=operation_id, snapshot=snapshot)
            await run_to_end(self._folders.seal, folder, meta)
            return snapshot

    async def discard(self, key: SnapshotKey, operation_id: str) -> None:
        """See the protocol."""
        with self._snapshot_errors():
            await self._close(operation_id)
            await self._drop_partial(self._folders.partial(key, operation_id))
            if await run_to_end(self._sealed_by, key, operation_id):
                await self._drop(self._folders.sealed(key))

    async def restore(self, key: SnapshotKey, target: EngineContainer, progress: Progress) -> None:
        """See the protocol. Returns after the copy is on disk."""
        with self._snapshot_errors():
            meta = await run_to_end(self._restorable_meta, key, target)
            layer = await run_to_end(self._target_layer, target)
            total = meta.snapshot.layer_bytes
            clones = meta.snapshot.method is SnapshotMethod.REFLINK
            if not clones:
                await run_to_end(require_disk_space, layer.path, total)
            progress(0, total)
            try:
                async with self._bulk, self._one_off_worker() as worker:
                    await worker.call(
                        "fill", progress, source=[str(self._folders.sealed(key) / TREE_NAME)],
                        target=_job_folder(layer), hidden=f".gpudock-{new_operation_id()}", total=total, clones=True,
                    )  # fmt: skip
            except OSError as error:
                if error.errno not in _NO_SPACE_ERRNOS:
                    raise
                free = available(layer.path)
                raise DiskFull(path=layer.path, needed_bytes=total, available_bytes=free) from error
            progress(total, total)

    async def mirror(
        self, source: EngineContainer, target: EngineContainer, operation_id: str, *, still: bool, progress: Progress
    ) -> None:
        """See the protocol. Until the last call the index is in a folder in the tree of the target."""
        with self._snapshot_errors():
            layers = await run_to_end(self._mirror_layers, source, target)
            worker = self._worker(operation_id)
            try:
                await worker.call(
                    "mirror", progress, source=_job_folder(layers[0]), target=_job_folder(layers[1]),
                    hidden=f".gpudock-{require_uuid(operation_id)}", still=still, quiet=not source.running,
                    limits=self._limit_values,
                )  # fmt: skip
            except BaseException:
                await self._close(operation_id)
                raise
            if still:
                await self._close(operation_id)

    async def remove(self, key: SnapshotKey) -> None:
        """See the protocol."""
        with self._snapshot_errors():
            await self._drop(self._folders.sealed(key))

    async def remove_all(self, uid: str) -> None:
        """See the protocol."""
        with self._snapshot_errors():
            await self._drop(self._folders.of_container(uid))

    async def sealed(self, key: SnapshotKey) -> Snapshot | None:
        """See the protocol."""
        with self._snapshot_errors():
            try:
                meta = await run_to_end(self._folders.meta, key)
            except ValueError:
                return None
        return meta.snapshot if meta else None

    async def find(self) -> tuple[SnapshotKey, ...]:
        """See the protocol."""
        with self._snapshot_errors():
            found = await run_to_end(lambda: list(self._folders.found()))
        return tuple(key for key, operation_id in found if not operation_id)

    async def partials(self) -> tuple[tuple[SnapshotKey, str], ...]:
        """See the protocol."""
        with self._snapshot_errors():
            found = await run_to_end(lambda: list(self._folders.found()))
        return tuple((key, operation_id) for key, operation_id in found if operation_id)

    async def close(self) -> None:
        """End all workers."""
        for operation_id in list(self._workers):
            await self._close(operation_id)

    # -- child processes ---------------------------------------------------------------------------------------------

    @property
    def _limit_values(self) -> list[int]:
        return list(astuple(self._limits))

    @asynccontextmanager
    async def _one_off_worker(self) -> AsyncIterator[TreeWorker]:
        """Start a worker for one job."""
        worker = TreeWorker(self._limits.memory_bytes, self._stall_seconds)
        try:
            yield worker
        finally:
            await worker.close()

    def _worker(self, operation_id: str) -> TreeWorker:
        """Return the worker of an operation, which keeps the indexes in memory between its calls.

        Otherwise they would be read during the downtime of the container. The worker of an operation that was abandoned
        ends when more than `_MAX_IDLE_WORKERS` are idle.
        """
        if operation_id not in self._workers:
            self._workers[operation_id] = TreeWorker(self._limits.memory_bytes, self._stall_seconds)
        self._workers.move_to_end(operation_id)
        return self._workers[operation_id]

    async def _close(self, operation_id: str) -> None:
        if worker := self._workers.pop(operation_id, None):
            await worker.close()

    async def _close_surplus(self) -> None:
        idle = [each for each, worker in self._workers.items() if not worker.busy]
        for operation_id in idle[: max(0, len(idle) - _MAX_IDLE_WORKERS)]:
            await self._close(operation_id)

    async def _make(self, job: str, request: _SnapshotRequest, progress: Progress) -> None:
        """Run a pass of a snapshot. If the disk is full or the tree too large, remove the partial snapshot."""
        tracked = _ProgressTotal(progress)
        with self._snapshot_errors():
            arguments = await run_to_end(self._pass_arguments, request)
            if arguments is None:
                return
            try:
                await self._worker(request.operation_id).call(job, tracked, **arguments)
            except (OSError, TreeTooLargeError) as error:
                if isinstance(error, OSError) and error.errno not in _NO_SPACE_ERRNOS:
                    raise
                full = self._full(tracked.known)
                await self._close(request.operation_id)
                await self._drop_partial(self._folders.partial(request.key, request.operation_id))
                if isinstance(error, TreeTooLargeError):
                    raise LayerTooLarge(str(error)) from error
                raise full from error
            finally:
                await self._close_surplus()

    async def _drop(self, folder: Path) -> None:
        """Rename a folder, so that it does not count as complete, then remove it and the rest of earlier removals."""
        for each in await run_to_end(self._folders.set_aside, folder):
            await self._remove(each)

    async def _drop_partial(self, folder: Path) -> None:
        if await run_to_end(self._folders.remove_index_of, folder):
            await self._remove(folder)

    async def _remove(self, folder: Path) -> None:
        async with self._one_off_worker() as worker:
            await worker.call("remove", parent=str(folder.parent), name=folder.name)
        await run_to_end(self._folders.remove_if_empty, folder)

    # -- what runs in threads ----------------------------------------------------------------------------------------

    def _method(self, old: EngineContainer) -> tuple[SnapshotMethod | None, str]:
        layer = layer_of(self._engine_root, old, local=self._local)
        if reason := copy_unavailable_reason() or (layer if isinstance(layer, str) else ""):
            return None, reason
        return (SnapshotMethod.REFLINK if self._can_clone(self._layer(old)) else SnapshotMethod.LINK), ""

    def _can_clone(self, layer: Layer) -> bool:
        """Whether a layer and its snapshots can share extents; tested once, with files."""
        root = self._folders.root
        if self._clones is None:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open_directory(root) as folder:
                self._clones = can_clone(folder, f".probe-{os.getpid()}")
        return self._clones and layer.device == root.stat().st_dev

    def _pass_arguments(self, request: _SnapshotRequest) -> dict[str, Any] | None:
        """Create the folder of the partial snapshot; returns the arguments of a pass, or None if it is sealed."""
        if self._sealed_by(request.key, request.operation_id):
            return None
        if request.previous is not None and request.previous.uid != request.key.uid:
            raise LayerRefusedError("the previous snapshot must be of the same container")
        if reason := copy_unavailable_reason():
            raise LayerRefusedError(reason)
        layer = self._layer(request.old)
        clones = self._can_clone(layer)
        folder = self._folders.partial(request.key, request.operation_id)
        self._folders.make(folder)
        return {
            "source": _job_folder(layer),
            "partial": str(folder),
            "previous": "" if clones else self._shared_with(request.previous),
            "clones": clones,
            "quiet": not request.old.running,
            "limits": self._limit_values,
        }

    def _restorable_meta(self, key: SnapshotKey, target: EngineContainer) -> Meta:
        meta = self._folders.meta(key)
        if meta is None:
            raise LayerRefusedError(f"no snapshot of revision {key.revision} on this node")
        if meta.snapshot.image_id != target.image_id:
            raise LayerRefusedError(
                f"the snapshot is of image {meta.snapshot.image_id}; the container has image {target.image_id}"
            )
        return meta

    def _mirror_layers(self, source: EngineContainer, target: EngineContainer) -> tuple[Layer, Layer]:
        if not source.image_id or source.image_id != target.image_id:
            raise LayerRefusedError(f"the images differ: {source.image_id or 'unknown'} and {target.image_id}")
        layers = (self._layer(source), self._target_layer(target))
        if layers[0].inode == layers[1].inode:
            raise LayerRefusedError("source and target are the same layer")
        return layers

    def _layer(self, container: EngineContainer) -> Layer:
        layer = layer_of(self._engine_root, container, local=self._local)
        if isinstance(layer, str):
            raise LayerRefusedError(layer)
        return layer

    def _source(self, container: EngineContainer) -> list[Any]:
        return _job_folder(self._layer(container))

    def _target_layer(self, target: EngineContainer) -> Layer:
        if target.running:
            raise LayerRefusedError(
                f"container {target.id} is running; its layer can only be filled while it is stopped"
            )
        if reason := copy_unavailable_reason():
            raise LayerRefusedError(reason)
        return self._layer(target)

    def _shared_with(self, previous: SnapshotKey | None) -> str:
        """Return the folder of a sealed snapshot to share files with; empty if there is none."""
        return str(self._folders.sealed(previous)) if previous and self._folders.meta(previous) else ""

    def _sealed_by(self, key: SnapshotKey, operation_id: str) -> bool:
        meta = self._folders.meta(key)
        return meta is not None and meta.operation_id == operation_id

    def _full(self, needed: int) -> DiskFull:
        root = str(self._folders.root)
        return DiskFull(path=root, needed_bytes=needed, available_bytes=available(root))

    @contextmanager
    def _snapshot_errors(self) -> Iterator[None]:
        """Convert errors of layers and jobs to domain errors."""
        try:
            yield
        except (LayerRefusedError, JobRefusedError, TreeTooLargeError, StalledError, ValueError) as error:
            raise SnapshotFailed(detail=str(error)) from error
        except OSError as error:
            if error.errno in _NO_SPACE_ERRNOS:
                raise self._full(0) from error
            raise SnapshotFailed(detail=f"{error.strerror} ({error.filename})") from error


def _job_folder(layer: Layer) -> list[Any]:
    """Return the checked folder of a layer as an argument of jobs, which refuse any other folder at its path."""
    return [layer.path, layer.device, layer.inode]
