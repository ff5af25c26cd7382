"""The jobs of the child process. See `worker` for how they are called, and `child` for what runs them.

Arguments and results are JSON. A source or a target is named by its path and, where that was checked before, by the
device and inode that the path has to lead to.
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
from gpudock_server.adapters.host.trees.mirror import CopyIndex, Mirror, PassCounts, measure
from gpudock_server.adapters.host.trees.path_length import longest_path
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
# A pass that moved no more than this leaves little to the one that finds the source still.
_SMALL_PASS_BYTES = 8 << 20
_SMALL_PASS_ENTRIES = 200
_PROGRESS_SECONDS = 0.25
_LOCK_SECONDS = 10.0
_BLOCK_BYTES = 512
_NO_SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})


class JobRefusedError(Exception):
    """What a job was to work on is not what it was said to be, or is in use; the text says in what."""


class ProgressReporter:
    """Sends progress to the parent, about four times a second. `total` 0 is not known."""

    def __init__(self, send: Callable[[int, int], None]) -> None:
        self._send = send
        self._next = 0.0
        self.current = 0
        self.total = 0

    def add(self, count: int) -> None:
        """So many bytes more were copied or shared."""
        self.current += count
        if (moment := time.monotonic()) >= self._next:
            self._next = moment + _PROGRESS_SECONDS
            self._send(min(self.current, self.total) if self.total else self.current, self.total)


@dataclass(frozen=True, slots=True)
class CheckedFolder:
    """A folder: its path, and what device and inode it must have (0: any)."""

    path: str
    device: int = 0
    inode: int = 0

    @contextmanager
    def opened(self) -> Iterator[int]:
        """Its descriptor; a symbolic link in its place is refused, and so is another folder."""
        descriptor = os.open(self.path, FOLDER_FLAGS)
        try:
            found = os.fstat(descriptor)
            if self.inode and (found.st_dev, found.st_ino) != (self.device, self.inode):
                raise JobRefusedError(f"{self.path} is another folder than before")
            yield descriptor
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class PassInput:
    """What a pass works on, all folders open. `state` holds the index; `hidden` is its name if it is in the target."""

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
    """The jobs, with what one leaves in memory for the next one of the same operation."""

    send: Callable[[int, int], None]
    interrupt: Interrupt = field(default_factory=Interrupt)
    index: Index | None = None
    previous: Index | None = None
    previous_path: str = ""
    layers: LayerJobs | None = None

    def run(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Run one job to its end. Raises what goes wrong."""
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
        """The bytes that a snapshot has to copy at most, and the number of entries."""
        with CheckedFolder(*source).opened() as folder:
            found = measure(folder, self._load(previous), self.interrupt, _limits(limits))
        return {"bytes": found.bytes, "entries": found.entries}

    def longest_path(self, *, source: list[Any]) -> dict[str, Any]:
        """The length in bytes of the longest path in a tree."""
        with CheckedFolder(*source).opened() as folder:
            return {"bytes": longest_path(folder, self.interrupt)}

    def gather(self, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - as `_snapshot_pass` takes them
        """Bring a snapshot close to a source that may change meanwhile."""
        with self._snapshot_pass(**arguments) as work:
            self._gather_passes(work)
        return {}

    def complete(self, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - as `_snapshot_pass` takes them
        """Make a snapshot equal to a source that is still."""
        with self._snapshot_pass(**arguments) as work:
            self._pass(work, still=True)
        return {}

    def check(self, *, partial: str) -> dict[str, Any]:
        """Whether a completed snapshot is what its index says, on the disk; its size."""
        with CheckedFolder(partial).opened() as state, CheckedFolder(f"{partial}/{TREE_NAME}").opened() as tree:
            index = load_index(state, same_boot=True)
            if index is None or not index.complete:
                raise JobRefusedError("the snapshot was not completed, or the machine was restarted since")
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
        """Make one tree equal to another. What was done so far is kept in the folder `hidden` of the target.

        `still`: the source does not change, and this is the last pass; the folder is removed. `total`: the bytes of
        disk that the source takes, where they were measured already. `durable`: what was copied is on the disk at the
        end.
        """
        with CheckedFolder(*source).opened() as from_, CheckedFolder(*target).opened() as into:
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
        """Make a tree equal to another that does not change, whatever it was before, and compare the two."""
        with CheckedFolder(*source).opened() as from_, CheckedFolder(*target).opened() as into:
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
                raise JobRefusedError(f"the copy is not equal: {'; '.join(found)}")
            # The original may be removed soon after; a power failure then must not find the copy unwritten.
            sync_filesystem(into)
        return {}

    def remove(self, *, parent: str, name: str) -> dict[str, Any]:
        """Remove a folder with all that is in it."""
        with CheckedFolder(parent).opened() as folder:
            remove_entry(folder, name, self.interrupt)
        return {}

    def differences(self, *, old: str, new: str) -> dict[str, Any]:
        """The first few differences between two trees that do not change."""
        return {"found": differences(old, new, self.interrupt)}

    def digest(self, *, root: str) -> dict[str, Any]:
        """All that a tree holds, as one number."""
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
            from_ = stack.enter_context(CheckedFolder(*source).opened())
            yield PassInput(
                source=from_,
                target=stack.enter_context(CheckedFolder(f"{partial}/{TREE_NAME}").opened()),
                state=stack.enter_context(CheckedFolder(partial).opened()),
                previous=None if clones else self._copies_of(previous, from_, stack),
                clones=clones,
                quiet=quiet,
                report=ProgressReporter(self.send),
                limits=_limits(limits),
            )

    def _gather_passes(self, work: PassInput) -> None:
        """Pass after pass, until one finds little, or the source changes as fast as it is copied."""
        if not work.report.total:
            work.report.total = measure(work.source, None, self.interrupt, work.limits).bytes
        sync_filesystem(
            work.source
        )  # in one go, which is quicker than each file by itself (see EntryCopier.write_back)
        before: PassCounts | None = None
        for _ in range(_MAX_PASSES):
            moved = self._pass(work, still=False)
            if moved.bytes <= _SMALL_PASS_BYTES and moved.entries <= _SMALL_PASS_ENTRIES:
                return
            if before and moved.bytes > before.bytes // 2 and moved.entries > before.entries // 2:
                return
            before = moved

    def _pass(self, work: PassInput, *, still: bool) -> PassCounts:
        """Bring what changed since the last pass. While it works there is no index, so a torn tree is never trusted."""
        index, self.index = self.index or load_index(work.state, same_boot=True), None
        remove_index(work.state)
        if index is None or index.device != os.fstat(work.source).st_dev:
            return self._pass_anew(work, still=still)
        try:
            return self._pass_from(index, work, still=still)
        except OSError as error:
            # What is gone from the source goes last from the target, which may have no room for both.
            if not work.hidden or error.errno not in _NO_SPACE_ERRNOS:
                raise
        return self._pass_anew(work, still=still)

    def _pass_anew(self, work: PassInput, *, still: bool) -> PassCounts:
        """Bring everything to a target that is emptied first."""
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
        """Write the index down for the next pass.

        In the target's own tree nothing needs it after the last pass; and where there is no room for it beside the
        files, the next pass copies everything again.
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
        """Empty the target, all but the state that may lie in it."""
        with os.scandir(work.target) as entries:
            names = [entry.name for entry in entries if entry.name != work.hidden]
        for name in names:
            remove_entry(work.target, name, self.interrupt)

    def _load(self, previous: str) -> Index | None:
        """The index of a sealed snapshot, "" for none; None where there is nothing to share with."""
        if self.previous_path != previous:
            self.previous = None
            if previous:
                try:
                    with CheckedFolder(previous).opened() as folder:
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
            tree = stack.enter_context(CheckedFolder(f"{previous}/{TREE_NAME}").opened())
        except FileNotFoundError:  # removed since: then there is nothing to share
            return None
        copies = CopyIndex(index, tree, os.fstat(source).st_dev)
        stack.callback(copies.open_folders.close)
        return copies


def _limits(values: list[int] | None) -> Limits | None:
    return Limits(*values) if values else None


def _remove_hidden(root: int, hidden: str, interrupt: Interrupt) -> None:
    """Remove the folder of the state; the root's times stay what they are."""
    times = os.fstat(root)
    remove_entry(root, hidden, interrupt)
    os.utime(root, ns=(times.st_atime_ns, times.st_mtime_ns))


def _lock(folder: int, path: str) -> None:
    """Lock a tree that is going to be filled, for as long as its descriptor is open.

    A child that outlived a killed daemon keeps the next one out, for the moment until the kernel has ended it.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise JobRefusedError(f"another process is still copying to {path}") from None
            time.sleep(_PROGRESS_SECONDS)
        else:
            return


def _checked_sizes(tree: int, index: Index, interrupt: Interrupt) -> tuple[int, int]:
    """Bytes of disk that a tree takes, every inode once, and those of them that it shares with nothing older.

    Raises JobRefusedError when the tree is not what the index says: each folder has the names that it should have, each
    name its copy, and each copy the type, mode, owner and length of what was copied, a folder its opaque mark too.
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
                raise JobRefusedError(f"{different} is in the copy or in the index, not in both")
            for name, entry in entries.items():
                interrupt.check()
                status = os.stat(name, dir_fd=here, follow_symlinks=False)
                if problem := _problem(here, name, status, entry):
                    raise JobRefusedError(f"the copy of {index.folder_tree.shown(folder, name)} {problem}")
                found[status.st_ino] = (status.st_blocks * _BLOCK_BYTES, entry.shared)
    return sum(size for size, _ in found.values()), sum(size for size, shared in found.values() if not shared)


def _problem(folder: int, name: str, status: os.stat_result, entry: IndexEntry) -> str:
    """What is wrong with a copy, in words; empty when nothing is."""
    if not _is_as(status, entry):
        return "is not what was copied"
    if entry.is_folder:
        try:
            mark = os.getxattr(f"/proc/self/fd/{folder}/{name}", OPAQUE_XATTR, follow_symlinks=False)
        except OSError:
            mark = b""
        if (mark == b"y") != entry.opaque:
            return f"differs from what was copied in {OPAQUE_XATTR}"
    return ""


def _is_as(status: os.stat_result, entry: IndexEntry) -> bool:
    _, _, _, size, mode, uid, gid, rdev = entry.key
    if status.st_ino != entry.copy or (status.st_mode, status.st_uid, status.st_gid) != (mode, uid, gid):
        return False
    if stat.S_ISREG(mode):
        return status.st_size == size
    return is_whiteout(status) or stat.S_ISDIR(mode) or key_of(status)[7] == rdev
