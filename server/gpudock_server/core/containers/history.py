"""Revisions of a container: showing them, deleting one, and pruning those that its policy no longer keeps."""

from collections.abc import Sequence
from datetime import timedelta

from typing_extensions import override

from gpudock_server.core.containers.commands import DeleteRevision
from gpudock_server.core.containers.saga import ContainerSaga
from gpudock_server.core.containers.world import World
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Step
from gpudock_server.errors import ContainerGone, RevisionIsCurrent, RevisionNotFound
from gpudock_server.model import store_changes
from gpudock_server.model.container import Container, ContainerState
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.record import Record, now
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotKind
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.model.store_changes import PutContainer, StoreChange
from gpudock_server.ports import ContainerView, RevisionView

# How many numbers an error lists of what there is instead.
_MAX_LISTED = 10


class HistoryLimits(Record):
    """How many revisions are kept, and for how long after they were replaced; None is for ever."""

    keep_revisions: int
    keep_for: timedelta | None


def history_limits(world: World, spec: ContainerSpec) -> HistoryLimits:
    """A container's own word, else the node's."""
    policy, node = spec.revision_policy, world.history
    ages = timedelta(seconds=node.keep_seconds) if node.keep_seconds else None
    return HistoryLimits(keep_revisions=policy.keep_revisions or node.keep_revisions, keep_for=policy.keep_for or ages)


def prunable_revisions(history: Sequence[RevisionView], limits: HistoryLimits) -> tuple[RevisionView, ...]:
    """What is to be pruned of a history (oldest first, the last one current), oldest first."""
    moment = now()
    replaced = [later.revision.create_time for later in history[1:]]
    return tuple(
        one
        for index, (one, since) in enumerate(zip(history, replaced, strict=False))
        if index < len(history) - limits.keep_revisions
        or (limits.keep_for is not None and moment - since >= limits.keep_for)
    )


async def find_revision(world: World, container: Container, number: int) -> RevisionView:
    """One revision. Raises RevisionNotFound."""
    found = await world.store.revision(container.uid, number)
    if found is None:
        history = await world.store.history(container.uid)
        newest = [str(one.revision.revision) for one in reversed(history)][:_MAX_LISTED]
        raise RevisionNotFound(container=container.name, revision=number, available=tuple(newest))
    return found


async def prune(world: World, uid: str, spec: ContainerSpec) -> None:
    """Let go of what the policy no longer keeps. The caller has the container locked. May be repeated."""
    for view in prunable_revisions(await world.store.history(uid), history_limits(world, spec)):
        await delete_revision_files(world, uid, view.revision.revision, view.snapshot)
        # The record goes last, so that what is left of an interrupted removal is found again.
        await world.store.apply([store_changes.DeleteRevision(uid, view.revision.revision)])


async def delete_revision_files(world: World, uid: str, revision: int, snapshot: Snapshot | None) -> None:
    """Remove what was kept of a revision on the disk or in the engine. May be repeated."""
    if snapshot is not None and snapshot.kind is SnapshotKind.IMAGE:
        await world.engine.remove_image(snapshot.reference)
    else:
        await world.snapshots.remove(SnapshotKey(uid=uid, revision=revision))
    # Before the store's own record: what is only on the disk is taken for what the store has lost.
    await world.ledger.delete(SnapshotKey(uid=uid, revision=revision))


class DeleteRevisionArguments(Record):
    """What the saga needs to be built again."""

    revision: int
    snapshot: Snapshot | None


async def draft(world: World, command: DeleteRevision) -> OperationDraft:
    """Any but the current one can go."""
    view = await world.lookup(command.name, command.etag)
    container = view.container
    if command.revision == container.revision:
        raise RevisionIsCurrent(container=command.name, revision=command.revision)
    found = await find_revision(world, container, command.revision)
    arguments = DeleteRevisionArguments(revision=command.revision, snapshot=found.snapshot)
    return OperationDraft(
        kind=OperationKind.DELETE_REVISION,
        target=container.target,
        target_record=PutContainer(container, expect=view.version),
        arguments=arguments.model_dump(mode="json"),
        plan=OperationPlan(),
        build=lambda operation: DeleteRevisionSaga(world, operation),
    )


class DeleteRevisionSaga(ContainerSaga):
    """Files first, the record last; what fails leaves the record, so that the same call finishes the work."""

    cancellable = False

    def __init__(self, world: World, operation: Operation) -> None:
        """Builds the script from the operation's arguments."""
        super().__init__(world)
        self._arguments = DeleteRevisionArguments.model_validate(operation.arguments)

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        return (Step("remove", self._remove),)

    async def _remove(self, run: OperationRun) -> None:
        arguments = self._arguments
        await delete_revision_files(self._world, run.operation.target.uid, arguments.revision, arguments.snapshot)

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        uid = view.container.uid
        return Outcome([store_changes.DeleteRevision(uid, self._arguments.revision)], view.container)

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        return ()


async def is_gone(world: World, container: Container) -> bool:
    """Whether the engine has nothing of a container any more."""
    return container.engine is None or await world.engine.inspect(container.engine.engine_id) is None


async def refuse_if_gone(world: World, container: Container) -> None:
    """Raises ContainerGone, with the revisions that it can be brought back to, where its engine container is gone."""
    if container.status.state is ContainerState.FAILED and await is_gone(world, container):
        kept = await revisions_with_files(world, container.uid)
        numbers = tuple(str(one.revision.revision) for one in kept)
        raise ContainerGone(container=container.name, revisions=numbers)


async def revisions_with_files(world: World, uid: str) -> tuple[RevisionView, ...]:
    """The revisions whose files are kept, oldest first."""
    return tuple(one for one in await world.store.history(uid) if one.snapshot is not None)
