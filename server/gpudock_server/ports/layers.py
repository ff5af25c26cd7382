"""Carrying a writable layer from a container to its successor."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Protocol

from gpudock_server.model.engine import EngineContainer, EngineImage, ImageAccounts
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.record import Record
from gpudock_server.ports.progress import Progress


class LayerTransferPlan(Record):
    """How a layer would be carried: see OperationPlan. `bytes_to_move` is 0 where nothing is copied."""

    method: LayerTransferMethod
    bytes_to_move: int = 0
    bytes_available: int = 0
    warnings: tuple[str, ...] = ()


class CommitCost(Record):
    """What an image of a container's files costs. `measured` False: the layer is out of reach, and nothing is known.

    `apparent_bytes` is what the engine writes, `allocated_bytes` what the layer takes on the disk: less, where files
    have holes. `warnings` say what is lost in the image.
    """

    measured: bool = False
    apparent_bytes: int = 0
    allocated_bytes: int = 0
    entries: int = 0
    bytes_available: int = 0
    warnings: tuple[str, ...] = ()


class LayerPair(Record):
    """The writable layers of a container and its successor, as they were before anything moved.

    Both paths were checked to be what the engine says they are. The inode numbers tell afterwards which of the two
    trees stands where: an exchange that may or may not have happened is found out, never guessed.
    """

    old_path: str
    old_inode: int
    new_path: str
    new_inode: int


class LayerStore(Protocol):
    """Carries a writable layer between two containers that do not run. Raises LayerCarryFailed, DiskFull.

    `exchange`, `exchange_back` and `copy` may be repeated: done twice is done once.
    """

    async def methods(self) -> tuple[tuple[LayerTransferMethod, str], ...]:
        """Each method with the reason why it is not available here; an empty reason means that it is."""
        ...

    async def plan(self, old: EngineContainer) -> LayerTransferPlan:
        """The best method for a container's layer on this host, and what it costs."""
        ...

    async def accounts(self, image: EngineImage, upper_dir: str = "") -> ImageAccounts | None:
        """The users and groups in an image's /etc/passwd and /etc/group; None where its files are out of reach.

        With `upper_dir`, as a container has them whose writable layer is at that path, on top of the image.
        """
        ...

    async def commit_plan(self, container: EngineContainer) -> LayerTransferPlan:
        """What an image of a container's files costs, and what is lost in it; 0 bytes where that cannot be seen."""
        ...

    async def commit_cost(self, container: EngineContainer) -> CommitCost:
        """What an image of a container's files costs, in full. Raises DiskFull, LayerCarryFailed."""
        ...

    async def require_committable(self, container: EngineContainer) -> None:
        """Raises LayerCarryFailed where the engine would leave files out of an image of a container's files.

        Asked again right before a commit, when the files stay as they are. Where the layer is out of reach, nobody can
        tell, and this raises nothing.
        """
        ...

    def report_commit_progress(
        self, container: EngineContainer, total: int, progress: Progress
    ) -> AbstractAsyncContextManager[None]:
        """While it is entered: tell how many bytes of `total` the engine has written of an image of its files.

        Where that cannot be seen, nothing is told. Raises nothing.
        """
        ...

    async def locate(self, old: EngineContainer, new: EngineContainer) -> LayerPair:
        """The two layers, checked: same image, known storage driver, paths that exist and are the engine's.

        Nothing is moved, so the old one may still run.
        """
        ...

    async def exchange(self, pair: LayerPair) -> bool:
        """Swap the two trees. False, with nothing changed, where the kernel refuses across quota boundaries."""
        ...

    async def exchange_back(self, pair: LayerPair) -> None:
        """Undo an exchange if one happened."""
        ...

    async def copy(self, pair: LayerPair, progress: Progress) -> None:
        """Make the new tree equal to the old one and verify that it is."""
        ...
