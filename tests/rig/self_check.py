"""`python -m tests.rig --check`: start a rig, use every part of it once, stop it, and verify that nothing is left."""

import sys
import time
from collections.abc import Callable, Sequence

from . import cleanup
from .errors import RigError
from .http_unix import HttpStatusError
from .images import BUSYBOX
from .rig import Rig

Say = Callable[[str], None]


class Stopwatch:
    """Prints how long each step took."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._start = time.monotonic()

    def lap(self, what: str) -> None:
        """End a step and print its duration."""
        now = time.monotonic()
        self._say(f"{(now - self._start) * 1000:7.0f} ms  {what}")
        self._start = now


def run_container(rig: Rig, command: str, gpus: Sequence[str] = (), image: str = BUSYBOX) -> str:
    """Run a shell command in a container with these GPUs. Returns stdout and stderr, interleaved.

    Raises:
        HttpStatusError: the engine or the GPU hook refused the container.
    """
    request = {"Driver": "nvidia", "DeviceIDs": list(gpus), "Capabilities": [["gpu"]]}
    spec = {
        "Image": image,
        "Cmd": ["/bin/sh", "-c", command],
        "Tty": True,
        "HostConfig": {"DeviceRequests": [request] if gpus else []},
    }
    container = rig.engine.call("POST", "/containers/create", send=spec)["Id"]
    try:
        rig.engine.call("POST", f"/containers/{container}/start")
        rig.engine.call("POST", f"/containers/{container}/wait")
        logs = rig.engine.call("GET", f"/containers/{container}/logs", query={"stdout": "1", "stderr": "1"})
        return logs.decode().replace("\r\n", "\n") if logs else ""
    finally:
        rig.engine.call("DELETE", f"/containers/{container}", query={"force": "1"})


def check(say: Say) -> None:
    """Check a rig. Raises RigError if a result is not the expected one, or if something is left."""
    watch = Stopwatch(say)
    rig = Rig()
    with rig:
        watch.lap("rig started, images loaded")
        _check_gpu_container(rig)
        watch.lap("GPU container created, started, ended, removed: it had its two GPUs and no other")
        _check_unknown_gpu(rig)
        watch.lap("a container with an unknown GPU was refused")
        count = rig.run(sys.executable, "-c", "import pynvml as n; n.nvmlInit(); print(n.nvmlDeviceGetCount())")
        _expect(count.stdout.strip(), "8", "GPUs counted by pynvml")
        watch.lap("pynvml counted 8 GPUs in another process")
        rig.engine.kill9()
        rig.engine.start()
        watch.lap("dockerd killed and started again")
        rig.etcd.kill9()
        rig.etcd.start()
        watch.lap("etcd killed and started again")
        _start_sleeper(rig)
        watch.lap("container started; it runs while the rig closes")
        folder = rig.folder
    watch.lap("rig closed")
    left = [item for known in cleanup.known_rigs() if str(known) == folder.name for item in cleanup.leftovers(known)]
    _expect("; ".join(left), "", "left behind")
    say("nothing is left: no process, mount, loop device, control group or file")


def _check_gpu_container(rig: Rig) -> None:
    nodes = run_container(rig, "cd /dev; ls -1 nvidia*; cat nvidia2", rig.gpus.uuids[2:4])
    _expect(nodes, "nvidia2\nnvidia3\nnvidiactl\ncat: can't open 'nvidia2': No such device or address\n", "in /dev")


def _check_unknown_gpu(rig: Rig) -> None:
    try:
        run_container(rig, "true", ["GPU-unknown"])
    except HttpStatusError as error:
        if "GPU-unknown: unknown device" not in error.message:
            raise
    else:
        raise RigError("a container with an unknown GPU started")


def _start_sleeper(rig: Rig) -> None:
    spec = {"Image": BUSYBOX, "Cmd": ["sleep", "1000000"]}
    container = rig.engine.call("POST", "/containers/create", send=spec)["Id"]
    rig.engine.call("POST", f"/containers/{container}/start")


def _expect(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise RigError(f"{what}: expected {expected!r}, found {found!r}")
