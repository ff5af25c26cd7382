"""Daemons that a test may kill: each test's daemons have their own etcd prefix and node names on the rig's engine."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import grpc
import pytest_asyncio
from gpudock.v1 import container_pb2

from tests.calls import Caller, Failure, failure_of
from tests.conftest import FAST_FLAGS
from tests.rig import Daemon, Rig
from tests.rig.patience import limit

FREQUENT_RECONCILE = ("--orphan-grace", "0", "--reconcile-interval", "0.5")
"""Flags: full comparisons every 0.5 s, and orphans are removed immediately."""

_POLL_SECONDS = 0.03


class IsolatedDaemons:
    """Starts the daemons of one test, and kills those that still run at its end."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.id = uuid.uuid4().hex[:8]
        self.prefix = f"/test-{self.id}/"
        self._started: list[Daemon] = []

    @property
    def node(self) -> str:
        """The default node name."""
        return f"own-{self.id}"

    async def start(
        self,
        *flags: str,
        after: Daemon | None = None,
        node: str = "",
        module: str = "gpudock_server",
        docker_host: str | None = None,
        etcd_endpoints: str | None = None,
        state_dir: Path | None = None,
        socket: Path | None = None,
        environment: Mapping[str, str] | None = None,
        fresh: bool = False,
        serving: bool = True,
    ) -> Daemon:
        """Start a daemon; with `after`, on the state and the socket of that daemon."""
        daemon = await self.rig.start_daemon(
            *FAST_FLAGS,
            *("--node-name", node or self.node, "--etcd-prefix", self.prefix),
            *flags,
            module=module,
            environment=environment,
            docker_host=docker_host,
            etcd_endpoints=etcd_endpoints,
            state_dir=state_dir or (after.state_dir if after else None),
            socket=socket or (after.socket if after else None),
            fresh=fresh,
            serving=serving,
        )
        self._started.append(daemon)
        return daemon

    async def startup_error(self, *flags: str, code: int = 1, **options: object) -> str:
        """Start a daemon that must exit with `code`, and return its error message, which has no traceback.

        `options` are those of `start`.
        """
        daemon = await self.start(*flags, fresh=True, serving=False, **options)  # type: ignore[arg-type]  # options of `start`
        assert await asyncio.to_thread(daemon.wait) == code, daemon.log_text
        assert "Traceback" not in daemon.log_text, daemon.log_text
        errors = [line for line in daemon.log_text.splitlines() if line.startswith("gpudockd: ")]
        assert errors, daemon.log_text
        return "\n".join(line.removeprefix("gpudockd: ") for line in errors)

    async def kill_all(self) -> None:
        """Kill every daemon that runs."""
        for daemon in self._started:
            if daemon.running:
                await asyncio.to_thread(daemon.kill9)


@pytest_asyncio.fixture
async def daemons(clean_engine: Rig) -> AsyncIterator[IsolatedDaemons]:
    """Daemons of one test; they are killed at its end, and `clean_engine` removes what they made."""
    daemons = IsolatedDaemons(clean_engine)
    yield daemons
    await daemons.kill_all()


@pytest_asyncio.fixture
async def quick_daemon(daemons: IsolatedDaemons) -> AsyncIterator[Daemon]:
    """A daemon with FREQUENT_RECONCILE; fails the test if it dies or logs a traceback."""
    daemon = await daemons.start(*FREQUENT_RECONCILE)
    yield daemon
    assert daemon.running
    assert "Traceback" not in daemon.log_text, daemon.log_text


@pytest_asyncio.fixture
async def quick_caller(quick_daemon: Daemon) -> AsyncIterator[Caller]:
    """Calls `quick_daemon`."""
    async with Caller(quick_daemon.target) as caller:
        yield caller


def process_runs_in(folder: Path) -> bool:
    """Whether the working directory of any process lies in a folder, as that of an embedded etcd does."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink().is_relative_to(folder):
                return True
    return False


async def until(
    condition: Callable[[], Awaitable[object]], seconds: float = 15.0, *, details: Callable[[], object] = lambda: ""
) -> None:
    """Wait until a condition holds; raises AssertionError with `details` after `limit(seconds)`."""
    deadline = time.monotonic() + limit(seconds)
    while not await condition():
        assert time.monotonic() < deadline, f"{condition} is still false after {limit(seconds):g} s: {details()}"
        await asyncio.sleep(_POLL_SECONDS)


async def until_state(caller: Caller, name: str, state: int, seconds: float = 15.0) -> None:
    """Wait until a container is in a state."""
    container = container_pb2.Container()

    async def state_reached() -> bool:
        container.CopyFrom(await caller.get(name))
        return container.status.state == state

    await until(state_reached, seconds, details=lambda: container)


async def stream_failure(stream: AsyncIterable[object]) -> Failure | None:
    """Read a stream to its end, and return its error; None if it ended with OK."""
    try:
        await read_to_end(stream)
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    return None


async def read_to_end(stream: AsyncIterable[object]) -> None:
    """Read a stream to its end; raises its error."""
    async for _ in stream:
        pass


@contextlib.contextmanager
def ports_in_use(rig: Rig, *ports: int) -> Iterator[None]:
    """Have another program listen on TCP ports, in the network namespace where the engine publishes ports."""
    script = (
        "import socket, sys\n"
        f"sockets = [socket.create_server(('', port)) for port in {ports!r}]\n"
        "print('listening', flush=True); sys.stdin.read()"
    )
    command = [*rig.namespaces.enter(), sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == b"listening\n"
        try:
            yield
        finally:
            program.kill()
