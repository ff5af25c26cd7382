"""Keeps a container's record and its engine container in agreement: status, name, limits, claims."""

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

# A refresh whose record changes this often is left to the next event or pass.
_TRIES = 5
_NANO = 1_000_000_000


# Drafts the stop of a container that was started outside gpudock; the last argument is the reason.
DraftStop: TypeAlias = Callable[[ContainerView, EngineContainer, str], OperationDraft]


class _RecordChanged(Exception):
    """The record has changed since the repair was decided."""


@dataclass(frozen=True, slots=True)
class _ConflictingClaim:
    """A GPU or port that an engine container uses and another container holds."""

    key: ClaimKey
    holder: Holder


@dataclass(frozen=True, slots=True)
class _Difference:
    """A setting of an engine container that differs from its spec; `subject` names the setting in a message."""

    kind: DriftKind
    subject: str
    expected: str
    actual: str


class ContainerReconciler:
    """The rules for containers with a record."""

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
        engine_container: EngineContainer | None = None,
        *,
        engine_was_away: bool = False,
    ) -> None:
        """Repair or report the drift of one container. A container with an operation is left to that operation.

        `engine_container` may be outdated: where it differs from the record, it is read again first.
        `engine_was_away`: events of the engine may have been missed since `view` was read. Raises EngineUnavailable,
        StoreUnavailable.
        """
        ran = view.container.status.state in ACTIVE_STATES
        for _ in range(_TRIES):
            container = view.container
            if view.operation_id or container.node != self._claims.node:
                return
            if engine_container is None or not self._matches(container, engine_container):
                engine_container = await self._inspect(container)
            try:
                await self._repair(view, engine_container, report_drift, ended_with_engine=engine_was_away and ran)
            except (StoreConflict, _RecordChanged):
                again = await self._store.container(container.name)
                if again is None or again.container.uid != container.uid:
                    return
                view, engine_container = again, None
            else:
                return

    async def _inspect(self, container: Container) -> EngineContainer | None:
        return await self._engine.inspect(container.engine.engine_id) if container.engine else None

    def _matches(self, container: Container, engine_container: EngineContainer) -> bool:
        return (
            observed_status(container, engine_container) == container.status
            and container.engine is not None
            and container.engine.engine_name == engine_container.name
            and _has_limits(container, engine_container, self._limits)
            and _has_policy(container, engine_container)
            and not _runs_without_claims(container, engine_container)
        )

    async def _repair(
        self,
        view: ContainerView,
        engine_container: EngineContainer | None,
        report_drift: ReportDrift,
        *,
        ended_with_engine: bool,
    ) -> None:
        container = view.container
        if container.engine is None:
            if container.status.state is not ContainerState.FAILED:
                await self._record_creation_lost(view, report_drift)
        elif engine_container is None:
            self._restarts.forget(container)
            if observed_status(container, None) != container.status:
                await self._record_container_gone(view, report_drift)
        elif _runs_without_claims(container, engine_container):
            self._restarts.forget(container)
            await self._claim_or_stop(view, engine_container, report_drift)
        else:
            if (status := observed_status(container, engine_container)) != container.status:
                await self._write(view, container.changed(status=status))
            ended_with_engine &= not engine_container.alive
            self._restarts.track(
                container.changed(status=status), engine_container, report_drift, ended_with_engine=ended_with_engine
            )
            await self._restore_name(view, container.engine, engine_container, report_drift)
            await self._restore_limits(view, engine_container, report_drift)
            await self._restore_restart_policy(view, engine_container, report_drift)

    async def _write(self, view: ContainerView, container: Container, *more: StoreChange) -> None:
        changes = [PutContainer(container.changed(update_time=now()), expect=view.version), *more]
        await self._store.apply(changes)

    # -- engine containers that are gone -----------------------------------------------------------------------------

    async def _record_container_gone(self, view: ContainerView, report_drift: ReportDrift) -> None:
        await self._write_failed(view, view.container.changed(status=observed_status(view.container, None)))
        snapshots = [
            f"revision {stored.revision.revision} (files of {stored.snapshot.create_time:%Y-%m-%d %H:%M:%S} UTC)"
            for stored in await self._history.revisions_with_files(view.container.uid)
            if stored.snapshot is not None
        ]
        recovery = f"roll back to or clone {' or '.join(snapshots)}" if snapshots else "there is no snapshot"
        report_drift(
            Drift(
                kind=DriftKind.CONTAINER_GONE,
                remedy=DriftRemedy.REPAIRED,
                container=view.container.name,
                uid=view.container.uid,
                engine_id=view.container.engine.engine_id if view.container.engine else "",
                message=f"the engine container of {view.container.name} was removed outside gpudock; files without a"
                " snapshot are lost",
                plan=f"marked FAILED, claims released; {recovery}; roll back with spec_only to start with the files of"
                " the image; or delete it",
            )
        )

    async def _record_creation_lost(self, view: ContainerView, report_drift: ReportDrift) -> None:
        message = "its create operation was lost; delete it and create it again"
        failed = view.container.with_status(state=ContainerState.FAILED, message=message)
        await self._write_failed(view, failed)
        report_drift(
            Drift(
                kind=DriftKind.CREATION_LOST,
                remedy=DriftRemedy.REPAIRED,
                container=view.container.name,
                uid=view.container.uid,
                message=f"{view.container.name} is CREATING and has no operation",
                plan="marked FAILED, claims released; delete it and create it again",
            )
        )

    async def _write_failed(self, view: ContainerView, failed: Container) -> None:
        released = self._claims.release(failed.uid, claim_keys(view.container.status.placement))
        await self._write(view, failed.with_status(placement=Placement(), holds_resources=False), *released)

    # -- containers that run without claims --------------------------------------------------------------------------

    async def _claim_or_stop(
        self, view: ContainerView, engine_container: EngineContainer, report_drift: ReportDrift
    ) -> None:
        """Claim all GPUs and ports of a container that was started outside gpudock, or stop it where one is held."""
        container = view.container
        placement = placement_of(container.spec, engine_container)
        claims = await self._store.claims(self._claims.host)
        changes: list[StoreChange] = []
        for key in claim_keys(placement):
            found = claims.holder(key)
            if found is not None and found.uid != container.uid:
                await self._stop(view, engine_container, _ConflictingClaim(key, found), report_drift)
                return
            changes += (self._claims.confirm if found else self._claims.claim)(container, [key])
        used = claim_keys(placement)
        released = [key for key in claim_keys(container.status.placement) if key not in used]
        changes += self._claims.release(container.uid, released)
        observed = container.changed(status=observed_status(container, engine_container))
        await self._write(view, observed.with_status(placement=placement, holds_resources=True), *changes)
        report_drift(
            self._started_outside_drift(
                container, engine_container, remedy=DriftRemedy.REPAIRED, plan="its GPUs and ports were free; claimed"
            )
        )

    async def _stop(
        self,
        view: ContainerView,
        engine_container: EngineContainer,
        conflict: _ConflictingClaim,
        report_drift: ReportDrift,
    ) -> None:
        container = view.container
        holder = "an unknown holder" if conflict.holder == UNREADABLE_HOLDER else conflict.holder.container
        reason = f"stopped by gpudock: started outside gpudock while {claim_text(conflict.key)} was held by {holder}"

        async def draft() -> OperationDraft:
            # An operation that began since may have started the container.
            current = await self._store.container(container.name)
            if current is None or current.version != view.version or current.operation_id:
                raise _RecordChanged
            return self._draft_stop(current, engine_container, reason)

        operation_id = await self._operations.begin(draft, None, during_recovery=True)
        report_drift(
            self._started_outside_drift(
                container,
                engine_container,
                remedy=DriftRemedy.PENDING,
                plan=f"operation {operation_id} is stopping it",
                conflict=conflict,
                operation_id=operation_id,
            )
        )

    @staticmethod
    def _started_outside_drift(
        container: Container,
        engine_container: EngineContainer,
        *,
        remedy: DriftRemedy,
        plan: str,
        conflict: _ConflictingClaim | None = None,
        operation_id: str = "",
    ) -> Drift:
        held = f"; {claim_text(conflict.key)} is held by {conflict.holder.container}" if conflict else ""
        return Drift(
            kind=DriftKind.CONTAINER_STARTED,
            remedy=remedy,
            container=container.name,
            uid=container.uid,
            engine_id=engine_container.id,
            engine_name=engine_container.name,
            claim=claim_text(conflict.key) if conflict else "",
            operation_id=operation_id,
            other=conflict.holder.container if conflict else "",
            expected=container.status.state.value,
            actual=engine_container.state.value,
            message=f"{container.name} was started outside gpudock without claims{held}",
            plan=plan,
        )

    # -- names and settings that were changed ------------------------------------------------------------------------

    async def _restore_name(
        self, view: ContainerView, engine: EngineBinding, engine_container: EngineContainer, report_drift: ReportDrift
    ) -> None:
        """Rename an engine container back: interrupted operations find engine containers by name."""
        if engine_container.name == engine.engine_name:
            return
        await self._require_unchanged(view)
        remedy, plan = DriftRemedy.REPAIRED, "renamed back"
        try:
            await self._engine.rename(engine_container.id, engine.engine_name)
        except EngineRejected as error:
            remedy, plan = DriftRemedy.RETRIED, f"rename rejected by the engine; will retry: {error.detail}"
        report_drift(
            Drift(
                kind=DriftKind.CONTAINER_RENAMED,
                remedy=remedy,
                container=view.container.name,
                uid=view.container.uid,
                engine_id=engine_container.id,
                engine_name=engine_container.name,
                expected=engine.engine_name,
                actual=engine_container.name,
                message=f"engine container {engine.engine_name} was renamed to {engine_container.name} outside gpudock",
                plan=plan,
            )
        )

    async def _restore_limits(
        self, view: ContainerView, engine_container: EngineContainer, report_drift: ReportDrift
    ) -> None:
        container, of_node = view.container, self._limits
        if _has_limits(container, engine_container, of_node):
            return
        host = await self._engine.info()
        if _has_limits(container, engine_container, of_node, (host.cpus, host.memory_bytes)):
            return
        spec = container.spec
        expected = _limits_text(spec.cpus, spec.memory_bytes, spec.pids_limit)
        # Where the spec leaves the number of processes to the node, any value is right.
        actual = _limits_text(
            engine_container.cpus, engine_container.memory_bytes, engine_container.pids_limit if spec.pids_limit else 0
        )
        report_drift(
            await self._restore_settings(
                view, engine_container, _Difference(DriftKind.LIMITS_CHANGED, "the limits", expected, actual)
            )
        )

    async def _restore_restart_policy(
        self, view: ContainerView, engine_container: EngineContainer, report_drift: ReportDrift
    ) -> None:
        """Restore the restart policy: an engine that restarts must start only containers that hold their GPUs."""
        container = view.container
        if _has_policy(container, engine_container):
            return
        expected, actual = str(container.spec.restart_policy.as_engine_policy), str(engine_container.restart_policy)
        difference = _Difference(DriftKind.RESTART_POLICY_CHANGED, "the restart policy", expected, actual)
        report_drift(await self._restore_settings(view, engine_container, difference))

    async def _restore_settings(
        self, view: ContainerView, engine_container: EngineContainer, difference: _Difference
    ) -> Drift:
        """Set the limits and the restart policy of the spec; returns the drift with the outcome."""
        await self._require_unchanged(view)
        container, spec = view.container, view.container.spec
        remedy, plan = DriftRemedy.REPAIRED, "set back"
        try:
            await self._engine.update(
                engine_container.id,
                cpus=spec.cpus,
                memory_bytes=spec.memory_bytes,
                pids_limit=spec.pids_limit,
                restart_policy=spec.restart_policy,
            )
        except EngineRejected as error:
            remedy, plan = DriftRemedy.RETRIED, f"rejected by the engine; will retry: {error.detail}"
        return Drift(
            kind=difference.kind,
            remedy=remedy,
            container=container.name,
            uid=container.uid,
            engine_id=engine_container.id,
            engine_name=engine_container.name,
            expected=difference.expected,
            actual=difference.actual,
            message=f"{difference.subject} of {container.name} changed outside gpudock",
            plan=plan,
        )

    async def _require_unchanged(self, view: ContainerView) -> None:
        """Raises _RecordChanged where an operation has begun, or the spec or the binding has changed.

        An operation that begins after this causes no harm: the repair causes an event, and so another refresh.
        """
        again = await self._store.container(view.container.name)
        if again is None or again.operation_id:
            raise _RecordChanged
        if (again.container.engine, again.container.spec) != (view.container.engine, view.container.spec):
            raise _RecordChanged


def _runs_without_claims(container: Container, engine_container: EngineContainer) -> bool:
    """Whether an engine container runs with GPUs or ports that its record does not hold."""
    if not engine_container.running:
        return False
    status = container.status
    used = claim_keys(placement_of(container.spec, engine_container))
    return not status.holds_resources or set(claim_keys(status.placement)) != set(used)


def _has_policy(container: Container, engine_container: EngineContainer) -> bool:
    return engine_container.restart_policy == container.spec.restart_policy.as_engine_policy


def _has_limits(
    container: Container, engine_container: EngineContainer, of_node: NodeLimits, host: tuple[int, int] = (0, 0)
) -> bool:
    """Whether the limits of an engine container are those of its spec.

    `host` has the CPUs and the memory bytes of the host. The engine cannot remove a limit, so a container without a
    limit may have these instead. Where the spec leaves a limit to the node, the node's setting at the creation counted.
    That setting is not on record, and may not have existed, so any value is then right.
    """
    spec = container.spec
    cpus = (round(spec.cpus * _NANO),) if spec.cpus else (0, host[0] * _NANO)
    memory = (spec.memory_bytes,) if spec.memory_bytes else (0, host[1])
    has_memory = engine_container.memory_bytes in memory or (not spec.memory_bytes and of_node.max_memory_bytes > 0)
    has_pids = spec.pids_limit in (0, engine_container.pids_limit)
    return round(engine_container.cpus * _NANO) in cpus and has_memory and has_pids


def _limits_text(cpus: float, memory_bytes: int, pids_limit: int) -> str:
    pids = f" pids_limit={pids_limit}" if pids_limit else ""
    return f"cpus={cpus:g} memory_bytes={memory_bytes}{pids}"
