"""Transfer of a writable layer from a container to its successor."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from gpudock_server.model.engine import EngineContainer, EngineImage, ImageAccounts
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.record import Record
from gpudock_server.ports.progress import Progress


class LayerTransferPlan(Record):
    """How a layer would be transferred: see OperationPlan. `bytes_to_move` is 0 if nothing is copied."""

    method: LayerTransferMethod
    bytes_to_move: int = 0
    bytes_available: int = 0
    warnings: tuple[str, ...] = ()


class CommitCost(Record):
    """The cost of a commit. `measured` False: the layer is not accessible, so the cost is unknown.

    `apparent_bytes` is what the engine writes; `allocated_bytes` is the size of the layer on disk, which is smaller if
    files have holes. `warnings` say what the image does not contain.
    """

    measured: bool = False
    apparent_bytes: int = 0
    allocated_bytes: int = 0
    entries: int = 0
    bytes_available: int = 0
    warnings: tuple[str, ...] = ()


class LayerPair(Record):
    """The writable layers of a container and its successor, as they were before the transfer.

    Both paths have been checked to be the layers that the engine reports. The inode numbers show later whether the two
    trees have been exchanged.
    """

    old_path: str
    old_inode: int
    new_path: str
    new_inode: int


class LayerStore(Protocol):
    """Transfers a writable layer between two stopped containers. Raises LayerCarryFailed, DiskFull.

    `exchange`, `exchange_back` and `copy` are idempotent.
    """

    async def methods(self) -> tuple[tuple[LayerTransferMethod, str], ...]:
        """Return each method with the reason why it is not available here; empty if it is available."""
        ...

    async def plan(self, old: EngineContainer) -> LayerTransferPlan:
        """Return the best method for a container's layer on this host, and its cost."""
        ...

    async def accounts(self, image: EngineImage, upper_dir: str = "") -> ImageAccounts | None:
        """The users and groups in an image's /etc/passwd and /etc/group; None if its files cannot be read.

        With `upper_dir`, those of a container of the image whose writable layer is at that path.
        """
        ...

    async def commit_plan(self, container: EngineContainer) -> LayerTransferPlan:
        """Return the cost of a commit and what the image does not contain; 0 bytes if the layer is not accessible."""
        ...

    async def commit_cost(self, container: EngineContainer) -> CommitCost:
        """Measure the cost of a commit. Raises DiskFull, LayerCarryFailed."""
        ...

    async def require_committable(self, container: EngineContainer) -> None:
        """Raise LayerCarryFailed if the engine would leave files out of an image of the container.

        Called again right before a commit, when the files no longer change. If the layer is not accessible, nothing is
        checked.
        """
        ...

    def report_commit_progress(
        self, container: EngineContainer, total: int, progress: Progress
    ) -> AbstractAsyncContextManager[None]:
        """While the context is open, report how many bytes of `total` the engine has written for a commit.

        Reports nothing if that is not visible. Raises nothing.
        """
        ...

    async def locate(self, old: EngineContainer, new: EngineContainer) -> LayerPair:
        """Return both layers after checking them: same image, known storage driver, existing paths of the engine.

        Changes nothing, so the old container may still run.
        """
        ...

    async def exchange(self, pair: LayerPair) -> bool:
        """Exchange the two trees; False, with nothing changed, if the kernel refuses because of project quotas."""
        ...

    async def exchange_back(self, pair: LayerPair) -> None:
        """Undo the exchange if it happened."""
        ...

    async def copy(self, pair: LayerPair, progress: Progress) -> None:
        """Make the new tree equal to the old one and verify it."""
        ...
