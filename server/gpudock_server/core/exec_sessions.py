"""Commands inside running containers: their streams, their end, and what happens when the caller is gone.

The policy for a caller that hangs up, and for a daemon that stops: everything in the process's session gets SIGHUP, and
SIGKILL after a grace. A command that wants to live on starts a session of its own (setsid).
"""

from __future__ import annotations

import asyncio
import signal
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

import structlog

from gpudock_server.core.containers.world import World
from gpudock_server.errors import (
    ContainerNotRunning,
    ContainerPaused,
    EngineRejected,
    ExecExists,
    ExecLimit,
    GpudockError,
    ShuttingDown,
)
from gpudock_server.model.container import ContainerState
from gpudock_server.model.engine import ExecRequest, ExecStatus, ExecStream
from gpudock_server.ports import ExecSession, ProcessControl

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The engine reports a process that a signal ended as 128 + the signal's number, as shells do.
_SIGNAL_BASE = 128
# What the engine writes to the process's output when its runtime could not start it.
_CANNOT_START = b"OCI runtime exec failed: "
_COULD_NOT_RUN = (126, 127)


@dataclass(frozen=True, slots=True)
class Output:
    """A chunk of what the process wrote."""

    stream: ExecStream
    data: bytes


@dataclass(frozen=True, slots=True)
class Exited:
    """How it ended: by `signal` (a name such as SIGTERM) if that is set, else with `code`."""

    code: int
    signal: str = ""
    message: str = ""
    timed_out: bool = False


class RunningExec:
    """A command that runs. Used by one caller; its input methods may be called beside `events`."""

    def __init__(
        self, *, exec_id: str, container: str, engine_id: str, session: ExecSession, timeout: float | None
    ) -> None:
        """`timeout` in seconds; None is without end."""
        self.id = exec_id
        self.container = container
        self.engine_id = engine_id
        self.session = session
        self.timed_out = False
        self.ended = asyncio.Event()
        self._timeout = timeout

    async def write(self, data: bytes) -> None:
        """Give `data` to its stdin; returns when the engine has taken it."""
        await self.session.write(data)

    async def close_stdin(self) -> None:
        """End its stdin."""
        await self.session.close_stdin()

    async def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal a new size."""
        await self.session.resize(rows, columns)

    @property
    def timeout(self) -> float | None:
        """Seconds it may run."""
        return self._timeout


class ExecSessions:
    """Starts commands and sees to their end."""

    def __init__(self, world: World, processes: ProcessControl, *, hangup_grace: float, limit: int) -> None:
        """`hangup_grace` in seconds from SIGHUP to SIGKILL; `limit` is how many commands may run at once."""
        self._world = world
        self._processes = processes
        self._grace = hangup_grace
        self._limit = limit
        self._running: dict[str, RunningExec] = {}
        self._starting = 0
        self._endings: set[asyncio.Task[None]] = set()
        self._draining = False

    async def start(
        self, container: str, request: ExecRequest, *, exec_id: str = "", timeout: float | None = None
    ) -> RunningExec:
        """Start a command.

        Raises ContainerNotFound, WrongNode, ContainerNotRunning, ContainerPaused, ExecExists, ExecLimit, and the
        engine's errors. Whoever starts one must call `finish` in the end, whatever happens.
        """
        if self._draining:
            raise ShuttingDown
        exec_id = exec_id or str(uuid.uuid4())
        if exec_id in self._running:
            raise ExecExists(exec_id=exec_id)
        if len(self._running) + self._starting >= self._limit:
            raise ExecLimit(limit=self._limit)
        self._starting += 1
        try:
            view = await self._world.lookup(container)
            head = view.container
            if head.engine is None or head.status.state in (ContainerState.CREATING, ContainerState.DELETING):
                raise ContainerNotRunning(container=container, state=head.status.state.value)
            session = await self._open(container, head.engine.engine_id, request)
            running = RunningExec(
                exec_id=exec_id,
                container=container,
                engine_id=head.engine.engine_id,
                session=session,
                timeout=timeout,
            )
            self._running[exec_id] = running
        finally:
            self._starting -= 1
        return running

    async def _open(self, container: str, engine_id: str, request: ExecRequest) -> ExecSession:
        try:
            return await self._world.engine.exec(engine_id, request)
        except EngineRejected:
            # Not asked before, so that the way that mostly succeeds costs one call less.
            seen = await self._world.engine.inspect(engine_id)
            if seen is None or not seen.running:
                state = "gone" if seen is None else seen.state.value.upper()
                raise ContainerNotRunning(container=container, state=state) from None
            if seen.state.value == "paused":
                raise ContainerPaused(container=container) from None
            raise

    async def events(self, running: RunningExec) -> AsyncIterator[Output | Exited]:
        """Its output as it comes, and last how it ended.

        Not taking the next one holds the process back. What the engine says of a program that cannot be run comes as
        the message of its end and not as the program's output.
        """
        held: list[Output] = []
        enforcer = asyncio.ensure_future(self._enforce_timeout(running)) if running.timeout is not None else None
        first = True
        try:
            async for stream, data in running.session.read():
                if first and data.startswith(_CANNOT_START):
                    held.append(Output(stream, data))
                else:
                    for output in held:
                        yield output
                    held.clear()
                    yield Output(stream, data)
                first = False
            exited = await self._exited(running)
            if held and exited.code in _COULD_NOT_RUN:
                message = b"".join(output.data for output in held).decode(errors="replace").strip()
                yield Exited(code=exited.code, message=message)
                return
            for output in held:
                yield output
            yield exited
        finally:
            if enforcer is not None:
                enforcer.cancel()

    async def _exited(self, running: RunningExec) -> Exited:
        status = await running.session.status()
        if status.exit_code is None:
            # The output is closed and the process is not known to have ended: it closed its streams itself, or its
            # container was stopped and the engine lost track of it.
            status = await self._wait_for_end(running)
        code = status.exit_code
        if code is None:
            if self._draining:
                raise ShuttingDown
            raise ContainerNotRunning(container=running.container, state="stopped while the command ran")
        running.ended.set()
        return Exited(code=code, signal=signal_name(code), timed_out=running.timed_out)

    async def _wait_for_end(self, running: RunningExec) -> ExecStatus:
        pause = 0.02
        while True:
            status = await running.session.status()
            if status.exit_code is not None:
                return status
            if not status.running:
                return status
            seen = await self._world.engine.inspect(running.engine_id)
            if seen is None or not seen.running:
                return await running.session.status()
            await asyncio.sleep(pause)
            pause = min(pause * 2, 1.0)

    async def _enforce_timeout(self, running: RunningExec) -> None:
        if running.timeout is None:
            return
        await asyncio.sleep(running.timeout)
        running.timed_out = True
        await self._end(running, signal.SIGTERM)

    async def signal(self, running: RunningExec, name: str) -> None:
        """Send a signal, by its name (SIGINT or INT), to the command's main process. Raises ValueError on no signal."""
        number = signal_number(name)
        status = await running.session.status()
        if status.pid:
            self._processes.signal(status.pid, running.engine_id, number)

    async def finish(self, running: RunningExec) -> None:
        """Let go of a command, ending it by the policy if it runs still. Returns at once; the ending goes on."""
        self._running.pop(running.id, None)
        if running.ended.is_set():
            await running.session.close()
            return
        task = asyncio.create_task(self._hang_up(running), name=f"hang up {running.id}")
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _hang_up(self, running: RunningExec) -> None:
        try:
            await self._end(running, signal.SIGHUP)
        except GpudockError as error:
            log.warning("a command could not be ended", exec_id=running.id, detail=error.message)
        finally:
            await running.session.close()

    async def _end(self, running: RunningExec, first: int) -> None:
        """Everything in the session gets `first`, and SIGKILL after the grace."""
        status = await running.session.status()
        if not status.running or not status.pid:
            return
        self._processes.signal(status.pid, running.engine_id, first, session=True)
        deadline = asyncio.get_running_loop().time() + self._grace
        while self._processes.alive(status.pid, running.engine_id):
            if asyncio.get_running_loop().time() >= deadline:
                break
            await asyncio.sleep(0.05)
        # Also where the leader is gone: what it left behind in its session goes with it.
        self._processes.signal(status.pid, running.engine_id, signal.SIGKILL, session=True)

    async def drain(self) -> None:
        """Start nothing new, and end what runs."""
        self._draining = True
        for running in list(self._running.values()):
            await self.finish(running)
        if self._endings:
            await asyncio.wait(self._endings)


def signal_number(name: str) -> int:
    """The number of a signal by its name, with or without SIG. Raises ValueError."""
    full = name.upper() if name.upper().startswith("SIG") else f"SIG{name.upper()}"
    try:
        return signal.Signals[full]
    except KeyError:
        raise ValueError(f"there is no signal {name!r}") from None


def signal_name(code: int) -> str:
    """The signal that an exit code of the engine stands for; empty if it stands for none."""
    try:
        return signal.Signals(code - _SIGNAL_BASE).name
    except ValueError:
        return ""
