"""A private dockerd with its own data, sockets, control group, network and mounts, apart from the host's engine."""

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from . import http_unix
from .cleanup import start_ticks
from .errors import RigError
from .namespaces import Namespaces
from .patience import limit
from .process import Process, ProcessGroup

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CONTAINERD_DEATH_S = 10.0
_CONTAINERD_TRIES = 3
_CONTAINERD_LATE = "timeout waiting for containerd to start"
_WRITTEN_STACKS = re.compile(r'goroutine stacks written to ([^"\s]+)')
_POLL_S = 0.005


class Engine:
    """The dockerd of one rig. `start` after `kill9` starts it with the same data, in the same namespaces."""

    def __init__(
        self,
        folder: Path,
        namespaces: Namespaces,
        processes: ProcessGroup,
        *,
        cgroup_parent: str,
        environment: Mapping[str, str],
        options: Sequence[str] = (),
    ) -> None:
        """Prepare dockerd without starting it; `launch` and `await_ready`, or `start`, do that.

        Args:
            folder: for data, sockets and the log.
            namespaces: the namespaces that dockerd runs in.
            processes: the process group of the rig.
            cgroup_parent: the parent of the containers' control groups, a path below each hierarchy.
            environment: added to the environment of dockerd and of the container hook; PATH is prepended.
            options: further flags of dockerd, such as --live-restore.
        """
        self.folder = folder
        self.socket = folder / "docker.sock"
        self.data_root = folder / "data"
        self._namespaces = namespaces
        self._processes = processes
        self._environment = os.environ | environment
        # dockerd executes itself for each mount, archive and network namespace. That is a third of the work of a test
        # run, and a third of it would be garbage collection in processes that end at once.
        self._environment.setdefault("GOGC", "400")
        self._environment["PATH"] = ":".join([environment["PATH"], os.environ.get("PATH", ""), SYSTEM_PATH])
        dockerd = shutil.which("dockerd", path=self._environment["PATH"])
        if dockerd is None:
            raise RigError("there is no dockerd: run scripts/install-prerequisites")
        self._pidfile = folder / "docker.pid"
        self._containerd_pidfile = folder / "exec/containerd/containerd.pid"
        self.argv = [
            *[dockerd, "--host", self.url, "--pidfile", str(self._pidfile)],
            *["--data-root", str(self.data_root), "--exec-root", str(folder / "exec")],
            *["--exec-opt", "native.cgroupdriver=cgroupfs", "--cgroup-parent", cgroup_parent],
            *options,
        ]
        self._process: Process | None = None

    @property
    def url(self) -> str:
        """The address for aiodocker and DOCKER_HOST."""
        return f"unix://{self.socket}"

    @property
    def process(self) -> Process:
        """The dockerd that was started last. Raises RigError if there is none."""
        if self._process is None:
            raise RigError("dockerd was not started")
        return self._process

    @property
    def pid(self) -> int:
        """The process id of the dockerd that was started last."""
        return self.process.pid

    @property
    def log_text(self) -> str:
        """The log of all dockerds that were started."""
        return self.process.log_text

    def launch(self) -> None:
        """Start dockerd and do not wait until it answers."""
        # A killed dockerd leaves these files. A process id in them may have been reused, or belong to a zombie: dockerd
        # would take that process for a running containerd and wait for it.
        for stale in (self._pidfile, self.socket, self._containerd_pidfile):
            stale.unlink(missing_ok=True)
        self._process = self._processes.start(
            self.argv,
            log=self.folder / "dockerd.log",
            environment=self._environment,
            inside=self._namespaces.enter(),
        )

    def await_ready(self, timeout_s: float = 60.0) -> None:
        """Wait until dockerd answers. Raises RigError if it ends or does not answer in time.

        dockerd gives its containerd 15 s to start. No option changes that, and on a busy machine reading the programs
        from the disk can take longer; the next try finds them in memory.
        """
        for _ in range(_CONTAINERD_TRIES - 1):
            try:
                return self.process.wait_until(self.answers, timeout_s)
            except RigError:
                if self.process.running or not self.log_text.rstrip().endswith(_CONTAINERD_LATE):
                    raise
            self.launch()
        return self.process.wait_until(self.answers, timeout_s)

    def start(self) -> None:
        """Start dockerd and wait until it answers."""
        self.launch()
        self.await_ready()

    def answers(self) -> bool:
        """Whether dockerd answers a ping within 2 s."""
        with contextlib.suppress(OSError, http_unix.HttpStatusError):
            http_unix.call(self.socket, "GET", "/_ping", timeout_s=2.0)
            return True
        return False

    def kill9(self) -> int:
        """Kill dockerd with SIGKILL and wait until containerd has ended with it; shims and containers keep running."""
        containerd = int(self._containerd_pidfile.read_text()) if self._containerd_pidfile.exists() else None
        code = self.process.kill9()
        deadline = time.monotonic() + limit(_CONTAINERD_DEATH_S)
        while containerd and start_ticks(containerd) is not None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return code

    def stop(self) -> int:
        """Stop dockerd. Without --live-restore it first stops its containers, each with its grace period."""
        return self.process.stop()

    def restart(self) -> None:
        """Stop dockerd and start it."""
        self.stop()
        self.start()

    @contextlib.contextmanager
    def down(self, *, killed: bool = False) -> Iterator[None]:
        """Stop or kill dockerd for the block, and start it however the block ends, since other tests share it."""
        try:
            if killed:
                self.kill9()
            else:
                self.stop()
            yield
        finally:
            self.start()

    def pause(self) -> None:
        """Stop dockerd with SIGSTOP: the kernel accepts connections, and nothing answers."""
        self.process.pause()

    def resume(self) -> None:
        """Undo `pause`."""
        self.process.resume()

    def stacks(self, timeout_s: float = 5.0) -> str:
        """The stacks of all goroutines of dockerd, which it writes on SIGUSR1; dockerd keeps running."""
        before = _WRITTEN_STACKS.findall(self.log_text)
        self.process.signal(signal.SIGUSR1)
        deadline = time.monotonic() + limit(timeout_s)
        while time.monotonic() < deadline:
            if (written := _WRITTEN_STACKS.findall(self.log_text)) != before:
                return Path(written[-1]).read_text()
            time.sleep(_POLL_S)
        return f"dockerd has not written its stacks within {timeout_s:g} s"

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | Sequence[str]] | None = None,
        send: object = None,
        body: BinaryIO | None = None,
    ) -> Any:
        """Make one blocking request to the engine's API; see `http_unix.call`."""
        return http_unix.call(self.socket, method, path, query=query, send=send, body=body)

    def start_and_remove(self, image: str) -> None:
        """Creates, starts and removes a container that does nothing."""
        container = self.call("POST", "/containers/create", send={"Image": image, "Cmd": ["true"]})["Id"]
        self.call("POST", f"/containers/{container}/start")
        self.call("DELETE", f"/containers/{container}", query={"force": "1", "v": "1"})

    def image_ids(self) -> dict[str, str]:
        """The ids of all images with a name, by `repository:tag`."""
        return {tag: image["Id"] for image in self.call("GET", "/images/json") for tag in image["RepoTags"] or ()}

    def remove_all(self) -> None:
        """Remove every container, then every volume; images stay."""
        for container in self.call("GET", "/containers/json", query={"all": "1"}):
            with contextlib.suppress(http_unix.HttpStatusError):
                self.call("DELETE", f"/containers/{container['Id']}", query={"force": "1", "v": "1"})
        for volume in self.call("GET", "/volumes")["Volumes"] or []:
            with contextlib.suppress(http_unix.HttpStatusError):
                self.call("DELETE", f"/volumes/{volume['Name']}", query={"force": "1"})
