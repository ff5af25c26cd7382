"""Keeping the files of the revision that a change ends.

The bulk is copied while the container runs, and what changed meanwhile once it is still; so a stop, or a freeze where
nothing else has to stop it, is as short for a large layer as for a small one:

    gather -> (stop or freeze) -> complete -> … -> seal

Where the files are out of reach the engine commits them to an image, which is the same one that a carry by commit
makes the successor from.
"""

from __future__ import annotations

from dataclasses import dataclass

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
from gpudock_server.ports import Engine, LayerTooLarge, RevisionView, SnapshotStore


class MissedSnapshot(Record):
    """Why a step took no snapshot: the layer is too large (`skipped`), or it failed and nothing waits for it."""

    skipped: str = ""
    not_kept: str = ""


_GATHERED = StepResult("gather", MissedSnapshot)
_COMPLETED = StepResult("complete", MissedSnapshot)
_SEALED = StepResult("seal", Snapshot)


class SnapshotArguments(Record):
    """What the steps need. `previous` is the revision whose snapshot it shares with; 0 is none.

    `skipped` says why no snapshot is made of a layer that is too large. `required`: the call itself asks for a
    snapshot, and fails without one.
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
    """Keeps the files of revisions. `policy` counts where neither a call nor a container has one."""

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
        """How the current revision's files are to be kept. `commits`: an image of them is made in any case.

        Raises DiskFull where there is no room for what the policy asks for. Raises SnapshotFailed where the layer is
        too large for a snapshot and `requested`, which is the call's own, is ALWAYS; under any other policy there is a
        warning.
        """
        engine = container.engine
        seen = await self.engine.inspect(engine.engine_id) if engine is not None else None
        policy = requested or container.spec.revision_policy.snapshots or self.policy
        nothing = SnapshotArguments(warnings=(_no_snapshot_warning(container, f"the policy is {policy.value}"),))
        if engine is None or seen is None:
            return SnapshotArguments(warnings=(_no_snapshot_warning(container, "its engine container is gone"),))
        if policy is SnapshotPolicy.NEVER:
            return nothing
        arguments = SnapshotArguments(engine_id=seen.id, revision=container.revision, image_id=engine.image_id)
        if commits:
            return arguments.model_copy(update={"kind": SnapshotKind.IMAGE})
        method, why_not = await self.store.method(seen)
        if policy is SnapshotPolicy.CHEAP and method is not SnapshotMethod.REFLINK:
            return nothing
        if method is None:
            warning = f"its files are kept as an image, which does not keep everything: {why_not}"
            return arguments.model_copy(update={"kind": SnapshotKind.IMAGE, "warnings": (warning,)})
        arguments = arguments.model_copy(
            update={"previous": _latest_tree(history), "required": requested is SnapshotPolicy.ALWAYS}
        )
        return await self._plan_tree(container, seen, arguments)

    async def _plan_tree(
        self, container: Container, seen: EngineContainer, arguments: SnapshotArguments
    ) -> SnapshotArguments:
        cost = await self.store.plan(seen, _key(container.uid, arguments.previous))
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
        """The steps of keeping one revision's files."""
        return SnapshotSteps(self, arguments)


def _no_snapshot_warning(container: Container, why: str) -> str:
    return f"the files of revision {container.revision} are not kept ({why}); a rollback to it brings its spec alone"


def _too_large_message(reason: str) -> str:
    return f"the layer is too large for a snapshot: {reason}; with another snapshot policy than ALWAYS none is made"


def _latest_tree(history: tuple[RevisionView, ...]) -> int:
    kept = [one.revision.revision for one in history if one.snapshot and one.snapshot.kind is SnapshotKind.TREE]
    return max(kept, default=0)


def _key(uid: str, revision: int) -> SnapshotKey | None:
    return SnapshotKey(uid=uid, revision=revision) if revision else None


class SnapshotSteps:
    """The steps of keeping one revision's files; none where they are not kept, or not as a tree."""

    def __init__(self, snapshots: RevisionSnapshots, arguments: SnapshotArguments) -> None:
        self._snapshots = snapshots
        self._arguments = arguments

    @property
    def _as_tree(self) -> bool:
        return self._arguments.kind is SnapshotKind.TREE

    @property
    def as_image(self) -> bool:
        """Whether the engine is to commit the files."""
        return self._arguments.kind is SnapshotKind.IMAGE

    @property
    def steps_while_running(self) -> tuple[Step, ...]:
        """Before the container is made still."""
        return (Step(_GATHERED.step, self._gather, self._discard, interruptible=True),) if self._as_tree else ()

    @property
    def steps_while_stopped(self) -> tuple[Step, ...]:
        """Between its stop, or its freeze, and the moment that its files may change again."""
        return (Step(_COMPLETED.step, self._complete),) if self._as_tree else ()

    @property
    def steps_at_end(self) -> tuple[Step, ...]:
        """When nothing is waiting for it any more."""
        return (Step(_SEALED.step, self._seal, self._discard),) if self._as_tree else ()

    def with_freeze(self, *steps: Step) -> tuple[Step, ...]:
        """`steps` with every process of the container frozen for their time."""
        if not steps:
            return ()
        return (Step("freeze", self._freeze, self._thaw), *steps, Step("thaw", self._thaw, self._freeze))

    async def _gather(self, run: OperationRun) -> MissedSnapshot | None:
        key, previous = self._keys(run)
        try:
            await self._snapshots.store.gather(await self._seen(), key, run.operation.id, previous, run.progress)
        except LayerTooLarge as error:
            return self._skip(run, error)
        return None

    async def _complete(self, run: OperationRun) -> MissedSnapshot | None:
        if _skipped(run.operation):
            return None
        key, previous = self._keys(run)
        try:
            await self._snapshots.store.complete(await self._seen(), key, run.operation.id, previous, run.progress)
        except LayerTooLarge as error:
            return self._skip(run, error)
        return None

    def _skip(self, run: OperationRun, error: LayerTooLarge) -> MissedSnapshot:
        """Go on without a snapshot: the container wrote too much since the plan was made."""
        if self._arguments.required:
            raise SnapshotFailed(detail=_too_large_message(str(error))) from error
        run.add_message(f"no snapshot is made, the layer is too large for it: {error}")
        return MissedSnapshot(skipped=str(error))

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

    async def _seen(self) -> EngineContainer:
        seen = await self._snapshots.engine.inspect(self._arguments.engine_id)
        if seen is None:
            raise SnapshotFailed(detail=f"engine container {self._arguments.engine_id[:12]} is gone")
        return seen

    def snapshot_of(self, operation: Operation) -> Snapshot | SnapshotSkipped | None:
        """The snapshot that the steps made, or why they made none although the policy asked for one."""
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
    """Why the steps went on without a snapshot; empty when they did not."""
    missed = (result.find(operation) for result in (_COMPLETED, _GATHERED))
    return next((found.skipped for found in missed if found is not None), "")


def snapshot_failed(operation: Operation) -> bool:
    """Whether a step failed to keep the files, and the operation went on without them."""
    return any(stage.facts.get("not_kept") for stage in operation.stages)
