"""Daemons that a test may hurt: with keys of their own in etcd and node names of their own on the rig's engine."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from pathlib import Path

import grpc
import pytest_asyncio
from gpudock.v1 import container_pb2

from tests.calls import Caller, Failure, failure_of
from tests.conftest import FAST_FLAGS
from tests.rig import Daemon, Rig
from tests.rig.patience import limit

_POLL_SECONDS = 0.03


class IsolatedDaemons:
    """Starts them, and kills what is left of them."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.id = uuid.uuid4().hex[:8]
        self.prefix = f"/test-{self.id}/"
        self._started: list[Daemon] = []

    @property
    def node(self) -> str:
        """What a daemon is called that is not told otherwise."""
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
        """Start one; with `after`, as that one's successor."""
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

    async def refused(self, *flags: str, code: int = 1, **where: object) -> str:
        """What one says that must not start: not a traceback, but what is wrong and what to do."""
        daemon = await self.start(*flags, fresh=True, serving=False, **where)  # type: ignore[arg-type]  # as `start` takes them
        assert await asyncio.to_thread(daemon.wait) == code, daemon.log_text
        assert "Traceback" not in daemon.log_text, daemon.log_text
        complaints = [line for line in daemon.log_text.splitlines() if line.startswith("gpudockd: ")]
        assert complaints, daemon.log_text
        return "\n".join(line.removeprefix("gpudockd: ") for line in complaints)

    async def kill_all(self) -> None:
        """End what runs."""
        for daemon in self._started:
            if daemon.running:
                await asyncio.to_thread(daemon.kill9)


@pytest_asyncio.fixture
async def daemons(clean_engine: Rig) -> AsyncIterator[IsolatedDaemons]:
    """Daemons of the test's own; they and what they made go with it."""
    daemons = IsolatedDaemons(clean_engine)
    yield daemons
    await daemons.kill_all()


def process_runs_in(folder: Path) -> bool:
    """Whether any process works in a folder, as an embedded etcd does in its own."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink().is_relative_to(folder):
                return True
    return False


async def until(
    condition: Callable[[], Awaitable[bool]], seconds: float = 15.0, *, seen: Callable[[], object] = lambda: ""
) -> None:
    """Wait until a condition holds; what was `seen` last is told if it never does."""
    deadline = time.monotonic() + limit(seconds)
    while not await condition():
        assert time.monotonic() < deadline, f"it did not come to that in time: {seen()}"
        await asyncio.sleep(_POLL_SECONDS)


async def until_state(caller: Caller, name: str, state: int, seconds: float = 15.0) -> None:
    """Wait until a container is in a state."""
    container = container_pb2.Container()

    async def there() -> bool:
        container.CopyFrom(await caller.get(name))
        return container.status.state == state

    await until(there, seconds, seen=lambda: container)


async def stream_failure(stream: AsyncIterator[object]) -> Failure | None:
    """How a stream ends: with an error, or well (None)."""
    try:
        async for _ in stream:
            pass
    except grpc.aio.AioRpcError as error:
        return failure_of(error)
    return None


@contextlib.contextmanager
def ports_in_use(rig: Rig, *ports: int) -> Iterator[None]:
    """Some other program listens on these, where the engine publishes."""
    script = (
        "import socket, sys\n"
        f"held = [socket.create_server(('', port)) for port in {ports!r}]\n"
        "print('bound', flush=True); sys.stdin.read()"
    )
    words = [*rig.namespaces.enter(), sys.executable, "-c", script]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"bound\n"
        try:
            yield
        finally:
            other.kill()
