"""Refreshes containers that the engine is restarting, and starts those that the engine fails or forgets to start.

An engine that fails to start a container by itself (a driver that is loaded late at boot, a missing GPU) never tries
again, and sends no event. An engine that was killed stops, when it starts again, the containers that survived it, and
sometimes does not start one of them although its restart policy requires it (with Docker 20.10.24 on a busy host, after
one kill in ten). So a RESTARTING container is refreshed after a while, and a container that the engine leaves stopped
against its restart policy is started by an operation, with a growing delay between tries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import structlog

from gpudock_server.core.containers.commands import Start
from gpudock_server.core.containers.status import RESTART_SETTLE_TIME, observed_status
from gpudock_server.core.operations.engine import Operations
from gpudock_server.core.operations.saga import OperationDraft
from gpudock_server.core.reconcile.drift import ReportDrift
from gpudock_server.errors import GpudockError
from gpudock_server.model.container import ACTIVE_STATES, Container, ContainerState
from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy
from gpudock_server.model.engine import EngineContainer
from gpudock_server.model.record import now
from gpudock_server.model.spec import RestartPolicy, RestartPolicyKind
from gpudock_server.ports import Engine, Store

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Seconds until a RESTARTING container is refreshed, the first and the longest. The engine's own delay between two runs
# grows from 0.1 seconds to a minute.
_FIRST_CHECK_SECONDS = 1.0
_MAX_CHECK_SECONDS = 60.0
# Seconds until a run that has just begun counts as RUNNING.
_RUNNING_AFTER_SECONDS = RESTART_SETTLE_TIME.total_seconds() + 0.05


class _StartNotNeeded(Exception):
    """The container no longer needs a start."""


@dataclass(slots=True)
class _WatchedContainer:
    """A container to check when it is `due` (a time of the event loop, in seconds).

    `failed`: its start failed, and the check starts it; otherwise it is RESTARTING, and the check refreshes it.
    `last_error` is the error of the last try. `delay` is in seconds.
    """

    name: str
    uid: str
    failed: bool
    delay: float
    due: float
    due_time: datetime
    tries: int = 0
    last_error: str = ""
    busy: bool = False

    def schedule(self, delay: float) -> None:
        """Make the container due in `delay` seconds."""
        self.delay = delay
        self.due = asyncio.get_running_loop().time() + delay
        self.due_time = now() + timedelta(seconds=delay)


class Restarts:
    """The containers to check, and when."""

    def __init__(
        self,
        store: Store,
        engine: Engine,
        operations: Operations,
        draft_start: Callable[[Start], Awaitable[OperationDraft]],
        *,
        first_delay: float,
        max_delay: float,
    ) -> None:
        """`first_delay` and `max_delay`: seconds from a failed start to the next try, the first and the longest."""
        self._store = store
        self._engine = engine
        self._draft_start = draft_start
        self._operations = operations
        self._first_delay = first_delay
        self._max_delay = max(first_delay, max_delay)
        self._watched: dict[str, _WatchedContainer] = {}
        # Finish times, by uid, of containers that ran before the engine went away and had ended when it was back.
        self._ended_with_engine: dict[str, datetime] = {}
        self._changed = asyncio.Event()

    def track(
        self,
        container: Container,
        engine_container: EngineContainer,
        report_drift: ReportDrift,
        *,
        ended_with_engine: bool = False,
    ) -> None:
        """Decide whether and when to check a container, whose status must be up to date.

        `ended_with_engine`: it ran before the engine went away, and had ended when the engine was back.
        """
        if ended_with_engine and engine_container.finish_time is not None:
            self._ended_with_engine[container.uid] = engine_container.finish_time
        watched = self._watched.get(container.uid)
        if cause := self._cause(container, engine_container):
            if watched is None or not watched.failed:
                watched = self._watch(container, failed=True, delay=self._first_delay)
            if not _tries_left(container.spec.restart_policy, watched.tries):
                watched.due = float("inf")
            report_drift(_start_failed_drift(watched, container, engine_container, cause))
            return
        if watched is not None and watched.failed:
            report_drift(_resolved_drift(container, engine_container))
            self.forget(container)
            watched = None
        if container.status.state is not ContainerState.RESTARTING:
            self.forget(container)
            return
        if watched is None:
            watched = self._watch(container, failed=False, delay=_FIRST_CHECK_SECONDS)
        if engine_container.alive:
            watched.schedule(min(watched.delay, _RUNNING_AFTER_SECONDS))
            self._changed.set()

    def forget(self, container: Container) -> None:
        """Stop checking a container: its engine container is gone, or an operation stops it."""
        self._watched.pop(container.uid, None)
        self._ended_with_engine.pop(container.uid, None)

    def _cause(self, container: Container, engine_container: EngineContainer) -> str:
        """Why the engine leaves a container stopped against its restart policy; empty where it does not.

        A container that ended or was stopped by others has no error: the engine keeps errors of failed starts only,
        until the next start. A container that StopContainer stopped is STOPPED.
        """
        policy = container.spec.restart_policy
        if (
            container.status.state is not ContainerState.EXITED
            or not container.status.holds_resources
            or policy.kind is RestartPolicyKind.NO
        ):
            return ""
        if engine_container.error:
            return engine_container.error
        forgotten = (
            engine_container.finish_time is not None
            and engine_container.finish_time == self._ended_with_engine.get(container.uid)
        )
        if forgotten and (policy.kind is not RestartPolicyKind.ON_FAILURE or container.status.exit_code):
            return "it ended when the engine restarted, and the engine did not start it again"
        return ""

    def _watch(self, container: Container, *, failed: bool, delay: float) -> _WatchedContainer:
        watched = _WatchedContainer(container.name, container.uid, failed, delay, 0.0, now())
        watched.schedule(delay)
        self._watched[container.uid] = watched
        self._changed.set()
        return watched

    async def run(self, refresh: Callable[[str, str], Awaitable[None]]) -> None:
        """Check due containers until cancelled. `refresh` updates the status of a container (name, uid)."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                time = asyncio.get_running_loop().time()
                due = [watched for watched in self._watched.values() if watched.due <= time and not watched.busy]
                for watched in due:
                    watched.busy = True
                    tasks.create_task(self._check(watched, refresh))
                await self._wait_until_due()

    async def _wait_until_due(self) -> None:
        """Wait until a container is due, or the watched containers change."""
        self._changed.clear()
        due = min((watched.due for watched in self._watched.values() if not watched.busy), default=None)
        timeout = None if due is None else max(0.0, due - asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(timeout):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _check(self, watched: _WatchedContainer, refresh: Callable[[str, str], Awaitable[None]]) -> None:
        try:
            if watched.failed:
                await self._start(watched)
            watched.schedule(min(watched.delay * 2, self._max_delay if watched.failed else _MAX_CHECK_SECONDS))
            await refresh(watched.name, watched.uid)
            if await self._is_gone(watched) and self._watched.get(watched.uid) is watched:
                del self._watched[watched.uid]
        finally:
            watched.busy = False
            self._changed.set()

    async def _is_gone(self, watched: _WatchedContainer) -> bool:
        try:
            view = await self._store.container(watched.name)
        except GpudockError:
            return False
        return view is None or view.container.uid != watched.uid

    async def _start(self, watched: _WatchedContainer) -> None:
        """Start a container by an operation, and wait for the operation's end."""

        async def draft() -> OperationDraft:
            view = await self._store.container(watched.name)
            if view is None or view.container.uid != watched.uid or view.operation_id or view.container.engine is None:
                raise _StartNotNeeded
            engine_container = await self._engine.inspect(view.container.engine.engine_id)
            current = view.container.changed(status=observed_status(view.container, engine_container))
            if engine_container is None or not self._cause(current, engine_container):
                raise _StartNotNeeded
            start = await self._draft_start(Start(watched.name))
            if start.target_record.expect != view.version:
                raise _StartNotNeeded
            return start

        try:
            operation_id = await self._operations.begin(draft, None)
            log.info("start retried", container=watched.name, operation_id=operation_id, tries=watched.tries + 1)
            await self._operations.wait_until_ended((operation_id,))
            error = (await self._operations.get(operation_id)).operation.error
            watched.last_error = error.message if error is not None else ""
        except _StartNotNeeded:
            return
        except GpudockError as error:
            watched.last_error = error.message
        watched.tries += 1


def _tries_left(policy: RestartPolicy, tries: int) -> bool:
    limited = policy.kind is RestartPolicyKind.ON_FAILURE and policy.max_retry_count
    return not limited or tries < policy.max_retry_count


def _start_failed_drift(
    watched: _WatchedContainer, container: Container, engine_container: EngineContainer, cause: str
) -> Drift:
    tried = f"tried {watched.tries} times" if watched.tries else "not tried yet"
    if watched.last_error and watched.last_error != cause:
        tried += f"; the last try failed: {watched.last_error}"
    remedy, plan = DriftRemedy.PENDING, f"next start at the due time ({tried}); StopContainer cancels it"
    if not _tries_left(container.spec.restart_policy, watched.tries):
        remedy = DriftRemedy.REPORTED
        plan = f"no automatic repair: its restart policy allows no more tries ({tried}); start it"
    return Drift(
        kind=DriftKind.START_FAILED,
        remedy=remedy,
        container=container.name,
        uid=container.uid,
        engine_id=engine_container.id,
        engine_name=engine_container.name,
        expected=ContainerState.RUNNING.value,
        actual=container.status.state.value,
        message=f"{container.name} is not running: {cause}",
        plan=plan,
        due_time=watched.due_time if remedy is DriftRemedy.PENDING else None,
    )


def _resolved_drift(container: Container, engine_container: EngineContainer) -> Drift:
    state = container.status.state
    return Drift(
        kind=DriftKind.START_FAILED,
        remedy=DriftRemedy.REPAIRED,
        container=container.name,
        uid=container.uid,
        engine_id=engine_container.id,
        engine_name=engine_container.name,
        expected=ContainerState.RUNNING.value if state in ACTIVE_STATES else "",
        actual=state.value,
        message=f"{container.name} was not running, although its restart policy requires it",
        plan=f"now {state.value}",
    )
