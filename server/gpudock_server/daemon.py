"""The daemon's life: start, recovery, serving, health and shutdown.

The first SIGTERM or SIGINT drains the daemon: no new work begins, operations run to a recorded step, and streams end
with SHUTTING_DOWN. A second signal ends the process immediately; the next start resumes the operations. SIGUSR1 logs
all threads and tasks.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Final, TypeVar

import structlog

from gpudock_server.adapters.etcd import NodeTaken
from gpudock_server.core.containers.retention import Retention
from gpudock_server.core.exec.sessions import ExecSessions
from gpudock_server.core.operations.engine import Operations
from gpudock_server.core.reconcile import Reconciler
from gpudock_server.core.watches import Watches
from gpudock_server.errors import EngineUnavailable, GpudockError, StoreFull, StoreUnavailable
from gpudock_server.logs import configure
from gpudock_server.ports import Engine, Store
from gpudock_server.rpc.listeners import listen
from gpudock_server.rpc.server import RpcServer
from gpudock_server.settings.definitions import Settings
from gpudock_server.startup import StartupError
from gpudock_server.task_dump import dump_on_sigusr1

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

T = TypeVar("T")

_HEALTH_INTERVAL_SECONDS = 2.0
# Health reports a dependency as unavailable after this time, even where other calls wait longer.
_HEALTH_TIMEOUT_SECONDS = 3.0
# Part of the shutdown grace that is reserved for the last events of watches; at most a quarter of the grace.
_WATCHER_NOTIFY_SECONDS = 1.0
# How long new changes wait for resumed operations that take time, such as a stop. Afterwards the resumed operations
# continue under their locks.
_RECOVERY_SECONDS = 5.0

# https://sourceware.org/glibc/manual/latest/html_node/Malloc-Tunable-Parameters.html
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_MIB: Final = 1024 * 1024
# Enough for the buffers of a few messages of exec output, half a megabyte each.
_MMAP_THRESHOLD_BYTES: Final = 4 * _MIB
_TRIM_THRESHOLD_BYTES: Final = 16 * _MIB


def run(settings: Settings, assemble: Callable[[AsyncExitStack, Shutdown], Awaitable[Daemon]]) -> int:
    """Run the daemon that `assemble` builds until it is stopped; returns the exit code of the process.

    What `assemble` pushes on the exit stack is closed in reverse order after the drain. Raises StartupError for a
    misconfiguration, or when the engine or etcd stops answering before recovery has ended.
    """
    configure(settings.log_format, settings.log_level)
    _set_malloc_thresholds()
    return asyncio.run(_run(settings, assemble))


async def _run(settings: Settings, assemble: Callable[[AsyncExitStack, Shutdown], Awaitable[Daemon]]) -> int:
    shutdown = Shutdown()
    shutdown.handle_signals()
    dump_on_sigusr1()
    async with AsyncExitStack() as stack:
        try:
            daemon = await shutdown.run_until_requested(assemble(stack, shutdown))
            if daemon is not None:
                await daemon.serve(shutdown)
        except EngineUnavailable as error:
            raise StartupError(
                f"lost the Docker Engine at {settings.docker_host}: {error.detail}", "check that dockerd is running"
            ) from error
        except StoreUnavailable as error:
            raise _etcd_startup_error(settings, error) from error
    log.info("stopped", exit_code=shutdown.exit_code)
    return shutdown.exit_code


def _etcd_startup_error(settings: Settings, error: StoreUnavailable) -> StartupError:
    if not settings.etcd_endpoints:
        return StartupError(
            f"the embedded etcd in {settings.state_dir} does not answer: {error.detail}", "see its log lines above"
        )
    return StartupError(
        f"etcd at {', '.join(settings.etcd_endpoints)} does not answer: {error.detail}",
        "start etcd or correct etcd_endpoints; leave etcd_endpoints empty to run the embedded etcd",
    )


def _set_malloc_thresholds() -> None:
    """Let glibc keep up to 16 MiB of freed memory in each of its arenas for the next allocations.

    By default glibc returns a large block to the kernel and requests a new one, zeroed page by page, for every message
    of a stream: half of the cost of such a stream. Without mallopt(3), as in other C libraries, nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)


@dataclass(slots=True)
class Shutdown:
    """The request to shut the daemon down, and the exit code to end with."""

    requested: asyncio.Event = field(default_factory=asyncio.Event)
    exit_code: int = 0

    def handle_signals(self) -> None:
        """Request the shutdown at the first SIGTERM or SIGINT; end the process immediately at the second."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self.requested.is_set():
            log.warning("second stop signal; exiting immediately")
            os._exit(1)
        self.requested.set()

    def fail(self) -> None:
        """Request the shutdown with exit code 1, so that a supervisor restarts the daemon."""
        self.exit_code = 1
        self.requested.set()

    def on_node_taken_over(self, taken: NodeTaken) -> None:
        """Request the shutdown: two daemons must never drive the operations of one node.

        The operations stay at their recorded steps.
        """
        log.critical("node taken over by another daemon; stopping", detail=str(taken))
        self.fail()

    async def run_until_requested(self, work: Awaitable[T]) -> T | None:
        """Return the result of `work`; cancel `work` and return None when the shutdown is requested first."""
        working = asyncio.ensure_future(work)
        requested = asyncio.create_task(self.requested.wait())
        try:
            await asyncio.wait((working, requested), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                working.cancel()
                await asyncio.gather(working, return_exceptions=True)
                return None
            return working.result()
        finally:
            working.cancel()
            requested.cancel()


@dataclass(frozen=True, slots=True)
class Daemon:
    """The assembled parts of the daemon, from recovery to drain."""

    settings: Settings
    version: str
    store: Store
    engine: Engine
    operations: Operations
    execs: ExecSessions
    watches: Watches
    reconciler: Reconciler
    retention: Retention
    server: RpcServer
    registered: asyncio.Event
    """Set once the record of this node is in the store."""

    async def serve(self, shutdown: Shutdown) -> None:
        """Answer reads, recover, accept all calls until the shutdown is requested, then drain.

        Raises StartupError if a socket or an address cannot be bound; EngineUnavailable or StoreUnavailable if the
        engine or etcd stops answering before recovery has ended.
        """
        # Bind before any operation is resumed: a socket that is in use means that two daemons share their settings.
        listeners = listen(self.server.grpc, self.settings)
        try:
            # Reads are answered during recovery, which may wait for the engine; health is NOT_SERVING meanwhile.
            await self.server.set_serving(False)
            await self.server.grpc.start()
            resumed = await shutdown.run_until_requested(self._try_recover())
            if not shutdown.requested.is_set():
                log.info("serving", node=self.settings.node_name, version=self.version, addresses=listeners.addresses)
                await self._run_background_until_requested(shutdown, resumed)
        finally:
            await self._drain()
            listeners.close()

    async def _recover(self) -> tuple[str, ...]:
        """Resume unfinished operations, compare records with the engine, then allow changes.

        Returns the ids of the resumed operations that are still running, such as one that pulls an image.
        """
        resumed = await self.reconciler.recover()
        try:
            async with asyncio.timeout(_RECOVERY_SECONDS):
                await self.operations.wait_until_ended_or_interruptible(resumed)
        except TimeoutError:
            log.warning("recovery continues in background", operations=sorted(self.operations.active))
        await self.reconciler.full_pass()
        self.operations.set_recovery_blocked(None)
        self.operations.allow_new_operations()
        return tuple(operation_id for operation_id in resumed if operation_id in self.operations.active)

    async def _try_recover(self) -> tuple[str, ...] | None:
        """Recover; None if the store is full: recovery must be repeated, and only reads are served until then."""
        if not self.registered.is_set():
            full = (await self.store.usage()).full
            self._postpone_recovery(StoreFull(full or "no space for the record of this node"))
            return None
        try:
            return await self._recover()
        except StoreFull as error:
            self._postpone_recovery(error)
            return None

    def _postpone_recovery(self, error: StoreFull) -> None:
        log.warning("recovery postponed: store full", detail=error.detail)
        self.operations.set_recovery_blocked(error)

    async def _run_background_until_requested(self, shutdown: Shutdown, resumed: Sequence[str] | None) -> None:
        background = asyncio.create_task(self._run_background_tasks(resumed), name="background tasks")
        try:
            await shutdown.run_until_requested(background)
        except Exception:
            # The background tasks handle all expected errors, so this one is a defect; calls must not continue without
            # reconcile and health.
            log.exception("background task failed; stopping")
            shutdown.fail()

    async def _run_background_tasks(self, resumed: Sequence[str] | None) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._reconcile(resumed))
            tasks.create_task(self._report_health())

    async def _reconcile(self, resumed: Sequence[str] | None) -> None:
        while resumed is None:
            await asyncio.sleep(_HEALTH_INTERVAL_SECONDS)
            try:
                resumed = await self._try_recover()
            except GpudockError as error:
                log.warning("recovery failed; will retry", detail=error.message)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.reconciler.pass_after(resumed))
            tasks.create_task(self.reconciler.run())
            tasks.create_task(self.retention.run())

    async def _report_health(self) -> None:
        problem: str | None = None
        while True:
            before, problem = problem, await self._health_problem()
            await self.server.set_serving(not problem)
            if problem != before and (problem or before):
                log.warning("not serving" if problem else "serving again", detail=problem)
            await asyncio.sleep(_HEALTH_INTERVAL_SECONDS)

    async def _health_problem(self) -> str:
        """Why this daemon cannot serve; empty if it can."""
        problems = await asyncio.gather(
            _health_error("etcd", self.store.ping()), _health_error("the engine", self.engine.info())
        )
        return "; ".join(filter(None, problems))

    async def _drain(self) -> None:
        log.info("draining", operations=len(self.operations.active))
        await self.server.set_serving(False)
        self.watches.drain()
        loop = asyncio.get_running_loop()
        grace = self.settings.shutdown_grace
        deadline = loop.time() + grace
        # Operations and execs get a little less than the grace, so that watches can still report how they ended.
        work_seconds = grace - min(_WATCHER_NOTIFY_SECONDS, grace / 4)
        await asyncio.gather(self.operations.drain(work_seconds), self._drain_execs(work_seconds))
        await self.server.grpc.stop(max(0.0, deadline - loop.time()))

    async def _drain_execs(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.execs.drain()
        except TimeoutError:
            log.warning("exec sessions still running at shutdown", after_seconds=seconds)


async def _health_error(dependency: str, call: Awaitable[object]) -> str:
    """Why `dependency` is unavailable; empty if `call` succeeds in time."""
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT_SECONDS):
            await call
    except TimeoutError:
        return f"{dependency}: no answer within {_HEALTH_TIMEOUT_SECONDS:g} s"
    except GpudockError as error:
        return error.message
    return ""
