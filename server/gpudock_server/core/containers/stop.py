"""StopContainer: stop the process, then give back what it held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from typing_extensions import override

from gpudock_server.core.containers.commands import Stop
from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.containers.history import History
from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.core.containers.saga import ContainerSaga
from gpudock_server.core.containers.snapshots import (
    MissedSnapshot,
    RevisionSnapshots,
    SnapshotArguments,
    snapshot_failed,
)
from gpudock_server.core.containers.status import observed_status
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Step
from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.errors import ContainerNotRunning, DiskFull, SnapshotFailed
from gpudock_server.model.claims import claim_keys
from gpudock_server.model.container import ACTIVE_STATES, Container, ContainerState, Placement
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.record import Record, now
from gpudock_server.model.snapshot import Snapshot, SnapshotKind
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.model.store_changes import PutContainer, PutSnapshot, StoreChange
from gpudock_server.ports import ContainerView, Engine


class StopArguments(Record):
    """What the saga needs to be built again. `reason` is why gpudock stops it on its own; empty where a user does."""

    engine_id: str
    spec: ContainerSpec
    lives: bool
    frozen: bool
    timeout: float | None
    keep_resources: bool
    placement: Placement
    reason: str = ""
    keep: SnapshotArguments = SnapshotArguments()


@dataclass(frozen=True, slots=True)
class StopContainer:
    """Checks that a container can be stopped, and plans how its files are kept."""

    containers: ContainerResource
    engine: Engine
    engine_containers: EngineContainers
    snapshots: RevisionSnapshots
    history: History
    claims: HostClaims

    async def draft(self, command: Stop) -> OperationDraft:
        """Anything that has been created can be stopped; what has stopped already may still hold something."""
        view = await self.containers.find_unlocked(command.name, command.etag)
        container = view.container
        state = container.status.state
        if container.engine is None or state in (ContainerState.CREATING, ContainerState.DELETING):
            needs = "there is nothing to stop; it can be deleted"
            raise ContainerNotRunning(container=command.name, state=state.value, needs=needs)
        arguments = StopArguments(
            engine_id=container.engine.engine_id,
            spec=container.spec,
            lives=state in ACTIVE_STATES,
            frozen=state is ContainerState.PAUSED,
            timeout=command.timeout,
            keep_resources=command.keep_resources,
            placement=container.status.placement,
            keep=await self._plan_snapshot(container) if state in ACTIVE_STATES else SnapshotArguments(),
        )
        return self._draft(view, arguments)

    def draft_enforced(self, view: ContainerView, shown: EngineContainer, reason: str) -> OperationDraft:
        """Stop what somebody else started, and leave `reason` in its status."""
        container = view.container
        arguments = StopArguments(
            engine_id=shown.id,
            spec=container.spec,
            lives=True,
            frozen=shown.state is EngineState.PAUSED,
            timeout=None,
            keep_resources=False,
            placement=container.status.placement,
            reason=reason,
        )
        return self._draft(view, arguments)

    async def _plan_snapshot(self, container: Container) -> SnapshotArguments:
        """How its files are kept, where the node keeps those of a stopped container. They never prevent its stop."""
        if not self.history.defaults.on_stop:
            return SnapshotArguments()
        try:
            known = await self.history.revisions(container.uid)
            kept = await self.snapshots.plan(container, None, known, commits=False)
        except (DiskFull, SnapshotFailed) as error:
            return SnapshotArguments(warnings=(f"its files are not kept: {error}",))
        # The engine's commit would hold up the stop for as long as it takes to write all of them.
        return kept if kept.kind is SnapshotKind.TREE else SnapshotArguments(warnings=kept.warnings)

    def _draft(self, view: ContainerView, arguments: StopArguments) -> OperationDraft:
        container = view.container
        return OperationDraft(
            kind=OperationKind.STOP,
            target=container.target,
            target_record=PutContainer(container, expect=view.version),
            arguments=arguments.model_dump(mode="json"),
            plan=OperationPlan(
                placement=container.status.placement if arguments.keep_resources else Placement(),
                released_gpu_uuids=() if arguments.keep_resources else container.status.placement.gpu_uuids,
                bytes_to_move=arguments.keep.bytes_to_move,
                bytes_available=arguments.keep.bytes_available,
                snapshot=arguments.keep.kind,
                warnings=arguments.keep.warnings,
            ),
            build=partial(StopSaga, self),
        )


class StopSaga(ContainerSaga):
    """Gather -> stop -> complete -> seal, or the stop alone.

    What keeps the files may fail, and the container is stopped all the same. There is no undo of a stop, since starting
    again what a user wanted stopped helps nobody.
    """

    cancellable = False

    def __init__(self, stopping: StopContainer, operation: Operation) -> None:
        """Builds the script from the operation's arguments."""
        super().__init__(stopping.containers)
        self._stopping = stopping
        self._arguments = StopArguments.model_validate(operation.arguments)
        self._snapshot_steps = stopping.snapshots.steps(self._arguments.keep)

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        keep = self._snapshot_steps
        return (
            *map(self._optional, keep.steps_while_running),
            Step("stop", self._stop),
            *map(self._optional, (*keep.steps_while_stopped, *keep.steps_at_end)),
        )

    def _optional(self, step: Step) -> Step:
        async def do(run: OperationRun) -> Record | None:
            if snapshot_failed(run.operation):
                return None
            try:
                return await step.do(run)
            except (DiskFull, SnapshotFailed) as error:
                run.add_message(f"its files are not kept: {error}")
                return MissedSnapshot(not_kept=str(error))

        return replace(step, do=do)

    async def _stop(self, _run: OperationRun) -> None:
        arguments = self._arguments
        await self._stopping.engine_containers.stop(
            arguments.engine_id, arguments.spec, arguments.timeout, frozen=arguments.frozen
        )

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        arguments = self._arguments
        container = view.container.changed(generation=view.container.generation + 1, update_time=now())
        seen = await self._stopping.engine.inspect(arguments.engine_id)
        # Where its last start failed it would else be started again, as its restart policy says.
        if arguments.lives or (seen is not None and not seen.running and seen.error):
            # What was said of it while it ran, such as that its restart policy starts it again, has ended with it.
            container = container.with_status(state=ContainerState.STOPPED, message="")
        container = container.changed(status=observed_status(container, seen))
        if arguments.reason and seen is not None and not seen.running:
            container = container.with_status(message=arguments.reason)
        kept = self._snapshot_changes(run.operation, container.uid)
        if arguments.keep_resources:
            return Outcome([PutContainer(container, expect=view.version), *kept], container)
        container = container.with_status(placement=Placement(), holds_resources=False)
        changes: list[StoreChange] = [
            PutContainer(container, expect=view.version),
            *kept,
            *self._stopping.claims.release(container.uid, claim_keys(arguments.placement)),
        ]
        return Outcome(changes, container)

    def _snapshot_changes(self, operation: Operation, uid: str) -> list[StoreChange]:
        """What is said of the current revision's files. They are those of this stop until the next one."""
        if snapshot_failed(operation):
            return []
        made = self._snapshot_steps.snapshot_of(operation)
        return [PutSnapshot(uid, self._arguments.keep.revision, made)] if isinstance(made, Snapshot) else []

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        container = await self._stopping.engine_containers.observe(view.container, self._arguments.engine_id)
        return [PutContainer(container.changed(update_time=now()), expect=view.version)]
