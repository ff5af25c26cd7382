"""The embedded etcd: a child process that only the daemon's user can reach, used if no etcd is configured."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections import deque
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import structlog

from gpudock_server.adapters.etcd import messages
from gpudock_server.adapters.etcd.client import EtcdAddress
from gpudock_server.adapters.etcd.connection import CallFailed, EtcdConnection
from gpudock_server.adapters.etcd.embedded_folder import CLIENT_SOCKET, PEER_SOCKET, EtcdFolder
from gpudock_server.adapters.etcd.embedded_program import EtcdProgram, find_program
from gpudock_server.adapters.etcd.maintenance import hard_quota
from gpudock_server.startup import StartupError

DEFAULT_START_TIMEOUT = timedelta(seconds=60)
DEFAULT_QUOTA = 2 << 30

_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.02
_CALL_TIMEOUT = timedelta(seconds=1)
# The pause before a restart: doubled each time, and reset after etcd has run for _BACKOFF_RESET_SECONDS.
_MIN_BACKOFF_SECONDS = 0.1
_MAX_BACKOFF_SECONDS = 10.0
_BACKOFF_RESET_SECONDS = 60.0
_LINE_BYTES = 1 << 20
_KEPT_LINES = 20

_FLAGS = (
    "--name=gpudock",
    "--data-dir=data",
    # Sockets in a folder of mode 0700, with relative names, because etcd rejects absolute ones.
    f"--listen-client-urls=unix://{CLIENT_SOCKET}",
    f"--advertise-client-urls=unix://{CLIENT_SOCKET}",
    f"--listen-peer-urls=unix://{PEER_SOCKET}",
    f"--initial-advertise-peer-urls=unix://{PEER_SOCKET}",
    f"--initial-cluster=gpudock=unix://{PEER_SOCKET}",
    # Short, because there are no other members: it serves within a second after a crash.
    "--election-timeout=500",
    # Page tokens are valid for an hour; older history is freed.
    "--auto-compaction-mode=periodic",
    "--auto-compaction-retention=1h",
    # The number of entries that etcd keeps in memory; its default of 100,000 could be hundreds of MB.
    "--snapshot-count=10000",
    "--logger=zap",
    "--log-level=warn",
    "--log-outputs=stderr",
)
_ROUTINE = (
    # Logged at every start: this etcd has no users, and only the daemon's user can reach it.
    "simple token is not cryptographically signed",
    # Logged at every stop: its HTTP gateway, which is not used, has lost its socket.
    "[core] grpc: addrConn.createTransport failed to connect",
)
_LEVELS = {"debug": "debug", "info": "info", "warn": "warning"}

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


class EmbeddedEtcd:
    """Runs etcd in `state_dir`/etcd: starts it, restarts it when it exits, and stops it with the daemon.

    The kernel terminates it when the daemon dies. `start_timeout` is how long it may take to read its data;
    `quota_bytes` limits its data, with a reserve on top. `allow_inconsistent` accepts an etcd version that can lose
    consistency, if there is no other.
    """

    def __init__(
        self,
        state_dir: Path,
        *,
        start_timeout: timedelta = DEFAULT_START_TIMEOUT,
        quota_bytes: int = DEFAULT_QUOTA,
        allow_inconsistent: bool = False,
    ) -> None:
        self._quota_flag = f"--quota-backend-bytes={hard_quota(quota_bytes)}"
        self._allow_inconsistent = allow_inconsistent
        self._folder = EtcdFolder(state_dir / "etcd")
        self._start_timeout = start_timeout.total_seconds()
        self._last_lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._process: Process | None = None
        self._stderr_task: asyncio.Task[None] | None = None
        self._supervisor: asyncio.Task[None] | None = None

    @property
    def address(self) -> EtcdAddress:
        """Its address, valid in this process only."""
        return EtcdAddress((self._folder.endpoint,))

    @property
    def pid(self) -> int:
        """Its pid; 0 if it does not run."""
        return self._process.pid if self._process and self._process.returncode is None else 0

    async def start(self) -> None:
        """Start etcd and wait until it answers. Raises StartupError."""
        await self._folder.lock()
        try:
            program = await find_program(self._folder.data_version, allow_inconsistent=self._allow_inconsistent)
            await self._spawn(program)
            await self._wait_until_ready()
            self._folder.record_version(program.version)
        except BaseException:
            await self.close()
            raise
        self._supervisor = asyncio.create_task(self._supervise(program), name="etcd supervisor")

    async def close(self) -> None:
        """Stop etcd: SIGTERM, then SIGKILL."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            with suppress(asyncio.CancelledError):
                await self._supervisor
            self._supervisor = None
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(_STOP_SECONDS):
                    await process.wait()
            except TimeoutError:
                log.warning("etcd did not stop in time; killing it", pid=process.pid)
                process.kill()
                await process.wait()
        if self._stderr_task is not None:
            await self._stderr_task
            self._stderr_task = None
        self._folder.release()

    async def _spawn(self, program: EtcdProgram) -> None:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise StartupError("setpriv not found; it is needed to stop etcd with the daemon", "install util-linux")
        if self._stderr_task is not None:
            await self._stderr_task
        self._last_lines.clear()
        self._folder.clear_sockets()
        self._process = await asyncio.create_subprocess_exec(
            # setpriv instead of a preexec_fn: Python code between fork and exec is not safe with grpc's threads and
            # fork handlers.
            setpriv,
            "--pdeathsig=TERM",
            "--",
            str(program.path),
            *_FLAGS,
            self._quota_flag,
            cwd=self._folder.path,
            env=_environment(),
            stdin=DEVNULL,
            stdout=DEVNULL,
            stderr=PIPE,
            limit=_LINE_BYTES,
            # Ctrl-C in a terminal must not reach etcd: the daemon needs it until it has drained.
            start_new_session=True,
        )
        self._stderr_task = asyncio.create_task(self._relay_stderr(self._process), name="etcd log relay")
        log.info("etcd started", pid=self._process.pid, endpoint=self._folder.endpoint)

    async def _wait_until_ready(self) -> None:
        process = self._process
        connection = EtcdConnection(self.address, timeout=_CALL_TIMEOUT)
        await connection.open()
        try:
            async with asyncio.timeout(self._start_timeout):
                while process is not None and process.returncode is None:
                    if self._folder.has_socket:
                        with suppress(CallFailed):
                            await connection.txn(success=[messages.get(b"/")])
                            return
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise StartupError(
                f"etcd was not ready within {self._start_timeout:g} s; its last output:\n{self._last_output()}",
                "the disk is slow, or etcd has more data than it can read in this time",
            ) from None
        finally:
            await connection.close()
        code = process.returncode if process else None
        output = await self._final_output()
        raise StartupError(f"etcd exited during startup ({_describe_exit(code)}); its last output:\n{output}")

    async def _supervise(self, program: EtcdProgram) -> None:
        loop = asyncio.get_running_loop()
        pause = _MIN_BACKOFF_SECONDS
        while True:
            began = loop.time()
            if self._process is not None:
                code = await self._process.wait()
                log.error("etcd exited; restarting", how=_describe_exit(code))
            if loop.time() - began > _BACKOFF_RESET_SECONDS:
                pause = _MIN_BACKOFF_SECONDS
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_BACKOFF_SECONDS)
            try:
                await self._spawn(program)
            except (OSError, StartupError) as error:
                self._process = None
                log.error("etcd restart failed; will retry", reason=str(error))  # noqa: TRY400 - the reason is enough

    async def _relay_stderr(self, process: Process) -> None:
        """Relay etcd's stderr to the log, and keep the last lines."""
        if process.stderr is None:
            return
        while True:
            try:
                line = await process.stderr.readline()
            except ValueError:
                continue  # A line longer than _LINE_BYTES, which asyncio has dropped.
            if not line:
                return
            text = line.decode(errors="replace").strip()
            if not any(phrase in text for phrase in _ROUTINE):
                self._last_lines.append(text)
                _log_line(text)

    def _last_output(self) -> str:
        return "\n".join(self._last_lines)

    async def _final_output(self) -> str:
        if self._stderr_task is not None:
            await asyncio.wait([self._stderr_task], timeout=_STOP_SECONDS)
        return self._last_output()


def _environment() -> dict[str, str]:
    """The daemon's environment, without variables that etcd reads as flags or as a service manager's socket."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == "ETCD_UNSUPPORTED_ARCH" or not (name.startswith("ETCD_") or name == "NOTIFY_SOCKET")
    }


def _log_line(text: str) -> None:
    try:
        line = json.loads(text)
        level, message = line.pop("level"), line.pop("msg")
    except (ValueError, KeyError, AttributeError, TypeError):
        level, message, line = "warn", text, {}
    for name in ("ts", "caller", "event", "logger", "level"):
        line.pop(name, None)
    getattr(log, _LEVELS.get(level, "error"))("etcd log", message=message, **line)


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "still running"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
