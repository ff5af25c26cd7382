"""Commands executed in running containers: start, output, signals, timeout and termination.

When the caller disconnects or the daemon stops, every process of the command's session gets SIGHUP, and SIGKILL after a
grace period. A command that should continue must start its own session (setsid).
"""

from __future__ import annotations

import asyncio
import re
import signal
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto

import structlog

from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.errors import (
    ContainerNotRunning,
    ContainerPaused,
    EngineRejected,
    EngineUnavailable,
    ExecExists,
    ExecLimit,
    GpudockError,
    ShuttingDown,
)
from gpudock_server.model.container import STOPPED_STATES, Container, ContainerState
from gpudock_server.model.engine import ExecRequest, ExecStatus, ExecStream, TerminalSize
from gpudock_server.ports import Engine, ExecSession, ProcessControl

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The engine reports a process that a signal terminated as 128 + the signal's number, as shells do.
_SIGNAL_BASE = 128
_LAST_SIGNAL = 64
_FIRST_REALTIME_SIGNAL = 34  # SIGRTMIN of glibc, which reserves the kernel's first two
_RELATIVE_SIGNAL = re.compile(r"(RTMIN|RTMAX)([+-]\d{1,2})", re.ASCII)

_REQUIRED_STATE = "to run a command in it, it must be RUNNING"
# Seconds between attempts to terminate a process while the engine does not answer.
_END_RETRY_DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# Seconds between two polls of the engine or the kernel; the interval doubles up to the maximum.
_MIN_POLL_SECONDS = 0.01
_MAX_POLL_SECONDS = 0.25
# Seconds that a process may take to get a pid after the engine accepted it.
_PID_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class Output:
    """A chunk of the process's output."""

    stream: ExecStream
    data: bytes


@dataclass(frozen=True, slots=True)
class Exited:
    """How the process ended: by `signal` (a name such as SIGTERM) if set, else with exit code `code`.

    `message` says why the program could not be started, if so.
    """

    code: int
    signal: str = ""
    message: str = ""
    timed_out: bool = False


class _EndReason(Enum):
    """Why a process ended or is terminated."""

    EXITED = auto()
    TIMED_OUT = auto()
    DISCONNECTED = auto()


_FIRST_SIGNAL = {_EndReason.TIMED_OUT: signal.SIGTERM, _EndReason.DISCONNECTED: signal.SIGHUP}


class RunningExec:
    """A running command. It has one caller, who may call its input methods while reading `events`."""

    def __init__(
        self, *, exec_id: str, container: str, engine_id: str, session: ExecSession, timeout: float | None
    ) -> None:
        """`timeout`: seconds; None for no limit."""
        self.id = exec_id
        self.container = container
        self.engine_id = engine_id
        self.session = session
        self.timeout = timeout
        self.end_reason = _EndReason.EXITED
        self.ended = False
        self.finished = False

    async def write(self, data: bytes) -> None:
        """Write `data` to the command's stdin. Returns when the engine has accepted it."""
        await self.session.write(data)

    async def close_stdin(self) -> None:
        """Close the command's stdin."""
        await self.session.close_stdin()

    async def resize(self, size: TerminalSize) -> None:
        """Resize the command's terminal."""
        await self.session.resize(size)


class ExecSessions:
    """Starts commands in containers and terminates them on timeout, disconnect or shutdown."""

    def __init__(
        self,
        engine: Engine,
        containers: ContainerResource,
        processes: ProcessControl,
        *,
        hangup_grace: float,
        limit: int,
    ) -> None:
        """`hangup_grace`: seconds from SIGHUP to SIGKILL. `limit`: the maximum number of running commands."""
        self._engine = engine
        self._containers = containers
        self._processes = processes
        self._grace = hangup_grace
        self._limit = limit
        # By exec id: None while the command is being started; removed when the process is known to have ended.
        self._execs: dict[str, RunningExec | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = asyncio.Event()

    async def start(
        self, container: str, request: ExecRequest, *, exec_id: str = "", timeout: float | None = None
    ) -> RunningExec:
        """Start a command. The caller must always call `finish` at the end.

        Raises ContainerNotFound, WrongNode, ContainerNotRunning, ContainerPaused, ExecExists, ExecLimit, ShuttingDown,
        and the engine's errors.
        """
        if self._draining.is_set():
            raise ShuttingDown
        exec_id = exec_id or str(uuid.uuid4())
        if exec_id in self._execs:
            raise ExecExists(exec_id=exec_id)
        if len(self._execs) >= self._limit:
            raise ExecLimit(limit=self._limit)
        self._execs[exec_id] = None
        # In its own task: if the caller disconnects meanwhile, the process must still be terminated once it started.
        started: asyncio.Future[RunningExec] = asyncio.get_running_loop().create_future()
        self._spawn(self._start_exec(started, container, request, exec_id, timeout), f"exec {exec_id} start")
        try:
            running = await started
        except asyncio.CancelledError:
            # The command may have started at the same moment.
            if started.done() and not started.cancelled() and started.exception() is None:
                await self.finish(started.result())
            raise
        if self._draining.is_set():
            await self.finish(running)
            raise ShuttingDown
        return running

    async def _start_exec(
        self,
        started: asyncio.Future[RunningExec],
        container: str,
        request: ExecRequest,
        exec_id: str,
        timeout: float | None,
    ) -> None:
        try:
            running = await self._create_exec(container, request, exec_id, timeout)
        except BaseException as error:
            del self._execs[exec_id]
            if isinstance(error, asyncio.CancelledError):
                raise
            if not started.done():
                started.set_exception(error)
            return
        self._execs[exec_id] = running
        if started.done():
            await self.finish(running)
        else:
            started.set_result(running)

    async def _create_exec(
        self, container: str, request: ExecRequest, exec_id: str, timeout: float | None
    ) -> RunningExec:
        record = (await self._containers.find(container)).container
        if record.engine is None or record.status.state in (ContainerState.CREATING, ContainerState.DELETING):
            raise ContainerNotRunning(container=container, state=record.status.state.value, needs=_REQUIRED_STATE)
        engine_id = record.engine.engine_id
        session = await self._open(record, engine_id, request)
        return RunningExec(exec_id=exec_id, container=container, engine_id=engine_id, session=session, timeout=timeout)

    async def _open(self, container: Container, engine_id: str, request: ExecRequest) -> ExecSession:
        try:
            return await self._engine.exec(engine_id, request)
        except EngineRejected:
            # Inspected only after a failure, so that a successful start needs one call less.
            engine_container = await self._engine.inspect(engine_id)
            if engine_container is None or not engine_container.alive:
                # Other calls report the recorded state, but it may still be RUNNING if the process has just ended.
                recorded = container.status.state
                ended = (
                    engine_container.state.value.upper()
                    if engine_container and recorded not in STOPPED_STATES
                    else recorded.value
                )
                state = "gone" if engine_container is None else ended
                raise ContainerNotRunning(container=container.name, state=state, needs=_REQUIRED_STATE) from None
            if engine_container.state.value == "paused":
                raise ContainerPaused(container=container.name) from None
            raise

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- output and end ----------------------------------------------------------------------------------------------

    async def events(self, running: RunningExec) -> AsyncIterator[Output | Exited]:
        """Yield the output as it arrives, and last how the command ended.

        A reader that stops iterating blocks the process's writes.
        """
        timer = None
        if running.timeout is not None:
            timer = asyncio.get_running_loop().call_later(running.timeout, self._on_timeout, running)
        try:
            async for stream, data in running.session.read():
                yield Output(stream, data)
            yield await self._exited(running)
        finally:
            if timer is not None:
                timer.cancel()

    async def _exited(self, running: RunningExec) -> Exited:
        status = await running.session.status()
        if status.exit_code is None:
            # The output ended without an exit code: the process closed its streams itself, or its container was stopped
            # and the engine lost track of the process.
            status = await self._wait_for_end(running)
        code = status.exit_code
        if self._draining.is_set() and (code is None or running.end_reason is _EndReason.DISCONNECTED):
            raise ShuttingDown
        if code is None:
            raise ContainerNotRunning(container=running.container, state="stopped while the command ran")
        running.ended = True
        return Exited(
            code=code,
            signal=signal_name(code),
            message=status.start_error,
            timed_out=running.end_reason is _EndReason.TIMED_OUT,
        )

    async def _wait_for_end(self, running: RunningExec) -> ExecStatus:
        delay = _MIN_POLL_SECONDS
        while True:
            status = await running.session.status()
            if status.exit_code is not None:
                return status
            if not status.running:
                return status
            engine_container = await self._engine.inspect(running.engine_id)
            if engine_container is None or not engine_container.alive:
                return await running.session.status()
            await asyncio.sleep(delay)
            delay = min(delay * 2, _MAX_POLL_SECONDS)

    async def signal(self, running: RunningExec, name: str) -> None:
        """Send a signal, by name or number, to the command's main process. Raises ValueError for an unknown signal."""
        number = signal_number(name)
        if pid := await self._leader_pid(running):
            self._processes.signal(pid, running.engine_id, number)

    # -- termination -------------------------------------------------------------------------------------------------

    def _on_timeout(self, running: RunningExec) -> None:
        # Not part of `events`: termination continues after the output ends or the reader disconnects.
        self._spawn(self._end(running, _EndReason.TIMED_OUT), f"exec {running.id} timeout")

    async def finish(self, running: RunningExec) -> None:
        """Release a command, and terminate it if it still runs. Returns at once; termination continues in a task.

        Can be called again.
        """
        if running.finished:
            return
        running.finished = True
        if running.ended:
            del self._execs[running.id]
            await running.session.close()
            return
        self._spawn(self._hang_up(running), f"exec {running.id} hangup")

    async def _hang_up(self, running: RunningExec) -> None:
        try:
            await self._end(running, _EndReason.DISCONNECTED)
        finally:
            del self._execs[running.id]
            await running.session.close()

    async def _end(self, running: RunningExec, end_reason: _EndReason) -> None:
        retries = iter(_END_RETRY_DELAYS)
        while True:
            try:
                return await self._end_session(running, end_reason)
            except GpudockError as error:
                delay = next(retries, None) if isinstance(error, EngineUnavailable) else None
                if delay is None or self._draining.is_set():
                    log.warning("exec could not be terminated", exec_id=running.id, detail=error.message)
                    return None
            with suppress(TimeoutError):
                await asyncio.wait_for(self._draining.wait(), delay)

    async def _end_session(self, running: RunningExec, end_reason: _EndReason) -> None:
        """Send the first signal to every process of the session, and SIGKILL to those left after the grace period."""
        leader = await self._leader_pid(running)
        if not leader:
            return
        if running.end_reason is _EndReason.EXITED and self._processes.alive(leader, running.engine_id):
            running.end_reason = end_reason
        await self._signal_session(running, leader, _FIRST_SIGNAL[end_reason])
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._grace
        delay = _MIN_POLL_SECONDS
        while self._processes.alive(leader, running.engine_id) or await self._signal_session(running, leader, 0):
            if loop.time() >= deadline:
                await self._signal_session(running, leader, signal.SIGKILL)
                return
            await asyncio.sleep(delay)
            delay = min(delay * 2, _MAX_POLL_SECONDS, max(deadline - loop.time(), 0))

    async def _signal_session(self, running: RunningExec, leader: int, number: int) -> bool:
        # In a thread: it reads the whole process table.
        return await asyncio.to_thread(self._processes.signal, leader, running.engine_id, number, session=True)

    async def _leader_pid(self, running: RunningExec) -> int:
        """Wait for the pid of the main process; 0 if it never started or the engine no longer knows it.

        The engine reports the pid shortly before the process of the container runtime executes the program. Until then
        a signal would reach the runtime, which ignores most signals.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _PID_TIMEOUT
        status = await running.session.status()
        while status.running and not self._has_begun(running, status) and loop.time() < deadline:
            await asyncio.sleep(_MIN_POLL_SECONDS)
            status = await running.session.status()
        return status.pid

    def _has_begun(self, running: RunningExec, status: ExecStatus) -> bool:
        return bool(status.pid) and self._processes.has_begun(status.pid, running.engine_id)

    async def drain(self) -> None:
        """Refuse new commands, and terminate the running ones."""
        self._draining.set()
        for running in list(self._execs.values()):
            if running is not None:
                await self.finish(running)
        while self._tasks:
            await asyncio.wait(self._tasks)


def signal_number(name: str) -> int:
    """The number of a signal given by name, with or without SIG, or by number, 1 to 64. Raises ValueError."""
    bare = name.upper().removeprefix("SIG")
    number = 0
    if name.isascii() and name.isdecimal():
        number = int(name)
    elif relative := _RELATIVE_SIGNAL.fullmatch(bare):
        base = _FIRST_REALTIME_SIGNAL if relative[1] == "RTMIN" else _LAST_SIGNAL
        number = base + int(relative[2])
        number = number if number >= _FIRST_REALTIME_SIGNAL else 0
    elif found := signal.Signals.__members__.get(f"SIG{bare}"):
        number = found.value
    if not 1 <= number <= _LAST_SIGNAL:
        raise ValueError(f"unknown signal {name!r}; use a name such as SIGTERM, or a number from 1 to {_LAST_SIGNAL}")
    return number


def signal_name(code: int) -> str:
    """The signal that an exit code of the engine stands for, such as SIGKILL or SIGRTMIN+3; empty if none."""
    number = code - _SIGNAL_BASE
    if not 1 <= number <= _LAST_SIGNAL:
        return ""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN{number - _FIRST_REALTIME_SIGNAL:+d}"
