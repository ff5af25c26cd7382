"""The jobs of the child process; `worker` calls them and `child` runs them.

Arguments and results are JSON. A source or a target is a path, optionally with the device and inode that it must have.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gpudock_server.adapters.host.filesystem import sync_filesystem
from gpudock_server.adapters.host.trees.comparison import differences
from gpudock_server.adapters.host.trees.digest import digest_tree
from gpudock_server.adapters.host.trees.entry_copy import EntryCopier
from gpudock_server.adapters.host.trees.folders import FOLDER_FLAGS, OpenFolders, empty_folder, remove_entry
from gpudock_server.adapters.host.trees.interrupt import Interrupt
from gpudock_server.adapters.host.trees.limits import Limits
from gpudock_server.adapters.host.trees.measure import longest_path, measure
from gpudock_server.adapters.host.trees.mirror import CopyIndex, Mirror, PassCounts
from gpudock_server.adapters.host.trees.snapshot_index import (
    OPAQUE_XATTR,
    Index,
    IndexEntry,
    is_whiteout,
    key_of,
    load_index,
    remove_index,
    save_index,
)

if TYPE_CHECKING:
    from gpudock_server.adapters.host.trees.layer_jobs import LayerJobs

TREE_NAME = "tree"
_MAX_PASSES = 4
# After a pass that copied no more than this, the last pass over the unchanging source has little left to copy.
_SMALL_PASS_BYTES = 8 << 20
_SMALL_PASS_ENTRIES = 200
_PROGRESS_SECONDS = 0.25
_LOCK_SECONDS = 10.0
_BLOCK_BYTES = 512
_NO_SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})


class JobRefusedError(Exception):
    """The source or target of a job is not what the arguments describe, or is in use; the message says why."""


class ProgressReporter:
    """Sends progress to the parent, about four times a second. `total` 0: unknown."""

    def __init__(self, send: Callable[[int, int], None]) -> None:
        self._send = send
        self._next = 0.0
        self.current = 0
        self.total = 0

    def add(self, count: int) -> None:
        """Add bytes that were copied or shared."""
        self.current += count
        if (moment := time.monotonic()) >= self._next:
            self._next = moment + _PROGRESS_SECONDS
            self._send(min(self.current, self.total) if self.total else self.current, self.total)


@dataclass(frozen=True, slots=True)
class CheckedFolder:
    """A folder with the device and inode that it must have (0: any)."""

    path: str
    device: int = 0
    inode: int = 0

    @contextmanager
    def open(self) -> Iterator[int]:
        """Open the folder. Raises JobRefusedError for another folder, OSError for a symbolic link."""
        descriptor = os.open(self.path, FOLDER_FLAGS)
        try:
            found = os.fstat(descriptor)
            if self.inode and (found.st_dev, found.st_ino) != (self.device, self.inode):
                raise JobRefusedError(f"{self.path} was replaced by another folder")
            yield descriptor
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class PassInput:
    """Input of a pass; all folders are open. `state` holds the index; `hidden` is its name if it is in the target."""

    source: int
    target: int
    state: int
    previous: CopyIndex | None
    clones: bool
    quiet: bool
    report: ProgressReporter
    limits: Limits | None = None
    hidden: str = ""


@dataclass
class Jobs:
    """The jobs, and the indexes that a job keeps in memory for the next job of the same operation."""

    send: Callable[[int, int], None]
    interrupt: Interrupt = field(default_factory=Interrupt)
    index: Index | None = None
    previous: Index | None = None
    previous_path: str = ""
    layers: LayerJobs | None = None

    def run(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run one job and return its result. Raises the errors of the job."""
        jobs: dict[str, Callable[..., dict[str, Any]]] = {
            "measure": self.measure,
            "longest_path": self.longest_path,
            "gather": self.gather,
            "complete": self.complete,
            "check": self.check,
            "mirror": self.mirror,
            "fill": self.fill,
            "remove": self.remove,
            "differences": self.differences,
            "digest": self.digest,
            "index_layer": self.index_layer,
            "merge_layers": self.merge_layers,
        }
        return jobs[name](**arguments)

    def measure(self, *, source: list[Any], previous: str, limits: list[int] | None) -> dict[str, Any]:
        """Return the maximum number of bytes that a snapshot has to copy, and the number of entries."""
        with CheckedFolder(*source).open() as folder:
            found = measure(folder, self._load(previous), self.interrupt, _limits(limits))
        return {"bytes": found.bytes, "entries": found.entries}

    def longest_path(self, *, source: list[Any]) -> dict[str, Any]:
        """Return the length in bytes of the longest path in a tree."""
        with CheckedFolder(*source).open() as folder:
            return {"bytes": longest_path(folder, self.interrupt)}

    def gather(self, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - the arguments of `_snapshot_pass`
        """Copy most of a source that may change meanwhile into a snapshot."""
        with self._snapshot_pass(**arguments) as work:
            self._gather_passes(work)
        return {}

    def complete(self, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - the arguments of `_snapshot_pass`
        """Make a snapshot equal to a source that does not change."""
        with self._snapshot_pass(**arguments) as work:
            self._pass(work, still=True)
        return {}

    def check(self, *, partial: str) -> dict[str, Any]:
        """Write a completed snapshot to disk and check it against its index; returns its size."""
        with CheckedFolder(partial).open() as state, CheckedFolder(f"{partial}/{TREE_NAME}").open() as tree:
            index = load_index(state, same_boot=True)
            if index is None or not index.complete:
                raise JobRefusedError("the snapshot is incomplete, or the machine has rebooted since")
            sync_filesystem(tree)
            size, new = _checked_sizes(tree, index, self.interrupt)
        return {"bytes": size, "new_bytes": new, "entries": len(index) - 1, "cloned": index.cloned}

    def mirror(
        self,
        *,
        source: list[Any],
        target: list[Any],
        hidden: str,
        still: bool,
        quiet: bool,
        limits: list[int] | None,
        total: int = 0,
        durable: bool = False,
    ) -> dict[str, Any]:
        """Make one tree equal to another. The index is kept in the folder `hidden` of the target.

        `still`: the source does not change and this is the last pass, which removes the folder. `total`: the bytes on
        disk of the source, if they have been measured. `durable`: write the copy to disk.
        """
        with CheckedFolder(*source).open() as from_, CheckedFolder(*target).open() as into:
            _lock(into, CheckedFolder(*target).path)
            with suppress(FileExistsError):
                os.mkdir(hidden, 0o700, dir_fd=into)
            state = os.open(hidden, FOLDER_FLAGS, dir_fd=into)
            try:
                report = ProgressReporter(self.send)
                report.total = total
                work = PassInput(
                    from_, into, state, None, clones=True, quiet=quiet, report=report, limits=_limits(limits),
                    hidden=hidden,
                )  # fmt: skip
                if still:
                    self._pass(work, still=True)
                else:
                    self._gather_passes(work)
            finally:
                os.close(state)
            if still:
                self.index = None
                _remove_hidden(into, hidden, self.interrupt)
            if durable:
                sync_filesystem(into)
        return {}

    def fill(self, *, source: list[Any], target: list[Any], hidden: str, total: int, clones: bool) -> dict[str, Any]:
        """Empty a tree, copy another tree that does not change into it, and compare the two."""
        with CheckedFolder(*source).open() as from_, CheckedFolder(*target).open() as into:
            _lock(into, CheckedFolder(*target).path)
            empty_folder(into, self.interrupt)
            os.mkdir(hidden, 0o700, dir_fd=into)
            state = os.open(hidden, FOLDER_FLAGS, dir_fd=into)
            try:
                report = ProgressReporter(self.send)
                report.total = total
                entry_copier = EntryCopier(self.interrupt, report.add, clones=clones)
                mirror = Mirror(
                    from_, into, state, entry_copier, self.interrupt, previous=None, live=False, quiet=True,
                    handled=report.add, hidden=hidden,
                )  # fmt: skip
                mirror.run(Index(os.fstat(from_).st_dev))
            finally:
                os.close(state)
            _remove_hidden(into, hidden, self.interrupt)
            if found := differences(f"/proc/self/fd/{from_}/.", f"/proc/self/fd/{into}/.", self.interrupt):
                raise JobRefusedError(f"the copy differs from the source: {'; '.join(found)}")
            # The source may be removed next; the copy must survive a power failure.
            sync_filesystem(into)
        return {}

    def remove(self, *, parent: str, name: str) -> dict[str, Any]:
        """Remove a folder with everything in it."""
        with CheckedFolder(parent).open() as folder:
            remove_entry(folder, name, self.interrupt)
        return {}

    def differences(self, *, old: str, new: str) -> dict[str, Any]:
        """Return the first differences between two trees that do not change."""
        return {"found": differences(old, new, self.interrupt)}

    def digest(self, *, root: str) -> dict[str, Any]:
        """Return the digest of a tree, and its numbers of entries and bytes."""
        found = digest_tree(root, self.interrupt)
        return {"entries": found.entries, "content_bytes": found.content_bytes, "sha256": found.sha256}

    # -- layers of images --------------------------------------------------------------------------------------------

    def index_layer(self, *, digest: str, path: str) -> dict[str, Any]:
        """Index the tar of an image layer; the index stays in memory. See `LayerJobs.index`."""
        return self._layer_jobs().index(digest=digest, path=path)

    def merge_layers(self, *, upper: list[list[str]], below: list[str], target: str) -> dict[str, Any]:
        """Merge layers to one. See `LayerJobs.merge`."""
        return self._layer_jobs().merge(upper=upper, below=below, target=target)

    def _layer_jobs(self) -> LayerJobs:
        if self.layers is None:
            from gpudock_server.adapters.host.trees.layer_jobs import LayerJobs  # noqa: PLC0415 - tarfile takes long to load

            self.layers = LayerJobs(self.interrupt)
        return self.layers

    # -- passes ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _snapshot_pass(
        self, *, source: list[Any], partial: str, previous: str, clones: bool, quiet: bool, limits: list[int] | None
    ) -> Iterator[PassInput]:
        with ExitStack() as stack:
            from_ = stack.enter_context(CheckedFolder(*source).open())
            yield PassInput(
                source=from_,
                target=stack.enter_context(CheckedFolder(f"{partial}/{TREE_NAME}").open()),
                state=stack.enter_context(CheckedFolder(partial).open()),
                previous=None if clones else self._copies_of(previous, from_, stack),
                clones=clones,
                quiet=quiet,
                report=ProgressReporter(self.send),
                limits=_limits(limits),
            )

    def _gather_passes(self, work: PassInput) -> None:
        """Run passes until one finds little to copy, or the source changes as fast as it is copied."""
        if not work.report.total:
            work.report.total = measure(work.source, None, self.interrupt, work.limits).bytes
        # One sync is faster than EntryCopier.write_back of each file.
        sync_filesystem(work.source)
        before: PassCounts | None = None
        for _ in range(_MAX_PASSES):
            moved = self._pass(work, still=False)
            if moved.bytes <= _SMALL_PASS_BYTES and moved.entries <= _SMALL_PASS_ENTRIES:
                return
            if before and moved.bytes > before.bytes // 2 and moved.entries > before.entries // 2:
                return
            before = moved

    def _pass(self, work: PassInput, *, still: bool) -> PassCounts:
        """Copy what has changed since the last pass. The index is removed first: a partial tree is never trusted."""
        index, self.index = self.index or load_index(work.state, same_boot=True), None
        remove_index(work.state)
        if index is None or index.device != os.fstat(work.source).st_dev:
            return self._pass_from_start(work, still=still)
        try:
            return self._pass_from(index, work, still=still)
        except OSError as error:
            # Files that the source no longer has are removed last; the target may not have enough space for both.
            if not work.hidden or error.errno not in _NO_SPACE_ERRNOS:
                raise
        return self._pass_from_start(work, still=still)

    def _pass_from_start(self, work: PassInput, *, still: bool) -> PassCounts:
        """Empty the target and copy everything."""
        self._start_over(work)
        return self._pass_from(Index(os.fstat(work.source).st_dev), work, still=still)

    def _pass_from(self, index: Index, work: PassInput, *, still: bool) -> PassCounts:
        entry_copier = EntryCopier(self.interrupt, work.report.add, clones=work.clones)
        mirror = Mirror(
            work.source, work.target, work.state, entry_copier, self.interrupt, previous=work.previous, live=not still,
            quiet=work.quiet, handled=work.report.add, hidden=work.hidden, limits=work.limits,
        )  # fmt: skip
        fresh = mirror.run(index)
        fresh.complete, fresh.cloned = still, entry_copier.clones
        self._save(fresh, work)
        self.index = fresh
        return mirror.moved

    def _save(self, index: Index, work: PassInput) -> None:
        """Save the index for the next pass.

        An index in the tree of the target is not needed after the last pass. If there is no space for it, the next pass
        copies everything again.
        """
        if not work.hidden:
            save_index(index, work.state)
        elif not index.complete:
            try:
                save_index(index, work.state)
            except OSError as error:
                if error.errno not in _NO_SPACE_ERRNOS:
                    raise
                empty_folder(work.state, self.interrupt)

    def _start_over(self, work: PassInput) -> None:
        """Empty the target, except for the folder `hidden`."""
        with os.scandir(work.target) as entries:
            names = [entry.name for entry in entries if entry.name != work.hidden]
        for name in names:
            remove_entry(work.target, name, self.interrupt)

    def _load(self, previous: str) -> Index | None:
        """Load the index of a sealed snapshot ("": none); None if there is no snapshot to share files with."""
        if self.previous_path != previous:
            self.previous = None
            if previous:
                try:
                    with CheckedFolder(previous).open() as folder:
                        self.previous = load_index(folder, same_boot=False)
                except FileNotFoundError:
                    self.previous = None
            self.previous_path = previous
        return self.previous

    def _copies_of(self, previous: str, source: int, stack: ExitStack) -> CopyIndex | None:
        index = self._load(previous)
        if index is None:
            return None
        try:
            tree = stack.enter_context(CheckedFolder(f"{previous}/{TREE_NAME}").open())
        except FileNotFoundError:  # the snapshot was removed, so nothing can be shared
            return None
        copies = CopyIndex(index, tree, os.fstat(source).st_dev)
        stack.callback(copies.open_folders.close)
        return copies


def _limits(values: list[int] | None) -> Limits | None:
    return Limits(*values) if values else None


def _remove_hidden(root: int, hidden: str, interrupt: Interrupt) -> None:
    """Remove the folder of the index; the times of the root are kept."""
    times = os.fstat(root)
    remove_entry(root, hidden, interrupt)
    os.utime(root, ns=(times.st_atime_ns, times.st_mtime_ns))


def _lock(folder: int, path: str) -> None:
    """Lock the target tree until its descriptor is closed. Raises JobRefusedError.

    The child of a killed daemon may hold the lock for a moment, until the kernel has ended it.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise JobRefusedError(f"{path} is locked by another copy") from None
            time.sleep(_PROGRESS_SECONDS)
        else:
            return


def _checked_sizes(tree: int, index: Index, interrupt: Interrupt) -> tuple[int, int]:
    """Return the bytes on disk of a tree, every inode counted once, and the part that no older snapshot shares.

    Raises JobRefusedError if the tree does not match the index: the names in each folder, the inode of each copy, its
    type, mode, owner and length, and the opaque attribute of folders.
    """
    found: dict[int, tuple[int, bool]] = {}
    if index.root is None or (problem := _problem(tree, ".", os.fstat(tree), index.root)):
        raise JobRefusedError(f"the copy of / {problem if index.root else 'is not in the index'}")
    with OpenFolders(tree, index.folder_tree) as open_folders:
        for folder, entries in enumerate(index.entries):
            here = open_folders.enter(folder)
            with os.scandir(here) as listed:
                names = {item.name for item in listed}
            if names != entries.keys():
                different = index.folder_tree.shown(folder, next(iter(names ^ entries.keys())))
                raise JobRefusedError(f"{different} is missing in the copy or in the index")
            for name, entry in entries.items():
                interrupt.check()
                status = os.stat(name, dir_fd=here, follow_symlinks=False)
                if problem := _problem(here, name, status, entry):
                    raise JobRefusedError(f"the copy of {index.folder_tree.shown(folder, name)} {problem}")
                found[status.st_ino] = (status.st_blocks * _BLOCK_BYTES, entry.shared)
    return sum(size for size, _ in found.values()), sum(size for size, shared in found.values() if not shared)


def _problem(folder: int, name: str, status: os.stat_result, entry: IndexEntry) -> str:
    """Why a copy does not match its index entry; empty if it does."""
    if not _is_as(status, entry):
        return "does not match what was copied"
    if entry.is_folder:
        try:
            mark = os.getxattr(f"/proc/self/fd/{folder}/{name}", OPAQUE_XATTR, follow_symlinks=False)
        except OSError:
            mark = b""
        if (mark == b"y") != entry.opaque:
            return f"does not match what was copied: {OPAQUE_XATTR} differs"
    return ""


def _is_as(status: os.stat_result, entry: IndexEntry) -> bool:
    _, _, _, size, mode, uid, gid, rdev = entry.key
    if status.st_ino != entry.copy or (status.st_mode, status.st_uid, status.st_gid) != (mode, uid, gid):
        return False
    if stat.S_ISREG(mode):
        return status.st_size == size
    return is_whiteout(status) or stat.S_ISDIR(mode) or key_of(status)[7] == rdev
