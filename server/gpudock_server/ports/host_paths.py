"""Host paths that containers mount."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class HostPaths(Protocol):
    """Binds host paths to places of the daemon's own, which are given to the engine in their stead.

    The engine resolves a path again at every start, and a container can exchange what lies in a folder that it may
    write to. Raises HostPathForbidden for a path that may not be mounted, or leads through a symbolic link, or is not
    there; HostPathFailed where the host refuses; EngineUnavailable, since it is asked where it sees the host's files.
    """

    async def check(self, paths: Sequence[str]) -> None:
        """Whether each may be mounted now. Nothing is changed."""
        ...

    async def bind(self, name: str, paths: Sequence[str], *, renew: bool = True) -> dict[str, str]:
        """Bind each for the engine container `name`; host path -> what the engine is to mount for it.

        One that is bound already is resolved again, and bound to what it leads to now. With `renew` False it stays as
        it is, for a container that is to run again as it ran before.
        """
        ...

    def source(self, name: str, path: str) -> str:
        """What the engine is given for a host path of the engine container `name`, bound or not."""
        ...

    async def release(self, name: str) -> None:
        """Undo all that was bound for an engine container, which must not exist any more."""
        ...

    async def names(self) -> frozenset[str]:
        """The engine containers that something is bound for."""
        ...
