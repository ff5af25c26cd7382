"""StopContainer: stop the process, then release its GPUs and ports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from typing_extensions import override

from gpudock_server.core.containers.commands import Stop
from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.containers.history import History
from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.core.containers.snapshots import (
    MissedSnapshot,
    RevisionSnapshots,
    SnapshotArguments,
    snapshot_failed,
)
from gpudock_server.core.containers.status import observed_status
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Saga, Step
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
    """The arguments from which the saga is rebuilt.

    `lives`: the container runs or is paused. `frozen`: it is paused. `reason`: why gpudock stops the container on its
    own; empty for a user's request.
    """

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
    """Drafts a stop, and plans the snapshot of the files."""

    containers: ContainerResource
    engine: Engine
    engine_containers: EngineContainers
    snapshots: RevisionSnapshots
    history: History
    claims: HostClaims

    async def draft(self, command: Stop) -> OperationDraft:
        """Check that the container has been created. A stopped one can be stopped again to release what it holds."""
        view = await self.containers.find_unlocked(command.name, command.etag)
        container = view.container
        state = container.status.state
        if container.engine is None or state in (ContainerState.CREATING, ContainerState.DELETING):
            needs = "it has no process to stop; it can be deleted"
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

    def draft_enforced(self, view: ContainerView, engine_container: EngineContainer, reason: str) -> OperationDraft:
        """Draft the stop of a container that was started outside gpudock, with `reason` as its status message."""
        container = view.container
        arguments = StopArguments(
            engine_id=engine_container.id,
            spec=container.spec,
            lives=True,
            frozen=engine_container.state is EngineState.PAUSED,
            timeout=None,
            keep_resources=False,
            placement=container.status.placement,
            reason=reason,
        )
        return self._draft(view, arguments)

    async def _plan_snapshot(self, container: Container) -> SnapshotArguments:
        """Plan the snapshot, if the node makes one at a stop. An error becomes a warning and never fails the stop."""
        if not self.history.defaults.on_stop:
            return SnapshotArguments()
        try:
            revisions = await self.history.revisions(container.uid)
            snapshot = await self.snapshots.plan(container, None, revisions, commits=False)
        except (DiskFull, SnapshotFailed) as error:
            return SnapshotArguments(warnings=(f"no snapshot: {error}",))
        # An engine commit would delay the stop until all files are written.
        return snapshot if snapshot.kind is SnapshotKind.TREE else SnapshotArguments(warnings=snapshot.warnings)

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


class StopSaga(Saga[ContainerView]):
    """gather -> stop -> complete -> seal | the record, or only the stop.

    The container is stopped even if the snapshot fails. A stop has no undo, because the user wants the container to be
    stopped.
    """

    cancellable = False

    def __init__(self, stop: StopContainer, operation: Operation) -> None:
        """Read the arguments from the operation's record."""
        super().__init__(stop.containers)
        self._use_case = stop
        self._arguments = StopArguments.model_validate(operation.arguments)
        self._snapshot_steps = stop.snapshots.steps(self._arguments.keep)

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        snapshot = self._snapshot_steps
        return (
            *map(self._optional, snapshot.steps_while_running),
            Step("stop", self._stop),
            *map(self._optional, (*snapshot.steps_while_stopped, *snapshot.steps_at_end)),
        )

    def _optional(self, step: Step) -> Step:
        async def do(run: OperationRun) -> Record | None:
            if snapshot_failed(run.operation):
                return None
            try:
                return await step.do(run)
            except (DiskFull, SnapshotFailed) as error:
                run.add_message(f"no snapshot: {error}")
                return MissedSnapshot(not_kept=str(error))

        return replace(step, do=do)

    async def _stop(self, _run: OperationRun) -> None:
        arguments = self._arguments
        await self._use_case.engine_containers.stop(
            arguments.engine_id, arguments.spec, arguments.timeout, frozen=arguments.frozen
        )

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        arguments = self._arguments
        container = view.container.changed(generation=view.container.generation + 1, update_time=now())
        engine_container = await self._use_case.engine.inspect(arguments.engine_id)
        # Also after a failed start: otherwise gpudock would start the container again by its restart policy.
        if arguments.lives or (
            engine_container is not None and not engine_container.running and engine_container.error
        ):
            # A message about the running process, such as about its restarts, is no longer true.
            container = container.with_status(state=ContainerState.STOPPED, message="")
        container = container.changed(status=observed_status(container, engine_container))
        if arguments.reason and engine_container is not None and not engine_container.running:
            container = container.with_status(message=arguments.reason)
        snapshot_changes = self._snapshot_changes(run.operation, container.uid)
        if arguments.keep_resources:
            return Outcome([PutContainer(container, expect=view.version), *snapshot_changes], container)
        container = container.with_status(placement=Placement(), holds_resources=False)
        changes: list[StoreChange] = [
            PutContainer(container, expect=view.version),
            *snapshot_changes,
            *self._use_case.claims.release(container.uid, claim_keys(arguments.placement)),
        ]
        return Outcome(changes, container)

    def _snapshot_changes(self, operation: Operation, uid: str) -> list[StoreChange]:
        """Record the snapshot of the current revision, which is replaced at the next stop."""
        if snapshot_failed(operation):
            return []
        snapshot = self._snapshot_steps.snapshot_of(operation)
        return [PutSnapshot(uid, self._arguments.keep.revision, snapshot)] if isinstance(snapshot, Snapshot) else []

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        container = await self._use_case.engine_containers.observe(view.container, self._arguments.engine_id)
        return [PutContainer(container.changed(update_time=now()), expect=view.version)]
