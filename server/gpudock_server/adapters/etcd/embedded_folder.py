"""The folder that an embedded etcd lives in: private, used by one daemon, and free of what a killed one left."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import re
import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import structlog

from gpudock_server.startup import StartupError

CLIENT_SOCKET = "c.sock:0"
PEER_SOCKET = "p.sock:0"

_PRIVATE = 0o700
_LOCK = "lock"
_VERSION = "version"
# What the kernel takes as a socket's path, without the zero at its end: unix(7).
_LONGEST_SOCKET_PATH = 107
# What stands for itself in the URI that grpc makes of it.
_PLAIN_PATH = re.compile(r"^[A-Za-z0-9/._:@+=,~-]+$", re.ASCII)
_STOP_SECONDS = 10.0

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class EtcdFolder:
    """`path`, locked for this daemon from `take` to `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._folder = -1
        self._lock = -1

    @property
    def endpoint(self) -> str:
        """Where etcd is reached once it runs, as an EtcdAddress takes it; good for this process only.

        etcd is started inside the folder with relative names, but grpc needs an absolute one. Where that is longer
        than the kernel takes, the way leads through our own descriptor of the folder.
        """
        plain = str(self.path / CLIENT_SOCKET)
        if len(plain) <= _LONGEST_SOCKET_PATH and _PLAIN_PATH.match(plain):
            return f"unix:{plain}"
        return f"unix:/proc/self/fd/{self._folder}/{CLIENT_SOCKET}"

    @property
    def has_socket(self) -> bool:
        """Whether there is a socket to connect to."""
        return (self.path / CLIENT_SOCKET).is_socket()

    @property
    def data_version(self) -> tuple[int, int, int]:
        """The version of the etcd that was last started here; zeros: none was."""
        try:
            major, minor, patch = (self.path / _VERSION).read_text().split(".")
            return int(major), int(minor), int(patch)
        except (FileNotFoundError, ValueError):
            return 0, 0, 0

    def record_version(self, version: tuple[int, int, int]) -> None:
        """Remember which etcd is started here."""
        (self.path / _VERSION).write_text(".".join(map(str, version)))

    async def lock(self) -> None:
        """Make it, lock it, and end what a killed daemon left running in it. Raises StartupError."""
        try:
            self.path.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._make_private()
            self._lock = os.open(_LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600, dir_fd=self._folder)
        except OSError as error:
            self.release()
            raise StartupError(f"etcd's folder cannot be used: {error}", "see to its path, owner and disk") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._lock, 20).decode(errors="replace").strip() or "unknown"
            self.release()
            raise StartupError(
                f"another gpudockd (pid {holder}) keeps its state in {self.path}",
                "stop that one, or give this one another state folder",
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        try:
            await self._stop_orphans()
        except BaseException:
            self.release()
            raise

    def clear_sockets(self) -> None:
        """Remove the sockets that a killed etcd left; etcd 3.4 does not do so itself."""
        for name in (CLIENT_SOCKET, PEER_SOCKET):
            (self.path / name).unlink(missing_ok=True)

    def release(self) -> None:
        """Let another daemon have it."""
        for descriptor in (self._lock, self._folder):
            if descriptor >= 0:
                os.close(descriptor)
        self._lock = self._folder = -1

    def _make_private(self) -> None:
        folder = os.fstat(self._folder)
        if folder.st_uid != os.geteuid():
            raise PermissionError(f"{self.path} belongs to uid {folder.st_uid}")
        if stat.S_IMODE(folder.st_mode) != _PRIVATE:
            os.fchmod(self._folder, _PRIVATE)

    async def _stop_orphans(self) -> None:
        """End every etcd that runs in this folder: nobody but the daemon with the lock may have one here.

        They are found by where they run, and not by a file with a pid, which a daemon that is killed between starting
        etcd and writing the file would not have left.
        """
        with contextlib.ExitStack() as opened:
            for pid, descriptor in self._orphans():
                opened.callback(os.close, descriptor)
                log.warning("ending the etcd that a killed daemon left", pid=pid, folder=str(self.path))
                for number in (signal.SIGTERM, signal.SIGKILL):
                    with contextlib.suppress(ProcessLookupError):
                        signal.pidfd_send_signal(descriptor, number)
                    if await _wait_for_exit(descriptor):
                        break
                else:
                    raise StartupError(f"the etcd with pid {pid} in {self.path} cannot be ended", "end it by hand")

    def _orphans(self) -> Iterator[tuple[int, int]]:
        """Pid and pidfd of each; the caller closes the pidfd."""
        here = os.fstat(self._folder)
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            try:
                # Opened first: what is then looked at cannot be a later process with the same number.
                descriptor = os.pidfd_open(int(process.name))
            except OSError:
                continue
            if _runs_etcd_in(here, process):
                yield int(process.name), descriptor
            else:
                os.close(descriptor)


def _runs_etcd_in(folder: os.stat_result, process: Path) -> bool:
    try:
        there, program = (process / "cwd").stat(), (process / "exe").readlink().name
    except OSError:
        return False
    # setpriv is one that has not become etcd yet; a hyphen begins a version, a space "(deleted)".
    return os.path.samestat(folder, there) and re.match(r"(etcd|setpriv)([- ]|$)", program) is not None


async def _wait_for_exit(descriptor: int) -> bool:
    """Wait for the process of a pidfd; False when it still runs after a while."""
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
