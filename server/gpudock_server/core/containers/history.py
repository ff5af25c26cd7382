"""Revisions of a container: read them, delete one, and prune those that the revision policy does not keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

from typing_extensions import override

from gpudock_server.core.containers.commands import DeleteRevision
from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Saga, Step
from gpudock_server.errors import ContainerGone, RevisionIsCurrent, RevisionNotFound
from gpudock_server.model import store_changes
from gpudock_server.model.container import Container, ContainerRevision, ContainerState, RevisionCause
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.record import Record, now
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotKind
from gpudock_server.model.spec import ContainerSpec, SnapshotPolicy
from gpudock_server.model.store_changes import PutContainer, StoreChange
from gpudock_server.ports import ContainerView, Engine, RevisionBackupStore, RevisionView, SnapshotStore, Store

# The maximum number of existing revisions that an error lists.
_MAX_LISTED = 10


@dataclass(frozen=True, slots=True)
class HistoryDefaults:
    """How history is kept if neither the call nor the container sets it. `keep_seconds` 0: no limit.

    `on_stop`: StopContainer also keeps the files.
    """

    snapshots: SnapshotPolicy = SnapshotPolicy.ALWAYS
    keep_revisions: int = 20
    keep_seconds: float = 0.0
    on_stop: bool = False


class HistoryLimits(Record):
    """How many revisions are kept, and how long after their replacement; None: no limit."""

    keep_revisions: int
    keep_for: timedelta | None


@dataclass(frozen=True, slots=True)
class History:
    """The revisions of containers, with their snapshots on the disk and in the engine."""

    store: Store
    engine: Engine
    snapshots: SnapshotStore
    revision_backups: RevisionBackupStore
    defaults: HistoryDefaults

    def limits(self, spec: ContainerSpec) -> HistoryLimits:
        """The limits of a container's revision policy, else the node's."""
        policy, node = spec.revision_policy, self.defaults
        node_keep_for = timedelta(seconds=node.keep_seconds) if node.keep_seconds else None
        return HistoryLimits(
            keep_revisions=policy.keep_revisions or node.keep_revisions, keep_for=policy.keep_for or node_keep_for
        )

    async def revisions(self, uid: str) -> tuple[RevisionView, ...]:
        """A container's revisions, oldest first."""
        return await self.store.history(uid)

    async def find_revision(self, container: Container, number: int) -> RevisionView:
        """One revision. Raises RevisionNotFound."""
        found = await self.store.revision(container.uid, number)
        if found is None:
            history = await self.revisions(container.uid)
            newest = [str(view.revision.revision) for view in reversed(history)][:_MAX_LISTED]
            raise RevisionNotFound(container=container.name, revision=number, available=tuple(newest))
        return found

    async def prune(self, uid: str, spec: ContainerSpec) -> None:
        """Delete the revisions that the policy does not keep. The caller holds the container's lock. Idempotent."""
        for view in prunable_revisions(await self.revisions(uid), self.limits(spec)):
            await self.delete_files(uid, view.revision.revision, view.snapshot)
            # The record is deleted last, so that an interrupted deletion is found again.
            await self.store.apply([store_changes.DeleteRevision(uid, view.revision.revision)])

    async def delete_files(self, uid: str, revision: int, snapshot: Snapshot | None) -> None:
        """Delete the snapshot and the backup of a revision. Idempotent."""
        if snapshot is not None and snapshot.kind is SnapshotKind.IMAGE:
            await self.engine.remove_image(snapshot.reference)
        else:
            await self.snapshots.remove(SnapshotKey(uid=uid, revision=revision))
        # Before the store's record: reconcile restores revisions that are only in the revision_backups.
        await self.revision_backups.delete(SnapshotKey(uid=uid, revision=revision))

    async def is_gone(self, container: Container) -> bool:
        """Whether the container has no engine container any more."""
        return container.engine is None or await self.engine.inspect(container.engine.engine_id) is None

    async def refuse_if_gone(self, container: Container) -> None:
        """Raise ContainerGone, with the revisions that can be restored, if the engine container was removed."""
        if container.status.state is ContainerState.FAILED and await self.is_gone(container):
            views = await self.revisions_with_files(container.uid)
            numbers = tuple(str(view.revision.revision) for view in views)
            raise ContainerGone(container=container.name, revisions=numbers)

    async def revisions_with_files(self, uid: str) -> tuple[RevisionView, ...]:
        """The revisions that have a snapshot, oldest first."""
        return tuple(view for view in await self.revisions(uid) if view.snapshot is not None)

    async def delete_all(self, uid: str) -> None:
        """Delete all snapshots and revision backups of a container that is being deleted. Idempotent."""
        for view in await self.revisions(uid):
            if view.snapshot is not None and view.snapshot.kind is SnapshotKind.IMAGE:
                await self.engine.remove_image(view.snapshot.reference)
        await self.snapshots.remove_all(uid)
        await self.revision_backups.delete_all(uid)


def revision_of(container: Container, cause: RevisionCause, operation_id: str) -> ContainerRevision:
    """The revision that records a container's current state."""
    return ContainerRevision(
        container=container.name,
        uid=container.uid,
        revision=container.revision,
        spec=container.spec,
        cause=cause,
        placement=container.status.placement,
        image_id=container.engine.user_image_id if container.engine else "",
        create_time=now(),
        operation_id=operation_id,
    )


def prunable_revisions(history: Sequence[RevisionView], limits: HistoryLimits) -> tuple[RevisionView, ...]:
    """The revisions of a history (oldest first, the last one current) that the limits do not keep, oldest first."""
    moment = now()
    replace_times = [later.revision.create_time for later in history[1:]]
    return tuple(
        view
        for index, (view, replace_time) in enumerate(zip(history, replace_times, strict=False))
        if index < len(history) - limits.keep_revisions
        or (limits.keep_for is not None and moment - replace_time >= limits.keep_for)
    )


class DeleteRevisionArguments(Record):
    """The arguments from which the saga is rebuilt."""

    revision: int
    snapshot: Snapshot | None


@dataclass(frozen=True, slots=True)
class DeleteContainerRevision:
    """Drafts the deletion of a revision."""

    containers: ContainerResource
    history: History

    async def draft(self, command: DeleteRevision) -> OperationDraft:
        """Check that the revision exists and is not the current one. Raises RevisionNotFound, RevisionIsCurrent."""
        view = await self.containers.find_unlocked(command.name, command.etag)
        container = view.container
        if command.revision == container.revision:
            raise RevisionIsCurrent(container=command.name, revision=command.revision)
        found = await self.history.find_revision(container, command.revision)
        arguments = DeleteRevisionArguments(revision=command.revision, snapshot=found.snapshot)
        return OperationDraft(
            kind=OperationKind.DELETE_REVISION,
            target=container.target,
            target_record=PutContainer(container, expect=view.version),
            arguments=arguments.model_dump(mode="json"),
            plan=OperationPlan(),
            build=partial(DeleteRevisionSaga, self),
        )


class DeleteRevisionSaga(Saga[ContainerView]):
    """Delete the files, then the record. A failure keeps the record, so that the same call can finish the deletion."""

    cancellable = False

    def __init__(self, delete: DeleteContainerRevision, operation: Operation) -> None:
        """Read the arguments from the operation's record."""
        super().__init__(delete.containers)
        self._history = delete.history
        self._arguments = DeleteRevisionArguments.model_validate(operation.arguments)

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        return (Step("remove", self._remove),)

    async def _remove(self, run: OperationRun) -> None:
        arguments = self._arguments
        await self._history.delete_files(run.operation.target.uid, arguments.revision, arguments.snapshot)

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        uid = view.container.uid
        return Outcome([store_changes.DeleteRevision(uid, self._arguments.revision)], view.container)

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        return ()
