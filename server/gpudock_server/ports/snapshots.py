"""Keeping the files of a revision, and bringing them back."""

from __future__ import annotations

from typing import Protocol

from gpudock_server.model.engine import EngineContainer
from gpudock_server.model.record import Record
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotMethod
from gpudock_server.ports.progress import Progress


class LayerTooLarge(Exception):
    """No snapshot is made of a layer with so many, or so deeply nested, files; the text says what is too much."""


class SnapshotPlan(Record):
    """What keeping a layer takes: the bytes that are copied at most (0 where extents are shared), and the room.

    `too_large` says why no snapshot is made of this layer, whatever the room; otherwise it is empty.
    """

    method: SnapshotMethod
    bytes_to_copy: int = 0
    bytes_available: int = 0
    too_large: str = ""


class SnapshotStore(Protocol):
    """Keeps the files of writable layers as trees that never change. Raises SnapshotFailed, DiskFull.

    A snapshot is made in three steps, each of which may be repeated, also by another daemon: `gather`, `complete` and
    `seal`; until the last it is partial and belongs to its operation. `gather` may be left out. `previous` is an
    earlier snapshot of the same container, whose unchanged files are shared; it may be gone, or be of any age.
    After DiskFull nothing is left of the partial one, nor after LayerTooLarge, which `gather` and `complete` raise.
    """

    async def method(self, old: EngineContainer) -> tuple[SnapshotMethod | None, str]:
        """How a container's layer would be kept here; None and the reason where it cannot be."""
        ...

    async def plan(self, old: EngineContainer, previous: SnapshotKey | None) -> SnapshotPlan:
        """What it takes; the container may run."""
        ...

    async def gather(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        """Bring the bulk while the container may run, so that little is left to do when it does not."""
        ...

    async def complete(
        self,
        old: EngineContainer,
        key: SnapshotKey,
        operation_id: str,
        previous: SnapshotKey | None,
        progress: Progress,
    ) -> None:
        """Bring what changed since. The caller keeps the container still: it is paused or does not run.

        The time grows with the number of entries and with the files that changed. What was brought is in memory; only
        `seal` has it on the disk.
        """
        ...

    async def seal(self, key: SnapshotKey, operation_id: str, image_id: str) -> Snapshot:
        """Have it on the disk and make it final. Fails when the machine was started anew since `complete`."""
        ...

    async def discard(self, key: SnapshotKey, operation_id: str) -> None:
        """Remove what an operation made under this key, sealed or not; what another one made stays."""
        ...

    async def restore(self, key: SnapshotKey, target: EngineContainer, progress: Progress) -> None:
        """Make the layer of a container that never ran equal to a sealed snapshot of the same image, and verify it."""
        ...

    async def mirror(
        self, source: EngineContainer, target: EngineContainer, operation_id: str, *, still: bool, progress: Progress
    ) -> None:
        """Make the layer of a container that never ran equal to another's of the same image.

        First, as often as wanted, while the source may run; last with `still`, when the caller keeps it still. Only
        after that one may the target be started.
        """
        ...

    async def remove(self, key: SnapshotKey) -> None:
        """Remove a sealed snapshot. Others that share files with it keep them."""
        ...

    async def remove_all(self, uid: str) -> None:
        """Remove everything of a container, partial ones too."""
        ...

    async def sealed(self, key: SnapshotKey) -> Snapshot | None:
        """What is known of a sealed snapshot; None where there is none, or it cannot be read."""
        ...

    async def find(self) -> tuple[SnapshotKey, ...]:
        """Every sealed snapshot."""
        ...

    async def partials(self) -> tuple[tuple[SnapshotKey, str], ...]:
        """Every partial one with the operation that it belongs to."""
        ...
