"""Bind each host path of each engine container to a bind target that only root can access.

    /run/gpudock-host-paths/<installation>/<engine container>/<digest of the host path>

The engine resolves the source of a bind mount at every start of a container, including restarts by its restart policy.
A container that can write to a folder can replace an entry of it by a symbolic link to `/`, so the engine must not get
a path through such a folder. It gets a bind mount of the file or folder that the daemon opened when it checked the
path, which stays the same when folders are renamed.

The bind targets are below /run, which is empty after a boot: until a path is bound again its target does not exist, so
the engine cannot start the container. Below the state directory an empty folder would be mounted instead, and deleting
the state directory by hand would delete the bound files.
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

from gpudock_server.adapters.host.mounts import read_mounts
from gpudock_server.adapters.host_paths import mount_syscalls
from gpudock_server.adapters.host_paths.allowed_path import PathNotAllowed, is_allowed, not_allowed_reason, open_allowed
from gpudock_server.adapters.host_paths.bind_records import BindRecordDamaged, BindRecords, require_container_name
from gpudock_server.adapters.host_paths.mount_namespace import MountNamespace, MountNamespaceUnavailable
from gpudock_server.errors import HostPathFailed, HostPathForbidden
from gpudock_server.ports import HostPaths

T = TypeVar("T")

_ROOT: Final = Path("/run/gpudock-host-paths")
_PRIVATE: Final = 0o700


@dataclass(frozen=True, slots=True)
class RestoreFailure:
    """A host path that could not be bound, and why; the engine container that mounts it will not start."""

    engine_container: str
    host_path: str
    detail: str


class HostPathBinder(HostPaths):
    """Implements ports.HostPaths for an engine on this host."""

    def __init__(self, state_dir: Path, allowed: Sequence[str], namespace: MountNamespace | None) -> None:
        """`allowed`: absolute folders. `namespace` None: the engine runs on another host, so nothing can be bound."""
        installation = hashlib.sha256(os.fsencode(state_dir)).hexdigest()[:16]
        self._root = _ROOT / installation
        self._records = BindRecords(state_dir / "host-paths")
        self._allowed = tuple(allowed)
        self._namespace = namespace
        # Engine containers with binds but without a record, because the state directory was lost.
        self._unrecorded = frozenset[str]()

    # -- the port ----------------------------------------------------------------------------------------------------

    @override
    async def check(self, paths: Sequence[str]) -> None:
        for path in paths:
            # Before any call to the engine: paths that are not allowed must not be opened.
            if reason := not_allowed_reason(path, self._allowed):
                raise self._forbidden(path, reason)
        for path in paths:
            await self._run(path, lambda path=path: self._check(path))  # type: ignore[misc]  # mypy cannot infer lambdas with defaults

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
        """Bind all recorded paths that are not bound; returns the failures.

        Existing binds are kept, because their containers may be running. Binds that are no longer allowed are removed.
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
                    await self._run(path, lambda name=name, path=path: self._restore(name, path))  # type: ignore[misc]  # mypy cannot infer lambdas with defaults
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
            # Open all paths before the first is bound: if one is refused, nothing changes.
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
        target = self._bind_target(name, path)
        if is_allowed(path, self._allowed) and target in _mount_points():
            return
        try:
            with open_allowed(path, self._allowed) as descriptor:
                _bind_at(target, descriptor)
        except PathNotAllowed as error:
            _remove_bind_target(target)
            raise self._forbidden(path, str(error)) from error

    def _release(self, name: str) -> None:
        folder = self._root / require_container_name(name)
        with suppress(FileNotFoundError):
            for target in list(folder.iterdir()):
                _remove_bind_target(target)
            folder.rmdir()
        # Last: if the daemon is killed before, the next one finds the rest by the record.
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


def _bind_at(target: Path, descriptor: int) -> None:
    """Bind the open file or folder at `target`, which exists only if something is bound there."""
    expected = os.fstat(descriptor)
    with suppress(FileNotFoundError):
        found = target.stat(follow_symlinks=False)
        if (found.st_dev, found.st_ino) == (expected.st_dev, expected.st_ino):
            return
        _remove_bind_target(target)
    for folder in (_ROOT, target.parent.parent, target.parent):
        folder.mkdir(mode=_PRIVATE, exist_ok=True)
    if stat.S_ISDIR(expected.st_mode):
        target.mkdir(mode=0)
    else:
        target.touch(mode=0, exist_ok=False)
    try:
        mount_syscalls.bind(descriptor, target)
    except OSError:
        _remove_bind_target(target)
        raise


def _remove_bind_target(target: Path) -> None:
    """Unmount a bind target and remove it; never the files that were bound.

    rmdir and unlink fail with EBUSY while something is mounted.
    """
    mount_syscalls.detach(target)
    try:
        found = target.stat(follow_symlinks=False)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        target.rmdir()
    else:
        target.unlink()


def _mount_points() -> frozenset[Path]:
    """Return the mount points below the root of all binds."""
    return frozenset(mount.point for mount in read_mounts() if mount.point.is_relative_to(_ROOT))
