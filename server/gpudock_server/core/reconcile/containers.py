"""One container against its engine container: its status, its name, its limits, and whether it may run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import structlog

from gpudock_server.core.containers.history import History
from gpudock_server.core.containers.status import observed_status
from gpudock_server.core.operations.engine import Operations
from gpudock_server.core.operations.saga import OperationDraft
from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.core.reconcile.drift import ReportDrift
from gpudock_server.core.reconcile.records import claim_text, placement_of
from gpudock_server.core.reconcile.restarts import Restarts
from gpudock_server.errors import EngineRejected
from gpudock_server.model.claims import UNREADABLE_HOLDER, ClaimKey, Holder, claim_keys
from gpudock_server.model.container import ACTIVE_STATES, Container, ContainerState, EngineBinding, Placement
from gpudock_server.model.drift import Drift, DriftKind, DriftRemedy
from gpudock_server.model.engine import EngineContainer, NodeLimits
from gpudock_server.model.record import now
from gpudock_server.model.store_changes import PutContainer, StoreChange
from gpudock_server.ports import ContainerView, Engine, Store, StoreConflict

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# A record that loses its race this often is left to the next event or pass.
_TRIES = 5
_NANO = 1_000_000_000


# Drafts the stop of a container whose engine container somebody else started, and why it is stopped.
DraftStop: TypeAlias = Callable[[ContainerView, EngineContainer, str], OperationDraft]


class _RecordChanged(Exception):
    """The record changed since it was decided upon."""


@dataclass(frozen=True, slots=True)
class _ConflictingClaim:
    """A card or port that a container was given, and that another holds."""

    key: ClaimKey
    holder: Holder


@dataclass(frozen=True, slots=True)
class _Difference:
    """What of a container the engine has otherwise than its spec; `what` names it in a sentence."""

    kind: DriftKind
    what: str
    expected: str
    actual: str


class ContainerReconciler:
    """The rules for containers that a record binds."""

    def __init__(
        self,
        operations: Operations,
        restarts: Restarts,
        *,
        store: Store,
        engine: Engine,
        history: History,
        claims: HostClaims,
        limits: NodeLimits,
        draft_stop: DraftStop,
    ) -> None:
        self._store = store
        self._engine = engine
        self._history = history
        self._claims = claims
        self._limits = limits
        self._draft_stop = draft_stop
        self._operations = operations
        self._restarts = restarts

    async def refresh(
        self,
        view: ContainerView,
        report_drift: ReportDrift,
        shown: EngineContainer | None = None,
        *,
        engine_was_away: bool = False,
    ) -> None:
        """Put right one container. One with an operation at work is that operation's.

        `shown` is what the engine showed a while ago; what it leads to is never done without another look.
        `engine_was_away`: events of the engine may have been missed since `view` was up to date. Raises
        EngineUnavailable, StoreUnavailable.
        """
        ran = view.container.status.state in ACTIVE_STATES
        for _ in range(_TRIES):
            container = view.container
            if view.operation_id or container.node != self._claims.node:
                return
            if shown is None or not self._matches(container, shown):
                shown = await self._inspect(container)
            try:
                await self._repair(view, shown, report_drift, ended_with_engine=engine_was_away and ran)
            except (StoreConflict, _RecordChanged):
                again = await self._store.container(container.name)
                if again is None or again.container.uid != container.uid:
                    return
                view, shown = again, None
            else:
                return

    async def _inspect(self, container: Container) -> EngineContainer | None:
        return await self._engine.inspect(container.engine.engine_id) if container.engine else None

    def _matches(self, container: Container, shown: EngineContainer) -> bool:
        return (
            observed_status(container, shown) == container.status
            and container.engine is not None
            and container.engine.engine_name == shown.name
            and _has_limits(container, shown, self._limits)
            and _has_policy(container, shown)
            and not _runs_without_claims(container, shown)
        )

    async def _repair(
        self, view: ContainerView, shown: EngineContainer | None, report_drift: ReportDrift, *, ended_with_engine: bool
    ) -> None:
        container = view.container
        if container.engine is None:
            if container.status.state is not ContainerState.FAILED:
                await self._record_creation_lost(view, report_drift)
        elif shown is None:
            self._restarts.forget(container)
            if observed_status(container, None) != container.status:
                await self._record_container_gone(view, report_drift)
        elif _runs_without_claims(container, shown):
            self._restarts.forget(container)
            await self._claim_or_stop(view, shown, report_drift)
        else:
            if (status := observed_status(container, shown)) != container.status:
                await self._write(view, container.changed(status=status))
            ended_with_engine &= not shown.alive
            self._restarts.track(
                container.changed(status=status), shown, report_drift, ended_with_engine=ended_with_engine
            )
            await self._restore_name(view, container.engine, shown, report_drift)
            await self._restore_limits(view, shown, report_drift)
            await self._restore_restart_policy(view, shown, report_drift)

    async def _write(self, view: ContainerView, container: Container, *more: StoreChange) -> None:
        changes = [PutContainer(container.changed(update_time=now()), expect=view.version), *more]
        await self._store.apply(changes)

    # -- what is gone ------------------------------------------------------------------------------------------------

    async def _record_container_gone(self, view: ContainerView, report_drift: ReportDrift) -> None:
        await self._write_failed(view, view.container.changed(status=observed_status(view.container, None)))
        kept = [
            f"revision {one.revision.revision} (files of {one.snapshot.create_time:%Y-%m-%d %H:%M:%S} UTC)"
            for one in await self._history.revisions_with_files(view.container.uid)
            if one.snapshot is not None
        ]
        back = f"roll it back to, or clone, {' or '.join(kept)}; " if kept else "none of its files were kept; "
        report_drift(
            Drift(
                kind=DriftKind.CONTAINER_GONE,
                remedy=DriftRemedy.REPAIRED,
                container=view.container.name,
                uid=view.container.uid,
                engine_id=view.container.engine.engine_id if view.container.engine else "",
                message=f"the engine container of {view.container.name} was removed outside gpudock, and with it the"
                " files that were not kept",
                plan=f"it is FAILED, and what it held was released; {back}roll it back with spec_only to begin with the"
                " files of its image; or delete it",
            )
        )

    async def _record_creation_lost(self, view: ContainerView, report_drift: ReportDrift) -> None:
        message = "the operation that was creating it is lost; delete it and create it again"
        failed = view.container.with_status(state=ContainerState.FAILED, message=message)
        await self._write_failed(view, failed)
        report_drift(
            Drift(
                kind=DriftKind.CREATION_LOST,
                remedy=DriftRemedy.REPAIRED,
                container=view.container.name,
                uid=view.container.uid,
                message=f"{view.container.name} was being created, and no operation is at it any more",
                plan="it is FAILED, and what it held was released; delete it and create it again",
            )
        )

    async def _write_failed(self, view: ContainerView, failed: Container) -> None:
        released = self._claims.release(failed.uid, claim_keys(view.container.status.placement))
        await self._write(view, failed.with_status(placement=Placement(), holds_resources=False), *released)

    # -- what runs and should not ------------------------------------------------------------------------------------

    async def _claim_or_stop(self, view: ContainerView, shown: EngineContainer, report_drift: ReportDrift) -> None:
        """It was started outside gpudock: with all that it was given, if that is free, or not at all."""
        container = view.container
        given = placement_of(container.spec, shown)
        claims = await self._store.claims(self._claims.host)
        changes: list[StoreChange] = []
        for key in claim_keys(given):
            found = claims.holder(key)
            if found is not None and found.uid != container.uid:
                await self._stop(view, shown, _ConflictingClaim(key, found), report_drift)
                return
            changes += (self._claims.confirm if found else self._claims.claim)(container, [key])
        given_keys = claim_keys(given)
        released = [key for key in claim_keys(container.status.placement) if key not in given_keys]
        changes += self._claims.release(container.uid, released)
        taken = container.changed(status=observed_status(container, shown))
        await self._write(view, taken.with_status(placement=given, holds_resources=True), *changes)
        report_drift(
            self._started_outside_drift(
                container, shown, remedy=DriftRemedy.REPAIRED, plan="what it was given was free, and is claimed for it"
            )
        )

    async def _stop(
        self, view: ContainerView, shown: EngineContainer, taken: _ConflictingClaim, report_drift: ReportDrift
    ) -> None:
        container = view.container
        by = "somebody unknown" if taken.holder == UNREADABLE_HOLDER else taken.holder.container
        reason = f"it was started outside gpudock while {claim_text(taken.key)} was held by {by}, and was stopped again"

        async def draft() -> OperationDraft:
            # Whatever began since may have started it for good reason.
            current = await self._store.container(container.name)
            if current is None or current.version != view.version or current.operation_id:
                raise _RecordChanged
            return self._draft_stop(current, shown, reason)

        operation_id = await self._operations.begin(draft, None, during_recovery=True)
        report_drift(
            self._started_outside_drift(
                container,
                shown,
                remedy=DriftRemedy.PENDING,
                plan=f"it is being stopped by operation {operation_id}",
                taken=taken,
                operation_id=operation_id,
            )
        )

    @staticmethod
    def _started_outside_drift(
        container: Container,
        shown: EngineContainer,
        *,
        remedy: DriftRemedy,
        plan: str,
        taken: _ConflictingClaim | None = None,
        operation_id: str = "",
    ) -> Drift:
        held = f"; {claim_text(taken.key)} is held by {taken.holder.container}" if taken else ""
        return Drift(
            kind=DriftKind.CONTAINER_STARTED,
            remedy=remedy,
            container=container.name,
            uid=container.uid,
            engine_id=shown.id,
            engine_name=shown.name,
            claim=claim_text(taken.key) if taken else "",
            operation_id=operation_id,
            other=taken.holder.container if taken else "",
            expected=container.status.state.value,
            actual=shown.state.value,
            message=f"{container.name} was started outside gpudock after it had released what it held{held}",
            plan=plan,
        )

    # -- what was changed --------------------------------------------------------------------------------------------

    async def _restore_name(
        self, view: ContainerView, engine: EngineBinding, shown: EngineContainer, report_drift: ReportDrift
    ) -> None:
        """An interrupted operation finds its things by their names."""
        if shown.name == engine.engine_name:
            return
        await self._require_unchanged(view)
        remedy, plan = DriftRemedy.REPAIRED, "it was renamed back"
        try:
            await self._engine.rename(shown.id, engine.engine_name)
        except EngineRejected as error:
            remedy, plan = DriftRemedy.RETRIED, f"it is renamed back as soon as the engine lets it be: {error.detail}"
        report_drift(
            Drift(
                kind=DriftKind.CONTAINER_RENAMED,
                remedy=remedy,
                container=view.container.name,
                uid=view.container.uid,
                engine_id=shown.id,
                engine_name=shown.name,
                expected=engine.engine_name,
                actual=shown.name,
                message=f"the engine container {engine.engine_name} was renamed to {shown.name} outside gpudock",
                plan=plan,
            )
        )

    async def _restore_limits(self, view: ContainerView, shown: EngineContainer, report_drift: ReportDrift) -> None:
        container, of_node = view.container, self._limits
        if _has_limits(container, shown, of_node):
            return
        host = await self._engine.info()
        if _has_limits(container, shown, of_node, (host.cpus, host.memory_bytes)):
            return
        spec = container.spec
        expected = _limits_text(spec.cpus, spec.memory_bytes, spec.pids_limit)
        # Where the spec leaves the number of processes to the node, any is as it should be.
        actual = _limits_text(shown.cpus, shown.memory_bytes, shown.pids_limit if spec.pids_limit else 0)
        report_drift(
            await self._restore_settings(
                view, shown, _Difference(DriftKind.LIMITS_CHANGED, "the limits", expected, actual)
            )
        )

    async def _restore_restart_policy(
        self, view: ContainerView, shown: EngineContainer, report_drift: ReportDrift
    ) -> None:
        """What an engine that restarts brings back must be what holds its cards."""
        container = view.container
        if _has_policy(container, shown):
            return
        expected, actual = str(container.spec.restart_policy.as_engine_policy), str(shown.restart_policy)
        found = _Difference(DriftKind.RESTART_POLICY_CHANGED, "the restart policy", expected, actual)
        report_drift(await self._restore_settings(view, shown, found))

    async def _restore_settings(self, view: ContainerView, shown: EngineContainer, found: _Difference) -> Drift:
        """Give it the limits and the restart policy of its spec; the finding, with what came of it."""
        await self._require_unchanged(view)
        container, spec = view.container, view.container.spec
        remedy, plan = DriftRemedy.REPAIRED, "it was set back"
        try:
            await self._engine.update(
                shown.id,
                cpus=spec.cpus,
                memory_bytes=spec.memory_bytes,
                pids_limit=spec.pids_limit,
                restart_policy=spec.restart_policy,
            )
        except EngineRejected as error:
            remedy, plan = DriftRemedy.RETRIED, f"it is set back as soon as the engine lets it be: {error.detail}"
        return Drift(
            kind=found.kind,
            remedy=remedy,
            container=container.name,
            uid=container.uid,
            engine_id=shown.id,
            engine_name=shown.name,
            expected=found.expected,
            actual=found.actual,
            message=f"{found.what} of {container.name} changed outside gpudock",
            plan=plan,
        )

    async def _require_unchanged(self, view: ContainerView) -> None:
        """Raises _RecordChanged where an operation began since; what begins now is met by the event of what is done."""
        again = await self._store.container(view.container.name)
        if again is None or again.operation_id:
            raise _RecordChanged
        if (again.container.engine, again.container.spec) != (view.container.engine, view.container.spec):
            raise _RecordChanged


def _runs_without_claims(container: Container, shown: EngineContainer) -> bool:
    """Whether it runs, and what it was given is not recorded as held by it."""
    if not shown.running:
        return False
    status = container.status
    given = claim_keys(placement_of(container.spec, shown))
    return not status.holds_resources or set(claim_keys(status.placement)) != set(given)


def _has_policy(container: Container, shown: EngineContainer) -> bool:
    return shown.restart_policy == container.spec.restart_policy.as_engine_policy


def _has_limits(
    container: Container, shown: EngineContainer, of_node: NodeLimits, host: tuple[int, int] = (0, 0)
) -> bool:
    """Whether its limits are those of its spec. What a container cannot be freed of is all that the host has.

    Where the spec leaves a limit to the node, the node's setting at the time of creation counts. That setting is not on
    record and may have changed since, or did not exist: any value is then as it should be.
    """
    spec = container.spec
    cpus = (round(spec.cpus * _NANO),) if spec.cpus else (0, host[0] * _NANO)
    memory = (spec.memory_bytes,) if spec.memory_bytes else (0, host[1])
    has_memory = shown.memory_bytes in memory or (not spec.memory_bytes and of_node.max_memory_bytes > 0)
    has_pids = spec.pids_limit in (0, shown.pids_limit)
    return round(shown.cpus * _NANO) in cpus and has_memory and has_pids


def _limits_text(cpus: float, memory_bytes: int, pids_limit: int) -> str:
    pids = f" pids_limit={pids_limit}" if pids_limit else ""
    return f"cpus={cpus:g} memory_bytes={memory_bytes}{pids}"
