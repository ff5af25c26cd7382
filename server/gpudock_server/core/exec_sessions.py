"""Commands inside running containers: their streams, their end, and what happens when the caller is gone.

The policy for a caller that hangs up, and for a daemon that stops: everything in the process's session gets SIGHUP, and
SIGKILL after a grace. A command that wants to live on starts a session of its own (setsid).
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

from gpudock_server.core.containers.world import World
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
from gpudock_server.model.container import DOES_NOT_RUN, Container, ContainerState
from gpudock_server.model.engine import ExecRequest, ExecStatus, ExecStream
from gpudock_server.ports import ExecSession, ProcessControl

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# The engine reports a process that a signal ended as 128 + the signal's number, as shells do.
_SIGNAL_BASE = 128
_LAST_SIGNAL = 64
_FIRST_REALTIME_SIGNAL = 34  # as glibc counts: it keeps the kernel's first two to itself
_RELATIVE_SIGNAL = re.compile(r"(RTMIN|RTMAX)([+-]\d{1,2})", re.ASCII)

# What the engine says instead of the output of a program that it could not start ends with this.
_END_OF_REFUSAL = b"\r\n"
_COULD_NOT_RUN = 126
_NOT_FOUND = 127
_SAYS_NOT_FOUND = re.compile(
    r"executable file (?:`.*` )?not found|exec: \".*\": (?:stat .*: )?no such file or directory", re.DOTALL
)

_NEEDS = "to run a command in it, it must be RUNNING"
# An engine that does not answer when a process is to be ended is asked again after so many seconds each.
_ENDING_RETRIES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
# Between two looks at something that the engine or the kernel brings about soon: seconds, at first and at most.
_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 0.25
# Seconds that a process has from the engine's yes to having a pid.
_BIRTH_SECONDS = 30.0


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


class _Fate(Enum):
    """Why a process ends."""

    OF_ITSELF = auto()
    TIMED_OUT = auto()
    HUNG_UP = auto()


_FIRST_SIGNAL = {_Fate.TIMED_OUT: signal.SIGTERM, _Fate.HUNG_UP: signal.SIGHUP}


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
        self.timeout = timeout
        self.fate = _Fate.OF_ITSELF
        self.ended = False
        self.finished = False

    async def write(self, data: bytes) -> None:
        """Give `data` to its stdin; returns when the engine has taken it."""
        await self.session.write(data)

    async def close_stdin(self) -> None:
        """End its stdin."""
        await self.session.close_stdin()

    async def resize(self, rows: int, columns: int) -> None:
        """Tell its terminal a new size."""
        await self.session.resize(rows, columns)


class ExecSessions:
    """Starts commands and sees to their end."""

    def __init__(self, world: World, processes: ProcessControl, *, hangup_grace: float, limit: int) -> None:
        """`hangup_grace` in seconds from SIGHUP to SIGKILL; `limit` is how many commands may run at once."""
        self._world = world
        self._processes = processes
        self._grace = hangup_grace
        self._limit = limit
        # By id, from before the engine is asked (None) until the process is known to have ended.
        self._execs: dict[str, RunningExec | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = asyncio.Event()

    async def start(
        self, container: str, request: ExecRequest, *, exec_id: str = "", timeout: float | None = None
    ) -> RunningExec:
        """Start a command.

        Raises ContainerNotFound, WrongNode, ContainerNotRunning, ContainerPaused, ExecExists, ExecLimit, ShuttingDown,
        and the engine's errors. Whoever starts one must call `finish` in the end, whatever happens.
        """
        if self._draining.is_set():
            raise ShuttingDown
        exec_id = exec_id or str(uuid.uuid4())
        if exec_id in self._execs:
            raise ExecExists(exec_id=exec_id)
        if len(self._execs) >= self._limit:
            raise ExecLimit(limit=self._limit)
        self._execs[exec_id] = None
        # In a task of its own: a process that the engine starts for a caller who leaves meanwhile has to be ended.
        begun: asyncio.Future[RunningExec] = asyncio.get_running_loop().create_future()
        self._spawn(self._begin(begun, container, request, exec_id, timeout), f"start {exec_id}")
        try:
            running = await begun
        except asyncio.CancelledError:
            # It may have begun in the same moment.
            if begun.done() and not begun.cancelled() and begun.exception() is None:
                await self.finish(begun.result())
            raise
        if self._draining.is_set():
            await self.finish(running)
            raise ShuttingDown
        return running

    async def _begin(
        self,
        begun: asyncio.Future[RunningExec],
        container: str,
        request: ExecRequest,
        exec_id: str,
        timeout: float | None,
    ) -> None:
        try:
            running = await self._started(container, request, exec_id, timeout)
        except BaseException as error:
            del self._execs[exec_id]
            if isinstance(error, asyncio.CancelledError):
                raise
            if not begun.done():
                begun.set_exception(error)
            return
        self._execs[exec_id] = running
        if begun.done():
            await self.finish(running)
        else:
            begun.set_result(running)

    async def _started(self, container: str, request: ExecRequest, exec_id: str, timeout: float | None) -> RunningExec:
        head = (await self._world.find(container)).container
        if head.engine is None or head.status.state in (ContainerState.CREATING, ContainerState.DELETING):
            raise ContainerNotRunning(container=container, state=head.status.state.value, needs=_NEEDS)
        engine_id = head.engine.engine_id
        session = await self._open(head, engine_id, request)
        return RunningExec(exec_id=exec_id, container=container, engine_id=engine_id, session=session, timeout=timeout)

    async def _open(self, head: Container, engine_id: str, request: ExecRequest) -> ExecSession:
        try:
            return await self._world.engine.exec(engine_id, request)
        except EngineRejected:
            # Not asked before, so that the way that mostly succeeds costs one call less.
            seen = await self._world.engine.inspect(engine_id)
            if seen is None or not seen.alive:
                # The recorded state is what other calls show; it may still be RUNNING where the process just ended.
                recorded = head.status.state
                ended = seen.state.value.upper() if seen and recorded not in DOES_NOT_RUN else recorded.value
                state = "gone" if seen is None else ended
                raise ContainerNotRunning(container=head.name, state=state, needs=_NEEDS) from None
            if seen.state.value == "paused":
                raise ContainerPaused(container=head.name) from None
            raise

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- output and end ----------------------------------------------------------------------------------------------

    async def events(self, running: RunningExec) -> AsyncIterator[Output | Exited]:
        """Its output as it comes, and last how it ended.

        Not taking the next one holds the process back. What the engine says of a program that cannot be run comes as
        the message of its end and not as the program's output.
        """
        clock = None
        if running.timeout is not None:
            clock = asyncio.get_running_loop().call_later(running.timeout, self._time_is_over, running)
        refusal: bytes | None = None
        first = True
        try:
            async for stream, data in running.session.read():
                if first:
                    first = False
                    if data.endswith(_END_OF_REFUSAL) and await _never_began(running):
                        refusal = data
                        continue
                yield Output(stream, data)
            exited = await self._exited(running)
            yield exited if refusal is None else _refused(exited.code, refusal)
        finally:
            if clock is not None:
                clock.cancel()

    async def _exited(self, running: RunningExec) -> Exited:
        status = await running.session.status()
        if status.exit_code is None:
            # The output is closed and the process is not known to have ended: it closed its streams itself, or its
            # container was stopped and the engine lost track of it.
            status = await self._wait_for_end(running)
        code = status.exit_code
        if self._draining.is_set() and (code is None or running.fate is _Fate.HUNG_UP):
            raise ShuttingDown
        if code is None:
            raise ContainerNotRunning(container=running.container, state="stopped while the command ran")
        running.ended = True
        return Exited(code=code, signal=signal_name(code), timed_out=running.fate is _Fate.TIMED_OUT)

    async def _wait_for_end(self, running: RunningExec) -> ExecStatus:
        pause = _FIRST_PAUSE
        while True:
            status = await running.session.status()
            if status.exit_code is not None:
                return status
            if not status.running:
                return status
            seen = await self._world.engine.inspect(running.engine_id)
            if seen is None or not seen.alive:
                return await running.session.status()
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    async def signal(self, running: RunningExec, name: str) -> None:
        """Send a signal, by name or number, to the command's main process. Raises ValueError on no signal."""
        number = signal_number(name)
        if pid := await self._leader(running):
            self._processes.signal(pid, running.engine_id, number)

    # -- the end that is not its own ---------------------------------------------------------------------------------

    def _time_is_over(self, running: RunningExec) -> None:
        # Not a part of `events`: what has begun goes on when the output has ended, or its reader has left.
        self._spawn(self._end(running, _Fate.TIMED_OUT), f"end {running.id}, whose time is over")

    async def finish(self, running: RunningExec) -> None:
        """Let go of a command, ending it by the policy if it runs still. Returns at once; the ending goes on.

        May be called again.
        """
        if running.finished:
            return
        running.finished = True
        if running.ended:
            del self._execs[running.id]
            await running.session.close()
            return
        self._spawn(self._hang_up(running), f"hang up {running.id}")

    async def _hang_up(self, running: RunningExec) -> None:
        try:
            await self._end(running, _Fate.HUNG_UP)
        finally:
            del self._execs[running.id]
            await running.session.close()

    async def _end(self, running: RunningExec, fate: _Fate) -> None:
        retries = iter(_ENDING_RETRIES)
        while True:
            try:
                return await self._end_session(running, fate)
            except GpudockError as error:
                pause = next(retries, None) if isinstance(error, EngineUnavailable) else None
                if pause is None or self._draining.is_set():
                    log.warning("a command could not be ended", exec_id=running.id, detail=error.message)
                    return None
            with suppress(TimeoutError):
                await asyncio.wait_for(self._draining.wait(), pause)

    async def _end_session(self, running: RunningExec, fate: _Fate) -> None:
        """Everything in the session gets the first signal, and after the grace SIGKILL, its leader gone or not."""
        leader = await self._leader(running)
        if not leader:
            return
        if running.fate is _Fate.OF_ITSELF and self._processes.alive(leader, running.engine_id):
            running.fate = fate
        await self._signal_session(running, leader, _FIRST_SIGNAL[fate])
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._grace
        pause = _FIRST_PAUSE
        while self._processes.alive(leader, running.engine_id) or await self._signal_session(running, leader, 0):
            if loop.time() >= deadline:
                await self._signal_session(running, leader, signal.SIGKILL)
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE, max(deadline - loop.time(), 0))

    async def _signal_session(self, running: RunningExec, leader: int, number: int) -> bool:
        # It reads the whole process table.
        return await asyncio.to_thread(self._processes.signal, leader, running.engine_id, number, session=True)

    async def _leader(self, running: RunningExec) -> int:
        """The pid of its main process, once it has one; 0 when it never began or the engine no longer knows it.

        The engine names the pid a moment before the container runtime's process becomes the program. A signal in that
        moment would be the runtime's, which ignores most, so that moment is waited for.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _BIRTH_SECONDS
        status = await running.session.status()
        while status.running and not self._has_begun(running, status) and loop.time() < deadline:
            await asyncio.sleep(_FIRST_PAUSE)
            status = await running.session.status()
        return status.pid

    def _has_begun(self, running: RunningExec, status: ExecStatus) -> bool:
        return bool(status.pid) and self._processes.begun(status.pid, running.engine_id)

    async def drain(self) -> None:
        """Start nothing new, and end what runs."""
        self._draining.set()
        for running in list(self._execs.values()):
            if running is not None:
                await self.finish(running)
        while self._tasks:
            await asyncio.wait(self._tasks)


async def _never_began(running: RunningExec) -> bool:
    status = await running.session.status()
    return status.pid == 0 and status.exit_code in (_COULD_NOT_RUN, _NOT_FOUND)


def _refused(code: int, refusal: bytes) -> Exited:
    message = refusal.decode(errors="replace").strip()
    # Engines say 126 for both.
    return Exited(code=_NOT_FOUND if _SAYS_NOT_FOUND.search(message) else code, message=message)


def signal_number(name: str) -> int:
    """The number of a signal by its name, with or without SIG, or by itself, 1 to 64. Raises ValueError."""
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
        raise ValueError(f"there is no signal {name!r}")
    return number


def signal_name(code: int) -> str:
    """The signal that an exit code of the engine stands for, such as SIGKILL or SIGRTMIN+3; empty if for none."""
    number = code - _SIGNAL_BASE
    if not 1 <= number <= _LAST_SIGNAL:
        return ""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIGRTMIN{number - _FIRST_REALTIME_SIGNAL:+d}"
