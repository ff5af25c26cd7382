"""Each host path of each engine container, bound to a place that only root reaches.

    /run/gpudock-host-paths/<installation>/<engine container>/<digest of the host path>

The engine resolves the source of a bind mount at every start of a container, also at those that its restart policy
makes. A container that may write to a folder can exchange what lies in it for a symbolic link to `/`, so the engine is
never given a path that leads through such a folder. It is given a bind mount of the file or folder that the daemon
opened when it checked the path: that stays the same one, whatever is renamed.

The places are below /run, which is empty after a boot: where nothing has been bound again, there is no source, and the
engine cannot start the container. Below the state folder an empty folder would be mounted instead, and whoever deletes
the state folder by hand would delete what is bound in it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from typing_extensions import override

from gpudock_server.adapters.host_paths import mount_syscalls
from gpudock_server.adapters.host_paths.allowed_path import PathNotAllowed, is_allowed, not_allowed_reason, open_allowed
from gpudock_server.adapters.host_paths.bind_records import BindRecordDamaged, BindRecords, require_container_name
from gpudock_server.adapters.host_paths.mount_namespace import MountNamespace, MountNamespaceUnavailable
from gpudock_server.errors import HostPathFailed, HostPathForbidden
from gpudock_server.ports import HostPaths

T = TypeVar("T")

_ROOT: Final = Path("/run/gpudock-host-paths")
_PRIVATE: Final = 0o700
_MOUNT_INFO: Final = Path("/proc/thread-self/mountinfo")
_MOUNT_POINT_FIELD: Final = 4


@dataclass(frozen=True, slots=True)
class RestoreFailure:
    """A host path that could not be bound again, and why. The engine container that mounts it does not start."""

    engine_container: str
    host_path: str
    detail: str


class HostPathBinder(HostPaths):
    """Implements ports.HostPaths for an engine on this host."""

    def __init__(self, state_dir: Path, allowed: Sequence[str], namespace: MountNamespace | None) -> None:
        """`allowed` are absolute folders. `namespace` None: the engine is on another host, so nothing can be bound."""
        installation = hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:16]
        self._root = _ROOT / installation
        self._records = BindRecords(state_dir / "host-paths")
        self._allowed = tuple(allowed)
        self._namespace = namespace
        # Engine containers that something is bound for though the state folder was lost.
        self._unrecorded = frozenset[str]()

    # -- the port ----------------------------------------------------------------------------------------------------

    @override
    async def check(self, paths: Sequence[str]) -> None:
        for path in paths:
            # Also before the engine is asked where it sees them: what is not allowed is not looked at.
            if why := not_allowed_reason(path, self._allowed):
                raise self._forbidden(path, why)
        for path in paths:
            await self._run(path, lambda path=path: self._check(path))  # type: ignore[misc]  # mypy infers no lambda with a default

    @override
    async def bind(self, name: str, paths: Sequence[str], *, renew: bool = True) -> dict[str, str]:
        if paths:
            await self.check([path for path in paths if not is_allowed(path, self._allowed)])
            await self._run(paths[0], lambda: self._bind(name, tuple(dict.fromkeys(paths)), renew=renew))
        return {path: self.source(name, path) for path in paths}

    @override
    def source(self, name: str, path: str) -> str:
        return str(self._bind_target(name, path))

    @override
    async def release(self, name: str) -> None:
        if self._records.has(name) or name in self._unrecorded:
            await self._run(name, lambda: self._release(name))

    @override
    async def names(self) -> frozenset[str]:
        if self._namespace is None:
            return frozenset()
        return await self._run("", self._names)

    # -- after a boot ------------------------------------------------------------------------------------------------

    async def restore(self) -> tuple[RestoreFailure, ...]:
        """Bind again what is recorded and not bound; one that cannot be bound does not keep others from it.

        What is bound stays as it is: its container may run. What is not allowed any more is removed.
        """
        problems: list[RestoreFailure] = []
        for name in list(self._records.names()):
            try:
                paths = self._records.read(name)
            except BindRecordDamaged as error:
                problems.append(RestoreFailure(name, "", str(error)))
                continue
            for path in paths:
                try:
                    await self._run(path, lambda name=name, path=path: self._restore(name, path))  # type: ignore[misc]  # as above
                except (HostPathForbidden, HostPathFailed) as error:
                    problems.append(RestoreFailure(name, path, error.detail))
        return tuple(problems)

    # -- in the engine's mount namespace -----------------------------------------------------------------------------

    async def _run(self, path: str, work: Callable[[], T]) -> T:
        if self._namespace is None:
            raise HostPathFailed(host_path=path, detail="the engine runs on another host")
        if os.geteuid() != 0:
            raise HostPathFailed(host_path=path, detail="the daemon does not run as root")
        try:
            return await self._namespace.run(work)
        except (MountNamespaceUnavailable, OSError) as error:
            raise HostPathFailed(host_path=path, detail=str(error)) from error

    def _check(self, path: str) -> None:
        try:
            with open_allowed(path, self._allowed):
                pass
        except PathNotAllowed as error:
            raise self._forbidden(path, str(error)) from error

    def _bind(self, name: str, paths: Sequence[str], *, renew: bool) -> None:
        bound = frozenset[Path]() if renew else _mount_points()
        with ExitStack() as stack:
            descriptors: dict[str, int] = {}
            # All of them before any is bound: what is refused changes nothing.
            for path in paths:
                if self._bind_target(name, path) in bound:
                    continue
                try:
                    descriptors[path] = stack.enter_context(open_allowed(path, self._allowed))
                except PathNotAllowed as error:
                    raise self._forbidden(path, str(error)) from error
            self._records.write(name, paths)
            for path, descriptor in descriptors.items():
                _bind_at(self._bind_target(name, path), descriptor)

    def _restore(self, name: str, path: str) -> None:
        place = self._bind_target(name, path)
        if is_allowed(path, self._allowed) and place in _mount_points():
            return
        try:
            with open_allowed(path, self._allowed) as descriptor:
                _bind_at(place, descriptor)
        except PathNotAllowed as error:
            _remove_bind_target(place)
            raise self._forbidden(path, str(error)) from error

    def _release(self, name: str) -> None:
        folder = self._root / require_container_name(name)
        with suppress(FileNotFoundError):
            for place in list(folder.iterdir()):
                _remove_bind_target(place)
            folder.rmdir()
        # Last: a daemon that is killed before this finds by the record what is left.
        self._records.remove(name)
        self._unrecorded -= {name}

    def _names(self) -> frozenset[str]:
        recorded = frozenset(self._records.names())
        bound = frozenset(path.name for path in self._root.iterdir()) if self._root.is_dir() else frozenset[str]()
        self._unrecorded = bound - recorded
        return bound | recorded

    def _bind_target(self, name: str, path: str) -> Path:
        return self._root / require_container_name(name) / hashlib.sha256(os.fsencode(path)).hexdigest()[:32]

    def _forbidden(self, path: str, detail: str) -> HostPathForbidden:
        return HostPathForbidden(host_path=path, allowed=self._allowed, detail=detail)


def _bind_at(place: Path, descriptor: int) -> None:
    """Have what is open bound at `place`, which does not exist unless something is bound there."""
    wanted = os.fstat(descriptor)
    with suppress(FileNotFoundError):
        found = place.stat(follow_symlinks=False)
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return
        _remove_bind_target(place)
    for folder in (_ROOT, place.parent.parent, place.parent):
        folder.mkdir(mode=_PRIVATE, exist_ok=True)
    if stat.S_ISDIR(wanted.st_mode):
        place.mkdir(mode=0)
    else:
        place.touch(mode=0, exist_ok=False)
    try:
        mount_syscalls.bind(descriptor, place)
    except OSError:
        _remove_bind_target(place)
        raise


def _remove_bind_target(place: Path) -> None:
    """Unmount what is bound at a place, and remove the place itself; never what was bound there.

    rmdir and unlink refuse (EBUSY) where something is still mounted.
    """
    mount_syscalls.detach(place)
    try:
        found = place.stat(follow_symlinks=False)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        place.rmdir()
    else:
        place.unlink()


def _mount_points() -> frozenset[Path]:
    """Where something is mounted below our root. proc(5) escapes no character that our places have."""
    lines = _MOUNT_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    points = (line.split(" ")[_MOUNT_POINT_FIELD] for line in lines)
    return frozenset(Path(point) for point in points if point.startswith(f"{_ROOT}/"))
