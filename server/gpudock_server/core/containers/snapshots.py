"""Snapshots: keep the files of a revision before a change replaces it.

Most files are copied while the container runs, and only the changes since then while it is stopped or frozen. The stop
or freeze is therefore as short for a large layer as for a small one:

    gather -> (stop or freeze) -> complete -> … -> seal

If the files are not accessible, the engine commits them to an image. A transfer by commit creates the successor from
the same image.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.containers.layer_images import LAYER_IMAGE
from gpudock_server.core.operations.saga import OperationRun, Step, StepResult
from gpudock_server.errors import SnapshotFailed
from gpudock_server.model.container import Container
from gpudock_server.model.engine import EngineContainer
from gpudock_server.model.operation import Operation
from gpudock_server.model.record import Record, now
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotKind, SnapshotMethod, SnapshotSkipped
from gpudock_server.model.spec import SnapshotPolicy
from gpudock_server.ports import Engine, LayerTooLarge, Progress, RevisionView, SnapshotStore


class MissedSnapshot(Record):
    """Why a step made no snapshot: the layer is too large (`skipped`), or it failed, which is allowed (`not_kept`)."""

    skipped: str = ""
    not_kept: str = ""


# SnapshotStore.gather or SnapshotStore.complete.
_Copy: TypeAlias = Callable[[EngineContainer, SnapshotKey, str, SnapshotKey | None, Progress], Awaitable[None]]

_GATHERED = StepResult("gather", MissedSnapshot)
_COMPLETED = StepResult("complete", MissedSnapshot)
_SEALED = StepResult("seal", Snapshot)


class SnapshotArguments(Record):
    """The arguments of the steps. `previous`: the revision with whose snapshot unchanged files are shared; 0: none.

    `skipped`: why no snapshot is made, if the layer is too large. `required`: the call requests a snapshot, and fails
    without one.
    """

    kind: SnapshotKind | None = None
    engine_id: str = ""
    revision: int = 0
    image_id: str = ""
    previous: int = 0
    bytes_to_move: int = 0
    bytes_available: int = 0
    skipped: str = ""
    required: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RevisionSnapshots:
    """Plans snapshots of revisions. `policy`: the default if neither the call nor the container has one."""

    store: SnapshotStore
    engine: Engine
    engine_containers: EngineContainers
    policy: SnapshotPolicy

    async def plan(
        self,
        container: Container,
        requested: SnapshotPolicy | None,
        history: tuple[RevisionView, ...],
        *,
        commits: bool,
    ) -> SnapshotArguments:
        """Plan how to keep the files of the current revision. `commits`: the change creates an image of them anyway.

        Raises DiskFull if there is no space for the snapshot. Raises SnapshotFailed if the layer is too large and
        `requested`, the policy of the call, is ALWAYS; otherwise the plan has a warning.
        """
        engine = container.engine
        engine_container = await self.engine.inspect(engine.engine_id) if engine is not None else None
        policy = requested or container.spec.revision_policy.snapshots or self.policy
        nothing = SnapshotArguments(warnings=(_no_snapshot_warning(container, f"the policy is {policy.value}"),))
        if engine is None or engine_container is None:
            warning = _no_snapshot_warning(container, "its engine container was removed")
            return SnapshotArguments(warnings=(warning,))
        if policy is SnapshotPolicy.NEVER:
            return nothing
        arguments = SnapshotArguments(
            engine_id=engine_container.id, revision=container.revision, image_id=engine.image_id
        )
        if commits:
            return arguments.model_copy(update={"kind": SnapshotKind.IMAGE})
        method, reason = await self.store.method(engine_container)
        if policy is SnapshotPolicy.CHEAP and method is not SnapshotMethod.REFLINK:
            return nothing
        if method is None:
            warning = f"the snapshot is made by an engine commit, which loses metadata: {reason}"
            return arguments.model_copy(update={"kind": SnapshotKind.IMAGE, "warnings": (warning,)})
        arguments = arguments.model_copy(
            update={"previous": _latest_tree(history), "required": requested is SnapshotPolicy.ALWAYS}
        )
        return await self._plan_tree(container, engine_container, arguments)

    async def _plan_tree(
        self, container: Container, engine_container: EngineContainer, arguments: SnapshotArguments
    ) -> SnapshotArguments:
        cost = await self.store.plan(engine_container, _key(container.uid, arguments.previous))
        if cost.too_large and arguments.required:
            raise SnapshotFailed(detail=_too_large_message(cost.too_large))
        if cost.too_large:
            warning = _no_snapshot_warning(container, f"the layer is too large for a snapshot: {cost.too_large}")
            return arguments.model_copy(update={"skipped": cost.too_large, "warnings": (warning,)})
        return arguments.model_copy(
            update={
                "kind": SnapshotKind.TREE,
                "bytes_to_move": cost.bytes_to_copy,
                "bytes_available": cost.bytes_available,
            }
        )

    def steps(self, arguments: SnapshotArguments) -> SnapshotSteps:
        """The steps that make a planned snapshot."""
        return SnapshotSteps(self, arguments)


def _no_snapshot_warning(container: Container, reason: str) -> str:
    return f"no snapshot of revision {container.revision} ({reason}); rolling back to it restores its spec only"


def _too_large_message(reason: str) -> str:
    return (
        f"the layer is too large for a snapshot: {reason};"
        " use another snapshot policy than ALWAYS to continue without a snapshot"
    )


def _latest_tree(history: tuple[RevisionView, ...]) -> int:
    trees = [view.revision.revision for view in history if view.snapshot and view.snapshot.kind is SnapshotKind.TREE]
    return max(trees, default=0)


def _key(uid: str, revision: int) -> SnapshotKey | None:
    return SnapshotKey(uid=uid, revision=revision) if revision else None


class SnapshotSteps:
    """The steps that make a snapshot as a tree; no steps if no such snapshot is planned."""

    def __init__(self, snapshots: RevisionSnapshots, arguments: SnapshotArguments) -> None:
        self._snapshots = snapshots
        self._arguments = arguments

    @property
    def _as_tree(self) -> bool:
        return self._arguments.kind is SnapshotKind.TREE

    @property
    def as_image(self) -> bool:
        """Whether the snapshot is an image that the engine commits."""
        return self._arguments.kind is SnapshotKind.IMAGE

    @property
    def steps_while_running(self) -> tuple[Step, ...]:
        """The steps before the container is stopped or frozen."""
        gather = partial(self._copy, self._snapshots.store.gather)
        return (Step(_GATHERED.step, gather, self._discard, interruptible=True),) if self._as_tree else ()

    @property
    def steps_while_stopped(self) -> tuple[Step, ...]:
        """The steps while the container is stopped or frozen."""
        return (Step(_COMPLETED.step, partial(self._copy, self._snapshots.store.complete)),) if self._as_tree else ()

    @property
    def steps_at_end(self) -> tuple[Step, ...]:
        """The steps after which the container no longer waits for the snapshot."""
        return (Step(_SEALED.step, self._seal, self._discard),) if self._as_tree else ()

    def with_freeze(self, *steps: Step) -> tuple[Step, ...]:
        """`steps` between a freeze and a thaw of the container's processes."""
        if not steps:
            return ()
        return (Step("freeze", self._freeze, self._thaw), *steps, Step("thaw", self._thaw, self._freeze))

    async def _copy(self, copy: _Copy, run: OperationRun) -> MissedSnapshot | None:
        """Copy files, or continue without a snapshot if the container wrote too much since the plan was made."""
        if _skipped(run.operation):
            return None
        key, previous = self._keys(run)
        engine_container = await self._snapshots.engine_containers.inspect_for_copy(self._arguments.engine_id)
        try:
            await copy(engine_container, key, run.operation.id, previous, run.progress)
        except LayerTooLarge as error:
            if self._arguments.required:
                raise SnapshotFailed(detail=_too_large_message(str(error))) from error
            run.add_message(f"snapshot skipped: the layer is too large: {error}")
            return MissedSnapshot(skipped=str(error))
        return None

    async def _seal(self, run: OperationRun) -> Snapshot | None:
        if _skipped(run.operation):
            return None
        key, _ = self._keys(run)
        return await self._snapshots.store.seal(key, run.operation.id, self._arguments.image_id)

    async def _discard(self, run: OperationRun) -> None:
        key, _ = self._keys(run)
        await self._snapshots.store.discard(key, run.operation.id)

    async def _freeze(self, _run: OperationRun) -> None:
        await self._snapshots.engine_containers.freeze(self._arguments.engine_id)

    async def _thaw(self, _run: OperationRun) -> None:
        await self._snapshots.engine_containers.thaw_if_frozen(self._arguments.engine_id)

    def _keys(self, run: OperationRun) -> tuple[SnapshotKey, SnapshotKey | None]:
        uid = run.operation.target.uid
        return SnapshotKey(uid=uid, revision=self._arguments.revision), _key(uid, self._arguments.previous)

    def snapshot_of(self, operation: Operation) -> Snapshot | SnapshotSkipped | None:
        """The snapshot that the steps made, or why they made none although the policy requests one."""
        if reason := self._arguments.skipped or _skipped(operation):
            return SnapshotSkipped(reason=f"the layer was too large for a snapshot: {reason}")
        if self._as_tree:
            return _SEALED.of(operation)
        if self.as_image:
            image = LAYER_IMAGE.of(operation)
            return Snapshot(
                kind=SnapshotKind.IMAGE, image_id=image.image_id, reference=image.reference, create_time=now()
            )
        return None


def _skipped(operation: Operation) -> str:
    """Why the steps continued without a snapshot; empty if they did not."""
    results = (result.find(operation) for result in (_COMPLETED, _GATHERED))
    return next((missed.skipped for missed in results if missed is not None), "")


def snapshot_failed(operation: Operation) -> bool:
    """Whether a step failed to make the snapshot, and the operation continued without it."""
    return any(stage.facts.get("not_kept") for stage in operation.stages)
