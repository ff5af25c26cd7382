"""Containers that the engine is starting again, and those whose start it gave up or forgot.

An engine that fails to start a container by itself (a driver that is loaded late at boot, a card that is gone) never
tries again, and tells nobody: there is no event. An engine that was killed stops the containers that have outlived it
when it starts, and now and then forgets to start one of them again, although its restart policy says so (seen with
Docker 20.10.24 on a busy host, after one kill in ten). So a container that is RESTARTING is looked at again after a
while, and one that its policy keeps running and that the engine leaves stopped is started by an operation, after a
pause that grows with each try.
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

# Seconds until a RESTARTING container is looked at again, at first and at most. The engine's own pause between two
# runs grows from 0.1 seconds to a minute.
_FIRST_CHECK_SECONDS = 1.0
_MAX_CHECK_SECONDS = 60.0
# A run that has just begun counts as RUNNING this many seconds later.
_RUNNING_AFTER_SECONDS = RESTART_SETTLE_TIME.total_seconds() + 0.05


class _StartNotNeeded(Exception):
    """The container is no longer one that has to be started."""


@dataclass(slots=True)
class _WatchedContainer:
    """A container that is looked at again when it is `due` (in the event loop's seconds).

    `failed`: its start failed, and it is started then; else it is RESTARTING. `last` is why the last try failed.
    """

    name: str
    uid: str
    failed: bool
    pause: float
    due: float
    due_time: datetime
    tries: int = 0
    last: str = ""
    busy: bool = False

    def schedule(self, pause: float) -> None:
        """Look again in `pause` seconds."""
        self.pause = pause
        self.due = asyncio.get_running_loop().time() + pause
        self.due_time = now() + timedelta(seconds=pause)


class Restarts:
    """Knows what has to be looked at again, and when."""

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
        """Seconds until a container whose start failed is started again, at first and at most."""
        self._store = store
        self._engine = engine
        self._draft_start = draft_start
        self._operations = operations
        self._first_delay = first_delay
        self._max_delay = max(first_delay, max_delay)
        self._watched: dict[str, _WatchedContainer] = {}
        # By uid: when a container ended that ran before the engine went away, and had ended when it was back.
        self._ended_with_engine: dict[str, datetime] = {}
        self._changed = asyncio.Event()

    def track(
        self,
        container: Container,
        shown: EngineContainer,
        report_drift: ReportDrift,
        *,
        ended_with_engine: bool = False,
    ) -> None:
        """Decide whether a container, whose status is up to date, is to be looked at again.

        `ended_with_engine`: it ran before the engine went away, and did not when the engine was back.
        """
        if ended_with_engine and shown.finish_time is not None:
            self._ended_with_engine[container.uid] = shown.finish_time
        watched = self._watched.get(container.uid)
        if cause := self._cause(container, shown):
            if watched is None or not watched.failed:
                watched = self._watch(container, failed=True, pause=self._first_delay)
            if not _tries_left(container.spec.restart_policy, watched.tries):
                watched.due = float("inf")
            report_drift(_start_failed_drift(watched, container, shown, cause))
            return
        if watched is not None and watched.failed:
            report_drift(_resolved_drift(container, shown))
            self.forget(container)
            watched = None
        if container.status.state is not ContainerState.RESTARTING:
            self.forget(container)
            return
        if watched is None:
            watched = self._watch(container, failed=False, pause=_FIRST_CHECK_SECONDS)
        if shown.alive:
            watched.schedule(min(watched.pause, _RUNNING_AFTER_SECONDS))
            self._changed.set()

    def forget(self, container: Container) -> None:
        """Stop watching it: its engine container is gone, or an operation stops it."""
        self._watched.pop(container.uid, None)
        self._ended_with_engine.pop(container.uid, None)

    def _cause(self, container: Container, shown: EngineContainer) -> str:
        """Why a container should run, by its restart policy, and is left stopped by the engine; empty if it is not.

        One that ran and ended, or that somebody stopped, has no error to show: the engine keeps one for failed starts
        only, until the next start. What StopContainer stopped is STOPPED.
        """
        policy = container.spec.restart_policy
        if (
            container.status.state is not ContainerState.EXITED
            or not container.status.holds_resources
            or policy.kind is RestartPolicyKind.NO
        ):
            return ""
        if shown.error:
            return shown.error
        forgotten = shown.finish_time is not None and shown.finish_time == self._ended_with_engine.get(container.uid)
        if forgotten and (policy.kind is not RestartPolicyKind.ON_FAILURE or container.status.exit_code):
            return "it ended when the engine was restarted, and the engine has not started it again"
        return ""

    def _watch(self, container: Container, *, failed: bool, pause: float) -> _WatchedContainer:
        watched = _WatchedContainer(container.name, container.uid, failed, pause, 0.0, now())
        watched.schedule(pause)
        self._watched[container.uid] = watched
        self._changed.set()
        return watched

    async def run(self, look: Callable[[str, str], Awaitable[None]]) -> None:
        """Look again, and start again, for ever. `look` brings the status of a container (name, uid) up to date."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                time = asyncio.get_running_loop().time()
                for watched in [one for one in self._watched.values() if one.due <= time and not one.busy]:
                    watched.busy = True
                    tasks.create_task(self._check(watched, look))
                await self._wait_until_due()

    async def _wait_until_due(self) -> None:
        """Wait until something is due, or what is watched has changed."""
        self._changed.clear()
        due = min((one.due for one in self._watched.values() if not one.busy), default=None)
        pause = None if due is None else max(0.0, due - asyncio.get_running_loop().time())
        try:
            async with asyncio.timeout(pause):
                await self._changed.wait()
        except TimeoutError:
            return

    async def _check(self, watched: _WatchedContainer, look: Callable[[str, str], Awaitable[None]]) -> None:
        try:
            if watched.failed:
                await self._start(watched)
            watched.schedule(min(watched.pause * 2, self._max_delay if watched.failed else _MAX_CHECK_SECONDS))
            await look(watched.name, watched.uid)
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
        """Start it by an operation, and wait for the end of that."""

        async def draft() -> OperationDraft:
            view = await self._store.container(watched.name)
            if view is None or view.container.uid != watched.uid or view.operation_id or view.container.engine is None:
                raise _StartNotNeeded
            shown = await self._engine.inspect(view.container.engine.engine_id)
            current = view.container.changed(status=observed_status(view.container, shown))
            if shown is None or not self._cause(current, shown):
                raise _StartNotNeeded
            made = await self._draft_start(Start(watched.name))
            if made.target_record.expect != view.version:
                raise _StartNotNeeded
            return made

        try:
            operation_id = await self._operations.begin(draft, None)
            log.info("start retried", container=watched.name, operation_id=operation_id, tries=watched.tries + 1)
            await self._operations.wait_until_ended((operation_id,))
            error = (await self._operations.get(operation_id)).operation.error
            watched.last = error.message if error is not None else ""
        except _StartNotNeeded:
            return
        except GpudockError as error:
            watched.last = error.message
        watched.tries += 1


def _tries_left(policy: RestartPolicy, tries: int) -> bool:
    limited = policy.kind is RestartPolicyKind.ON_FAILURE and policy.max_retry_count
    return not limited or tries < policy.max_retry_count


def _start_failed_drift(watched: _WatchedContainer, container: Container, shown: EngineContainer, cause: str) -> Drift:
    tried = f"tried {watched.tries} times" if watched.tries else "not tried yet"
    last = f"; the last try failed: {watched.last}" if watched.last and watched.last != cause else ""
    remedy, plan = DriftRemedy.PENDING, f"it is started again at the due time ({tried}{last}); StopContainer ends that"
    if not _tries_left(container.spec.restart_policy, watched.tries):
        remedy, plan = DriftRemedy.REPORTED, f"nothing more, as its restart policy says ({tried}{last}); start it"
    return Drift(
        kind=DriftKind.START_FAILED,
        remedy=remedy,
        container=container.name,
        uid=container.uid,
        engine_id=shown.id,
        engine_name=shown.name,
        expected=ContainerState.RUNNING.value,
        actual=container.status.state.value,
        message=f"{container.name} does not run: {cause}",
        plan=plan,
        due_time=watched.due_time if remedy is DriftRemedy.PENDING else None,
    )


def _resolved_drift(container: Container, shown: EngineContainer) -> Drift:
    state = container.status.state
    return Drift(
        kind=DriftKind.START_FAILED,
        remedy=DriftRemedy.REPAIRED,
        container=container.name,
        uid=container.uid,
        engine_id=shown.id,
        engine_name=shown.name,
        expected=ContainerState.RUNNING.value if state in ACTIVE_STATES else "",
        actual=state.value,
        message=f"{container.name} did not run, although its restart policy keeps it running",
        plan=f"it is {state.value} now",
    )
