"""Snapshots of the files of a revision."""

from __future__ import annotations

from typing import Protocol

from gpudock_server.model.engine import EngineContainer
from gpudock_server.model.record import Record
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotMethod
from gpudock_server.ports.progress import Progress


class LayerTooLarge(Exception):
    """The layer has too many or too deeply nested files for a snapshot; the message says which limit it exceeds."""


class SnapshotPlan(Record):
    """The cost of a snapshot: the maximum of bytes that are copied (0 if extents are shared), and the free bytes.

    `too_large` says which limit the layer exceeds; empty if it exceeds none.
    """

    method: SnapshotMethod
    bytes_to_copy: int = 0
    bytes_available: int = 0
    too_large: str = ""


class SnapshotStore(Protocol):
    """Keeps the files of writable layers as immutable trees. Raises SnapshotFailed, DiskFull.

    A snapshot is made in three steps, `gather` (optional), `complete` and `seal`. Each may be repeated, also by another
    daemon. Until `seal` the snapshot is partial and belongs to its operation. `previous` is an earlier snapshot of the
    same container, with which unchanged files are shared; it may have any age, or no longer exist. After DiskFull or
    LayerTooLarge, which `gather` and `complete` raise, the partial snapshot has been removed.
    """

    async def method(self, old: EngineContainer) -> tuple[SnapshotMethod | None, str]:
        """Return the method for a container's layer on this host; None and the reason if no snapshot can be made."""
        ...

    async def plan(self, old: EngineContainer, previous: SnapshotKey | None) -> SnapshotPlan:
        """Return the cost of a snapshot; the container may run."""
        ...

    async def gather(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        """Copy most of the files while the container may run, so that `complete` has little left to copy."""
        ...

    async def complete(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        """Copy what has changed since `gather`. The container must be paused or stopped.

        The time grows with the number of entries and of changed files. The copy is in the page cache; only `seal`
        writes it to disk.
        """
        ...

    async def seal(self, key: SnapshotKey, operation_id: str, image_id: str) -> Snapshot:
        """Write the snapshot to disk and make it final. Fails if the machine has rebooted since `complete`."""
        ...

    async def discard(self, key: SnapshotKey, operation_id: str) -> None:
        """Remove the snapshot of this key, sealed or partial, if this operation made it."""
        ...

    async def restore(self, key: SnapshotKey, target: EngineContainer, progress: Progress) -> None:
        """Fill the layer of a container that never ran from a sealed snapshot of the same image, and verify it."""
        ...

    async def mirror(
        self, source: EngineContainer, target: EngineContainer, operation_id: str, *, still: bool, progress: Progress
    ) -> None:
        """Make the layer of a container that never ran equal to that of another container of the same image.

        May be repeated while the source runs. The last call, with `still`, needs a source that is paused or stopped;
        the target may be started only after it.
        """
        ...

    async def remove(self, key: SnapshotKey) -> None:
        """Remove a sealed snapshot. Snapshots that share files with it keep them."""
        ...

    async def remove_all(self, uid: str) -> None:
        """Remove all snapshots of a container, including partial ones."""
        ...

    async def sealed(self, key: SnapshotKey) -> Snapshot | None:
        """Return the record of a sealed snapshot; None if it does not exist or cannot be read."""
        ...

    async def find(self) -> tuple[SnapshotKey, ...]:
        """Return the keys of all sealed snapshots."""
        ...

    async def partials(self) -> tuple[tuple[SnapshotKey, str], ...]:
        """Return the keys of all partial snapshots with their operations."""
        ...
