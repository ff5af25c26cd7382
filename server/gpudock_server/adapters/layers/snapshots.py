"""SnapshotStore over the folders of Docker's overlay2 driver."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpudock_server.adapters.layers.comparing import differences
from gpudock_server.adapters.layers.copying import (
    StillCopyingError,
    copy_tree,
    empty_tree,
    missing_program,
    sole_writer,
)
from gpudock_server.adapters.layers.duplicating import Duplicator, can_clone
from gpudock_server.adapters.layers.mirroring import Copies, Mirror, Moved, bytes_to_copy
from gpudock_server.adapters.layers.paths import Layer, LayerRefusedError, seen_layer
from gpudock_server.adapters.layers.privilege import why_no_copy
from gpudock_server.adapters.layers.room import available, require_room, write_out
from gpudock_server.adapters.layers.snapshot_index import Index, forget_index, load_index, save_index
from gpudock_server.adapters.layers.snapshot_places import TREE_NAME, Meta, SnapshotPlaces, checked_uuid, opened
from gpudock_server.adapters.layers.threads import Interrupt, run_to_end
from gpudock_server.adapters.layers.trail import Trail, remove_entry
from gpudock_server.errors import DiskFull, SnapshotFailed
from gpudock_server.model.engine import EngineContainer
from gpudock_server.model.record import now
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotKind, SnapshotMethod
from gpudock_server.ports import Progress, SnapshotPlan, SnapshotStore

_MOST_PASSES = 4
# A pass that moved no more than this leaves little to the one that finds the container still.
_LITTLE_BYTES = 8 << 20
_LITTLE_ENTRIES = 200
_PROGRESS_SECONDS = 0.25
_BLOCK_BYTES = 512
# Operations whose indices stay in memory between their calls; those of others are read back from the disk.
_REMEMBERED = 8
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})


class _Report:
    """Tells progress to the event loop from a thread, about four times a second. `total` 0 is not known."""

    def __init__(self, progress: Progress) -> None:
        self._tell = progress
        self._loop = asyncio.get_running_loop()
        self._next = 0.0
        self.current = 0
        self.total = 0

    def add(self, count: int) -> None:
        """So many bytes more were copied or shared."""
        self.current += count
        if (moment := time.monotonic()) >= self._next:
            self._next = moment + _PROGRESS_SECONDS
            shown = min(self.current, self.total) if self.total else self.current
            self._loop.call_soon_threadsafe(self._tell, shown, self.total)


@dataclass(frozen=True, slots=True)
class _Making:
    """What a snapshot is made of, and for whom."""

    old: EngineContainer
    key: SnapshotKey
    operation_id: str
    previous: SnapshotKey | None
    report: _Report


@dataclass(frozen=True, slots=True)
class _Mirroring:
    """What is mirrored where, and for whom."""

    source: EngineContainer
    target: EngineContainer
    operation_id: str
    report: _Report
    still: bool


@dataclass(frozen=True, slots=True)
class _Work:
    """What a pass works on, all folders open. `state` holds the index; `hidden` is its name if it is in the target."""

    source: int
    target: int
    state: int
    operation_id: str
    previous: Copies | None
    clones: bool
    quiet: bool
    report: _Report
    interrupt: Interrupt
    hidden: str = ""


@dataclass
class _Memory:
    """What an operation's next call would otherwise read from the disk, while the container waits."""

    index: Index | None = None
    previous: Index | None = None
    previous_key: SnapshotKey | None = None


class OverlaySnapshotStore(SnapshotStore):
    """Snapshots as folders below `root`, which lies on the layers' filesystem where extents are to be shared.

    `engine_root` is the engine's data folder, as the engine names it; `local` whether the engine runs on this host.
    `root` is made when the first snapshot is; the folder above it must be there. Different containers may be at work
    at once; the calls for one operation come one after the other.
    """

    def __init__(self, root: str, engine_root: str, *, local: bool) -> None:
        self._places = SnapshotPlaces(root)
        self._engine_root = engine_root
        self._local = local
        self._clones: bool | None = None
        self._remembered: OrderedDict[str, _Memory] = OrderedDict()

    async def method(self, old: EngineContainer) -> tuple[SnapshotMethod | None, str]:
        """See the protocol. The first call tries whether extents can be shared, for which it makes the root."""
        with self._failures():
            return await run_to_end(self._method, old)

    async def plan(self, old: EngineContainer, previous: SnapshotKey | None) -> SnapshotPlan:
        """See the protocol. Raises SnapshotFailed where `method` has none."""
        method, reason = await self.method(old)
        if method is None:
            raise SnapshotFailed(detail=reason)
        with self._failures():
            return await run_to_end(self._plan, old, previous, method, Interrupt())

    async def gather(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        """See the protocol."""
        with self._failures():
            making = _Making(old, key, operation_id, previous, _Report(progress))
            await run_to_end(self._gather, making, Interrupt())

    async def complete(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        """See the protocol."""
        with self._failures():
            making = _Making(old, key, operation_id, previous, _Report(progress))
            await run_to_end(self._complete, making, Interrupt())

    async def seal(self, key: SnapshotKey, operation_id: str, image_id: str) -> Snapshot:
        """See the protocol."""
        with self._failures():
            return await run_to_end(self._seal, key, operation_id, image_id, Interrupt())

    async def discard(self, key: SnapshotKey, operation_id: str) -> None:
        """See the protocol."""
        with self._failures():
            await run_to_end(self._discard, key, operation_id, Interrupt())

    async def restore(self, key: SnapshotKey, target: EngineContainer, progress: Progress) -> None:
        """See the protocol. On return the copy is on the disk, not only in memory."""
        with self._failures():
            meta = await run_to_end(self._restorable, key, target)
            layer = await run_to_end(self._fillable, target)
            async with sole_writer(layer.path) as lock:
                await self._restore(meta, layer.path, lock, progress)

    async def mirror(
        self, source: EngineContainer, target: EngineContainer, operation_id: str, *, still: bool, progress: Progress
    ) -> None:
        """See the protocol. What has been done so far is told by a folder in the target's own tree until the end."""
        with self._failures():
            layer = await run_to_end(self._fillable, target)
            async with sole_writer(layer.path):
                making = _Mirroring(source, target, operation_id, _Report(progress), still=still)
                await run_to_end(self._mirror, making, Interrupt())

    async def remove(self, key: SnapshotKey) -> None:
        """See the protocol."""
        with self._failures():
            await run_to_end(self._places.drop, self._places.sealed(key), Interrupt())

    async def remove_all(self, uid: str) -> None:
        """See the protocol."""
        with self._failures():
            await run_to_end(self._places.drop_all, uid, Interrupt())

    async def sealed(self, key: SnapshotKey) -> Snapshot | None:
        """See the protocol."""
        with self._failures():
            try:
                meta = await run_to_end(self._places.meta, key)
            except ValueError:
                return None
        return meta.snapshot if meta else None

    async def find(self) -> tuple[SnapshotKey, ...]:
        """See the protocol."""
        with self._failures():
            found = await run_to_end(lambda: list(self._places.found()))
        return tuple(key for key, operation_id in found if not operation_id)

    async def partials(self) -> tuple[tuple[SnapshotKey, str], ...]:
        """See the protocol."""
        with self._failures():
            found = await run_to_end(lambda: list(self._places.found()))
        return tuple((key, operation_id) for key, operation_id in found if operation_id)

    # ---- everything below runs in threads ----

    def _method(self, old: EngineContainer) -> tuple[SnapshotMethod | None, str]:
        layer = seen_layer(self._engine_root, old, local=self._local)
        if reason := why_no_copy() or (layer if isinstance(layer, str) else ""):
            return None, reason
        return (SnapshotMethod.REFLINK if self._can_clone(self._layer(old)) else SnapshotMethod.LINK), ""

    def _can_clone(self, layer: Layer) -> bool:
        """Whether a layer's files and snapshots can share extents; tried once, with real files."""
        root = self._places.root
        if self._clones is None:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with opened(root) as folder:
                self._clones = can_clone(folder, f".probe-{os.getpid()}")
        return self._clones and layer.device == root.stat().st_dev

    def _plan(
        self, old: EngineContainer, previous: SnapshotKey | None, method: SnapshotMethod, interrupt: Interrupt
    ) -> SnapshotPlan:
        needed = 0
        if method is SnapshotMethod.LINK:
            with self._source(old) as source:
                needed = bytes_to_copy(source, self._index_of(previous), interrupt)
        free = require_room(str(self._places.root), needed)
        return SnapshotPlan(method=method, bytes_to_copy=needed, bytes_available=free)

    def _gather(self, making: _Making, interrupt: Interrupt) -> None:
        if self._sealed_by(making.key, making.operation_id):
            return
        with self._snapshot_work(making, interrupt) as work:
            self._gather_into(work)

    def _gather_into(self, work: _Work) -> None:
        """Pass after pass, until one finds little, or the source changes as fast as it is copied."""
        work.report.total = bytes_to_copy(work.source, None, work.interrupt)
        write_out(work.source)  # in one go, which is quicker than each file by itself (see Duplicator.write_back)
        before: Moved | None = None
        for _ in range(_MOST_PASSES):
            moved = self._pass(work, still=False)
            if moved.bytes <= _LITTLE_BYTES and moved.entries <= _LITTLE_ENTRIES:
                return
            if before and moved.bytes > before.bytes // 2 and moved.entries > before.entries // 2:
                return
            before = moved

    def _complete(self, making: _Making, interrupt: Interrupt) -> None:
        if self._sealed_by(making.key, making.operation_id):
            return
        with self._snapshot_work(making, interrupt) as work:
            self._pass(work, still=True)

    @contextmanager
    def _snapshot_work(self, making: _Making, interrupt: Interrupt) -> Iterator[_Work]:
        """Everything that a pass needs, opened. A full disk leaves nothing of the partial."""
        if making.previous is not None and making.previous.uid != making.key.uid:
            raise LayerRefusedError("a snapshot shares files with none of another container")
        if reason := why_no_copy():
            raise LayerRefusedError(reason)
        clones = self._can_clone(self._layer(making.old))
        folder = self._places.partial(making.key, making.operation_id)
        self._places.make(folder)
        try:
            with ExitStack() as stack:
                source = stack.enter_context(self._source(making.old))
                yield _Work(
                    source=source,
                    target=stack.enter_context(opened(folder / TREE_NAME)),
                    state=stack.enter_context(opened(folder)),
                    operation_id=making.operation_id,
                    previous=None if clones else self._copies_of(making, source, stack),
                    clones=clones,
                    quiet=not making.old.running,
                    report=making.report,
                    interrupt=interrupt,
                )
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            self._remembered.pop(making.operation_id, None)
            full = self._full(making.report.total or making.report.current)
            self._places.drop_partial(folder, interrupt)
            raise full from error

    def _pass(self, work: _Work, *, still: bool) -> Moved:
        """Bring what changed since the last pass. While it works there is no index, so a torn tree is never trusted."""
        memory = self._memory(work.operation_id)
        index, memory.index = memory.index or load_index(work.state, same_boot=True), None
        forget_index(work.state)
        device = os.fstat(work.source).st_dev
        if index is None or index.device != device:
            self._start_over(work)
            index = Index(device)
        duplicator = Duplicator(work.interrupt, work.report.add, clones=work.clones)
        mirror = Mirror(
            work.source, work.target, work.state, duplicator, work.interrupt, previous=work.previous, live=not still,
            quiet=work.quiet, handled=work.report.add, hidden=work.hidden,
        )  # fmt: skip
        fresh = mirror.run(index)
        fresh.complete, fresh.cloned = still, duplicator.clones
        save_index(fresh, work.state)
        memory.index = fresh
        return mirror.moved

    def _start_over(self, work: _Work) -> None:
        """Empty the target, all but the state that may lie in it."""
        with os.scandir(work.target) as entries:
            names = [entry.name for entry in entries if entry.name != work.hidden]
        for name in names:
            remove_entry(work.target, name, work.interrupt)

    def _seal(self, key: SnapshotKey, operation_id: str, image_id: str, interrupt: Interrupt) -> Snapshot:
        before = self._places.meta(key)
        if before and before.operation_id == operation_id:
            return before.snapshot
        if not image_id:
            raise LayerRefusedError("it is not known on which image the files lie")
        folder = self._places.partial(key, operation_id)
        with opened(folder) as state, opened(folder / TREE_NAME) as tree:
            index = load_index(state, same_boot=True)
            if index is None or not index.complete:
                raise LayerRefusedError("it was not completed, or the machine has been started anew since")
            write_out(tree)
            size, new = _sizes(tree, index, interrupt)
        method = SnapshotMethod.REFLINK if index.cloned else SnapshotMethod.LINK
        snapshot = Snapshot(
            kind=SnapshotKind.TREE, image_id=image_id, method=method, layer_bytes=size, entries=len(index) - 1,
            new_bytes=new, create_time=now(),
        )  # fmt: skip
        if before:
            # Of an operation that the store does not know any more. Cut off here, this one is still there as a partial.
            self._places.drop(self._places.sealed(key), interrupt)
        self._places.seal(folder, Meta(key=key, operation_id=operation_id, snapshot=snapshot))
        self._remembered.pop(operation_id, None)
        return snapshot

    def _discard(self, key: SnapshotKey, operation_id: str, interrupt: Interrupt) -> None:
        self._remembered.pop(operation_id, None)
        self._places.drop_partial(self._places.partial(key, operation_id), interrupt)
        if self._sealed_by(key, operation_id):
            self._places.drop(self._places.sealed(key), interrupt)

    def _restorable(self, key: SnapshotKey, target: EngineContainer) -> Meta:
        meta = self._places.meta(key)
        if meta is None:
            raise LayerRefusedError(f"revision {key.revision} has no snapshot here")
        if meta.snapshot.image_id != target.image_id:
            raise LayerRefusedError(f"its files lie on {meta.snapshot.image_id}, the container on {target.image_id}")
        if reason := missing_program():
            raise LayerRefusedError(reason)
        return meta

    async def _restore(self, meta: Meta, path: str, lock: int, progress: Progress) -> None:
        tree = str(self._places.sealed(meta.key) / TREE_NAME)
        interrupt, total = Interrupt(), meta.snapshot.layer_bytes
        await run_to_end(empty_tree, path, interrupt)
        if meta.snapshot.method is not SnapshotMethod.REFLINK:
            await run_to_end(require_room, path, total)
        progress(0, total)
        ended = await copy_tree(tree, path, lock, total, progress)
        if ended.out_of_room:
            raise DiskFull(path=path, needed_bytes=total, available_bytes=available(path))
        if ended.exit_code != 0:
            raise LayerRefusedError(f"cp ended with {ended.exit_code}: {ended.complaint}")
        if found := await run_to_end(differences, tree, path, interrupt):
            raise LayerRefusedError(f"what was restored is not equal: {'; '.join(found)}")
        await run_to_end(write_out, lock)
        progress(total, total)

    def _mirror(self, making: _Mirroring, interrupt: Interrupt) -> None:
        source, target = making.source, making.target
        if not source.image_id or source.image_id != target.image_id:
            raise LayerRefusedError(f"the images differ: {source.image_id or 'unknown'} and {target.image_id}")
        layer = self._fillable(target)
        if self._layer(source).inode == layer.inode:
            raise LayerRefusedError("source and target are one and the same layer")
        hidden = f".gpudock-{checked_uuid(making.operation_id)}"
        state = Path(layer.path, hidden)
        state.mkdir(mode=0o700, exist_ok=True)
        with self._source(source) as from_, opened(Path(layer.path)) as into, opened(state) as folder:
            work = _Work(
                source=from_,
                target=into,
                state=folder,
                operation_id=making.operation_id,
                previous=None,
                clones=True,
                quiet=not source.running,
                report=making.report,
                interrupt=interrupt,
                hidden=hidden,
            )
            if not making.still:
                self._gather_into(work)
                return
            self._pass(work, still=True)
            self._remembered.pop(making.operation_id, None)
            times = os.fstat(into)
            remove_entry(into, hidden, interrupt)
            os.utime(into, ns=(times.st_atime_ns, times.st_mtime_ns))

    def _layer(self, container: EngineContainer) -> Layer:
        layer = seen_layer(self._engine_root, container, local=self._local)
        if isinstance(layer, str):
            raise LayerRefusedError(layer)
        return layer

    def _fillable(self, target: EngineContainer) -> Layer:
        if target.running:
            raise LayerRefusedError(f"container {target.id} runs, and its layer cannot be filled")
        if reason := why_no_copy():
            raise LayerRefusedError(reason)
        return self._layer(target)

    @contextmanager
    def _source(self, container: EngineContainer) -> Iterator[int]:
        """The root of a container's layer, which is still the folder that was checked."""
        layer = self._layer(container)
        with opened(Path(layer.path)) as descriptor:
            found = os.fstat(descriptor)
            if (found.st_dev, found.st_ino) != (layer.device, layer.inode):
                raise LayerRefusedError(f"{layer.path} changed while it was looked at")
            yield descriptor

    def _copies_of(self, making: _Making, source: int, stack: ExitStack) -> Copies | None:
        memory = self._memory(making.operation_id)
        if memory.previous is None or memory.previous_key != making.previous:
            memory.previous, memory.previous_key = self._index_of(making.previous), making.previous
        if making.previous is None or memory.previous is None:
            return None
        try:
            tree = stack.enter_context(opened(self._places.sealed(making.previous) / TREE_NAME))
        except FileNotFoundError:  # removed since: then there is nothing to share
            return None
        copies = Copies(memory.previous, tree, os.fstat(source).st_dev)
        stack.callback(copies.trail.leave)
        return copies

    def _index_of(self, previous: SnapshotKey | None) -> Index | None:
        """The index of a sealed snapshot; None where there is nothing to share with."""
        if previous is None or self._places.meta(previous) is None:
            return None
        try:
            with opened(self._places.sealed(previous)) as descriptor:
                return load_index(descriptor, same_boot=False)
        except FileNotFoundError:
            return None

    def _memory(self, operation_id: str) -> _Memory:
        memory = self._remembered.setdefault(operation_id, _Memory())
        self._remembered.move_to_end(operation_id)
        while len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)
        return memory

    def _sealed_by(self, key: SnapshotKey, operation_id: str) -> bool:
        meta = self._places.meta(key)
        return meta is not None and meta.operation_id == operation_id

    def _full(self, needed: int) -> DiskFull:
        root = str(self._places.root)
        return DiskFull(path=root, needed_bytes=needed, available_bytes=available(root))

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Give what is refused or fails below the names that core knows."""
        try:
            yield
        except (LayerRefusedError, StillCopyingError, ValueError) as error:
            raise SnapshotFailed(detail=str(error)) from error
        except OSError as error:
            if error.errno in _NO_ROOM:
                raise self._full(0) from error
            raise SnapshotFailed(detail=f"{error.strerror} ({error.filename})") from error


def _sizes(tree: int, index: Index, interrupt: Interrupt) -> tuple[int, int]:
    """Bytes of disk that a tree takes, every inode once, and those of them that it shares with nothing older."""
    found: dict[int, tuple[int, bool]] = {}
    with Trail(tree) as trail:
        for folder, name, entry in index.walk():
            interrupt.check()
            status = os.stat(name, dir_fd=trail.enter(folder), follow_symlinks=False) if name else os.fstat(tree)
            if status.st_ino != entry.copy:
                raise LayerRefusedError(f"{folder}/{name} is not what was copied")
            found[status.st_ino] = (status.st_blocks * _BLOCK_BYTES, entry.shared)
    return sum(size for size, _ in found.values()), sum(size for size, shared in found.values() if not shared)
