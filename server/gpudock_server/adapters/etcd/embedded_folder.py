"""The folder of the embedded etcd: private, locked for one daemon, and without processes of a killed daemon."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import signal
import stat
from pathlib import Path

import structlog

from gpudock_server.adapters.host.processes import processes_in
from gpudock_server.startup import StartupError

CLIENT_SOCKET = "c.sock:0"
PEER_SOCKET = "p.sock:0"

_PRIVATE = 0o700
_LOCK = "lock"
_VERSION = "version"
# The kernel's limit for the path of a socket, without the final zero byte: unix(7).
_LONGEST_SOCKET_PATH = 107
# Characters that need no escaping in the URI that grpc makes of the path.
_PLAIN_PATH = re.compile(r"^[A-Za-z0-9/._:@+=,~-]+$", re.ASCII)
_STOP_SECONDS = 10.0
# Programs that run in the folder: setpriv is about to execute etcd. After the name there may be a version ("-3.5") or
# " (deleted)".
_ETCD = re.compile(r"(etcd|setpriv)([- ]|$)")

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class EtcdFolder:
    """The folder `path`, locked for this daemon from `lock` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._folder = -1
        self._lock = -1

    @property
    def endpoint(self) -> str:
        """The endpoint of the running etcd for EtcdAddress; valid in this process only.

        etcd is started in the folder with relative names, but grpc needs an absolute path. If that is longer than the
        kernel allows, it goes through this process's descriptor of the folder.
        """
        plain = str(self.path / CLIENT_SOCKET)
        if len(plain) <= _LONGEST_SOCKET_PATH and _PLAIN_PATH.match(plain):
            return f"unix:{plain}"
        return f"unix:/proc/self/fd/{self._folder}/{CLIENT_SOCKET}"

    @property
    def has_socket(self) -> bool:
        """Whether etcd's client socket exists."""
        return (self.path / CLIENT_SOCKET).is_socket()

    @property
    def data_version(self) -> tuple[int, int, int]:
        """The version of the etcd that was last started here; zeros if none was."""
        try:
            major, minor, patch = (self.path / _VERSION).read_text().split(".")
            return int(major), int(minor), int(patch)
        except (FileNotFoundError, ValueError):
            return 0, 0, 0

    def record_version(self, version: tuple[int, int, int]) -> None:
        """Store the version of the etcd that is started here."""
        (self.path / _VERSION).write_text(".".join(map(str, version)))

    async def lock(self) -> None:
        """Create and lock the folder, and stop processes that a killed daemon left in it. Raises StartupError."""
        try:
            self.path.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._make_private()
            self._lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._folder)
        except OSError as error:
            self.release()
            raise StartupError(f"cannot use the etcd folder: {error}", "check its path, owner and disk") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 20).decode(errors="replace").strip() or "unknown"
            self.release()
            raise StartupError(
                f"another gpudockd (pid {holder}) uses the state folder {self.path}",
                "stop it, or set another state_dir",
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        try:
            await self._stop_orphans()
        except BaseException:
            self.release()
            raise

    def clear_sockets(self) -> None:
        """Remove the sockets of a killed etcd; etcd 3.4 does not do this itself."""
        for name in (CLIENT_SOCKET, PEER_SOCKET):
            (self.path / name).unlink(missing_ok=True)

    def release(self) -> None:
        """Unlock the folder."""
        for descriptor in (self._lock, self._folder):
            if descriptor >= 0:
                os.close(descriptor)
        self._lock = self._folder = -1

    def _make_private(self) -> None:
        folder = os.fstat(self._folder)
        if folder.st_uid != os.geteuid():
            raise PermissionError(f"{self.path} is owned by uid {folder.st_uid}, not by {os.geteuid()}")
        if stat.S_IMODE(folder.st_mode) != _PRIVATE:
            os.fchmod(self._folder, _PRIVATE)

    async def _stop_orphans(self) -> None:
        """Stop every etcd that runs in this folder: only the daemon with the lock may run one here.

        They are found by their working directory and not by a file with the pid, which a daemon that is killed between
        the start of etcd and the write of the file would not have left.
        """
        with contextlib.ExitStack() as opened:
            for pid, descriptor in processes_in(self._folder, _ETCD):
                opened.callback(os.close, descriptor)
                log.warning("stopping orphaned etcd", pid=pid, folder=str(self.path))
                for number in (signal.SIGTERM, signal.SIGKILL):
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(descriptor, number)
                    if await _wait_for_exit(descriptor):
                        break
                else:
                    raise StartupError(f"cannot stop orphaned etcd (pid {pid}) in {self.path}", "stop it manually")


async def _wait_for_exit(descriptor: int) -> bool:
    """Wait up to `_STOP_SECONDS` for a process to exit; False if it still runs then. `descriptor` is its pidfd."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(descriptor)
    return True
