"""Work in the mount namespace of the engine.

The engine resolves a bind's source in its own mount namespace. The daemon's may be another one: systemd gives it one
as soon as its unit has ProtectSystem or the like, and mounts made there are seen by nobody else. So host paths are
opened and bound in a thread that has entered the namespace of the process behind the engine's socket. That is the
engine itself or, with socket activation, the host's init, which shares the engine's.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from gpudock_server.adapters.host_paths.mount_syscalls import enter_mount_namespace
from gpudock_server.errors import EngineUnavailable

T = TypeVar("T")

# A path on a network filesystem whose server is away blocks for ever.
_TIMEOUT_SECONDS: Final = 30.0
_CONNECT_SECONDS: Final = 5.0
_CREDENTIALS: Final = struct.Struct("3i")


class MountNamespaceUnavailable(Exception):
    """The engine's mount namespace cannot be entered, or work in it has not ended in time; the text says why."""


class MountNamespace:
    """Runs blocking work in the mount namespace of the engine that listens on a unix socket.

    Without a socket the work runs in the process's own namespace: at boot, before the engine has started.
    """

    def __init__(self, engine_socket: str = "", *, seconds: float = _TIMEOUT_SECONDS) -> None:
        self._socket = engine_socket
        self._seconds = seconds

    async def run(self, work: Callable[[], T]) -> T:
        """What `work` returns. Raises what it raises, EngineUnavailable, and MountNamespaceUnavailable.

        When the caller is cancelled, this still waits for the end of the work: an undo must not run beside it.
        """
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        # A thread of its own and not one of a pool: it cannot leave the namespace again. As a daemon thread, one that
        # never comes back does not keep the process from ending.
        threading.Thread(target=self._run_in_thread, args=(done, work), name="host paths", daemon=True).start()
        running = asyncio.wrap_future(done)
        try:
            await asyncio.wait([running], timeout=self._seconds)
        except asyncio.CancelledError:
            await asyncio.wait([running], timeout=self._seconds)
            raise
        if not running.done():
            raise MountNamespaceUnavailable(f"it has not answered within {self._seconds:g} s")
        return running.result()

    def _run_in_thread(self, done: concurrent.futures.Future[T], work: Callable[[], T]) -> None:
        try:
            if self._socket:
                self._enter()
            result = work()
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's task
            done.set_exception(error)
        else:
            done.set_result(result)

    def _enter(self) -> None:
        pid = self._engine_pid()
        try:
            descriptor = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            try:
                enter_mount_namespace(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise MountNamespaceUnavailable(f"the mount namespace of the engine's process {pid}: {error}") from error

    def _engine_pid(self) -> int:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_CONNECT_SECONDS)
            try:
                connection.connect(self._socket)
            except OSError as error:
                # Nothing is wrong with the path: an undo waits for the engine to be back.
                raise EngineUnavailable(call="connect", detail=f"{self._socket}: {error}") from error
            found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid: int = _CREDENTIALS.unpack(found)[0]
        if pid <= 0:
            raise MountNamespaceUnavailable(f"the process that listens on {self._socket} is in another pid namespace")
        return pid
