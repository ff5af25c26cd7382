"""Host paths that containers mount."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class HostPaths(Protocol):
    """Bind-mounts host paths to folders of the daemon, which the engine mounts instead of the host paths.

    Reason: the engine resolves a path again at every start, and a container can replace files in a folder that it may
    write to. Raises HostPathForbidden if a path is not allowed, contains a symbolic link or does not exist;
    HostPathFailed if the host refuses the mount; EngineUnavailable, because the mounts are made in the mount namespace
    of the engine.
    """

    async def check(self, paths: Sequence[str]) -> None:
        """Check that all paths can be mounted now. Changes nothing."""
        ...

    async def bind(self, name: str, paths: Sequence[str], *, renew: bool = True) -> dict[str, str]:
        """Bind the paths for the engine container `name`; returns host path -> path that the engine has to mount.

        A path that is already bound is resolved and bound again. With `renew` False it is kept, for a container that
        must run again with the same files.
        """
        ...

    def source(self, name: str, path: str) -> str:
        """Return the path that the engine mounts for a host path of the engine container `name`, bound or not."""
        ...

    async def release(self, name: str) -> None:
        """Remove all binds of an engine container that no longer exists."""
        ...

    async def names(self) -> frozenset[str]:
        """Return the names of all engine containers that have binds."""
        ...
