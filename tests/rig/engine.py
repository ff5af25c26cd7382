"""A private dockerd: its own data, sockets, control group, network and mounts, beside whatever the host runs."""

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
    """The dockerd of one rig. After `kill9`, `start` brings it back with the same data, in the same namespaces."""

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
        """Prepares it; `launch` and `await_ready`, or `start`, run it.

        Args:
            folder: holds its data, its sockets and its log.
            namespaces: those it runs in.
            processes: those of the rig.
            cgroup_parent: that of its containers, as a path below each hierarchy.
            environment: added to the environment of dockerd and of the container hook; PATH is prepended.
            options: further words for its command line, such as --live-restore.
        """
        self.folder = folder
        self.socket = folder / "docker.sock"
        self.data_root = folder / "data"
        self._namespaces = namespaces
        self._processes = processes
        self._environment = os.environ | environment
        # For each mount, archive and network namespace dockerd runs itself anew: a third of a suite's work, and a third
        # of that is collecting garbage of a process that is about to end.
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
        """What aiodocker and DOCKER_HOST call it."""
        return f"unix://{self.socket}"

    @property
    def process(self) -> Process:
        """The latest dockerd started."""
        if self._process is None:
            raise RigError("dockerd was not started")
        return self._process

    @property
    def pid(self) -> int:
        """Pid of the latest dockerd started."""
        return self.process.pid

    @property
    def log_text(self) -> str:
        """What all its dockerds have logged."""
        return self.process.log_text

    def launch(self) -> None:
        """Starts dockerd and does not wait for it."""
        # One that was killed leaves these. Their pids may belong to others by now, or to a zombie: dockerd would take
        # that for a live containerd and wait for it in vain.
        for stale in (self._pidfile, self.socket, self._containerd_pidfile):
            stale.unlink(missing_ok=True)
        self._process = self._processes.start(
            self.argv,
            log=self.folder / "dockerd.log",
            environment=self._environment,
            inside=self._namespaces.enter(),
        )

    def await_ready(self, timeout_s: float = 60.0) -> None:
        """Waits until it answers.

        dockerd gives its containerd 15 s to start, which no option changes and a starved machine can miss; the next
        try finds the programs in memory.
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
        """Starts dockerd and waits until it answers."""
        self.launch()
        self.await_ready()

    def answers(self) -> bool:
        """Whether a ping is answered within 2 s."""
        with contextlib.suppress(OSError, http_unix.HttpStatusError):
            http_unix.call(self.socket, "GET", "/_ping", timeout_s=2.0)
            return True
        return False

    def kill9(self) -> int:
        """Kills dockerd and waits until containerd has died with it; shims and containers live on."""
        containerd = int(self._containerd_pidfile.read_text()) if self._containerd_pidfile.exists() else None
        code = self.process.kill9()
        deadline = time.monotonic() + limit(_CONTAINERD_DEATH_S)
        while containerd and start_ticks(containerd) is not None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return code

    def stop(self) -> int:
        """Ends dockerd in order: without --live-restore it stops its containers first, each with its grace period."""
        return self.process.stop()

    def restart(self) -> None:
        """Stops it and starts it again."""
        self.stop()
        self.start()

    @contextlib.contextmanager
    def down(self, *, killed: bool = False) -> Iterator[None]:
        """Stops or kills it for the block, and starts it again however the block ends: other tests share it."""
        try:
            if killed:
                self.kill9()
            else:
                self.stop()
            yield
        finally:
            self.start()

    def pause(self) -> None:
        """Freezes dockerd: it accepts connections and answers nothing."""
        self.process.pause()

    def resume(self) -> None:
        """Undoes `pause`."""
        self.process.resume()

    def stacks(self, timeout_s: float = 5.0) -> str:
        """Where each of dockerd's goroutines stands; it is told to write that down, and goes on."""
        before = _WRITTEN_STACKS.findall(self.log_text)
        self.process.signal(signal.SIGUSR1)
        deadline = time.monotonic() + limit(timeout_s)
        while time.monotonic() < deadline:
            if (written := _WRITTEN_STACKS.findall(self.log_text)) != before:
                return Path(written[-1]).read_text()
            time.sleep(_POLL_S)
        return f"dockerd has not written where it stands within {timeout_s:g} s"

    def call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | Sequence[str]] | None = None,
        send: object = None,
        body: BinaryIO | None = None,
    ) -> Any:
        """One blocking request to the engine's API; see `http_unix.call`."""
        return http_unix.call(self.socket, method, path, query=query, send=send, body=body)

    def start_and_remove(self, image: str) -> None:
        """Creates, starts and removes a container that does nothing."""
        container = self.call("POST", "/containers/create", send={"Image": image, "Cmd": ["true"]})["Id"]
        self.call("POST", f"/containers/{container}/start")
        self.call("DELETE", f"/containers/{container}", query={"force": "1", "v": "1"})

    def remove_all(self) -> None:
        """Removes every container, then every volume; images stay."""
        for container in self.call("GET", "/containers/json", query={"all": "1"}):
            with contextlib.suppress(http_unix.HttpStatusError):
                self.call("DELETE", f"/containers/{container['Id']}", query={"force": "1", "v": "1"})
        for volume in self.call("GET", "/volumes")["Volumes"] or []:
            with contextlib.suppress(http_unix.HttpStatusError):
                self.call("DELETE", f"/volumes/{volume['Name']}", query={"force": "1"})
