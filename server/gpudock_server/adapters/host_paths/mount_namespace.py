"""Run work in the mount namespace of the engine.

The engine resolves the source of a bind mount in its own mount namespace. That of the daemon may be another one:
systemd creates one for units with ProtectSystem and similar options, and mounts in it are not visible outside. So host
paths are opened and bound in a thread that has entered the namespace of the process that listens on the engine's
socket. That is the engine or, with socket activation, the host's init, which has the same namespace.
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

# A path on a network filesystem whose server is down blocks forever.
_TIMEOUT_SECONDS: Final = 30.0
_CONNECT_SECONDS: Final = 5.0
_CREDENTIALS: Final = struct.Struct("3i")


class MountNamespaceUnavailable(Exception):
    """The engine's mount namespace cannot be entered, or work in it timed out; the message says why."""


class MountNamespace:
    """Runs blocking work in the mount namespace of the engine that listens on a unix socket.

    Without a socket the work runs in the namespace of this process: at boot, before the engine has started.
    """

    def __init__(self, engine_socket: str = "", *, seconds: float = _TIMEOUT_SECONDS) -> None:
        self._socket = engine_socket
        self._seconds = seconds

    async def run(self, work: Callable[[], T]) -> T:
        """Run `work` and return its result. Raises its errors, EngineUnavailable and MountNamespaceUnavailable.

        If the caller is cancelled, this still waits for the end of the work: an undo must not run concurrently.
        """
        done: concurrent.futures.Future[T] = concurrent.futures.Future()
        # A new thread, not one of a pool, because it cannot leave the namespace. A daemon thread, so that one that
        # blocks forever does not keep the process from ending.
        threading.Thread(target=self._run_in_thread, args=(done, work), name="host paths", daemon=True).start()
        running = asyncio.wrap_future(done)
        try:
            await asyncio.wait([running], timeout=self._seconds)
        except asyncio.CancelledError:
            await asyncio.wait([running], timeout=self._seconds)
            raise
        if not running.done():
            raise MountNamespaceUnavailable(
                f"not finished after {self._seconds:g} s; is it on a network filesystem that does not answer?"
            )
        return running.result()

    def _run_in_thread(self, done: concurrent.futures.Future[T], work: Callable[[], T]) -> None:
        try:
            if self._socket:
                self._enter()
            result = work()
        except BaseException as error:  # noqa: BLE001 - re-raised in the caller's task
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
            raise MountNamespaceUnavailable(
                f"cannot enter the mount namespace of the engine (pid {pid}): {error}"
            ) from error

    def _engine_pid(self) -> int:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_CONNECT_SECONDS)
            try:
                connection.connect(self._socket)
            except OSError as error:
                # EngineUnavailable, not an error of the path: an undo waits until the engine is back.
                raise EngineUnavailable(call="connect", detail=f"{self._socket}: {error}") from error
            found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid: int = _CREDENTIALS.unpack(found)[0]
        if pid <= 0:
            raise MountNamespaceUnavailable(f"the process that listens on {self._socket} is in another PID namespace")
        return pid
