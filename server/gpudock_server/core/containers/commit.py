"""CommitContainer: create an image from a container's current files.

The files of a running container are copied into a second engine container that never runs, the shadow, and the engine
commits the shadow. The container is frozen only while the last difference is copied, however large the image is.

    copy-files -> difference (frozen) -> commit-files -> image -> tag | clean

The engine commits the container itself if it is stopped or must not be frozen, if its layers are not accessible, or if
there is no space for a copy:

    freeze -> commit-files -> thaw -> image -> tag | clean

An image that the engine commits has the container's labels and names its GPUs, and no option of the engine prevents
that. It therefore first gets an internal name. The step `image` creates an image without these data, and `tag`, the
last step before the point of no return, gives it the requested name. Undoing `tag` restores the old owner of the name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from typing_extensions import override

from gpudock_server.core.containers.commands import Commit
from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.containers.images import CommitName, Images
from gpudock_server.core.containers.layer_images import raw_image_name
from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Saga, Step, StepResult
from gpudock_server.errors import ContainerNotRunning, DiskFull, EngineRejected, ImageExists, SnapshotFailed
from gpudock_server.model.container import ContainerState
from gpudock_server.model.engine import LABEL_NAME, LABEL_NODE, LABEL_OPERATION, LABEL_UID, EngineContainer, EngineImage
from gpudock_server.model.image import CommittedImage
from gpudock_server.model.names import engine_container_name
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.record import Record, now
from gpudock_server.model.store_changes import PutContainer, StoreChange
from gpudock_server.ports import CommitCost, ContainerView, Engine, LayerStore, LayerTooLarge, SnapshotStore
from gpudock_server.sizes import size_text

_NOT_FOUND = 404
# No warning below this difference between the bytes in the image and the bytes on the disk.
_MIN_SPARSE_BYTES = 16 << 20
# Estimates, measured on a machine with two slow cores: seconds of a freeze and thaw, seconds per file of the last copy,
# and the speed at which an engine writes an image.
_MIN_FREEZE_SECONDS = 0.1
_FREEZE_SECONDS_PER_ENTRY = 20e-6
_ENGINE_BYTES_PER_SECOND = 60e6


class CommitArguments(Record):
    """The arguments from which the saga is rebuilt.

    `base_id`: the image from which the engine container was created. `shadow`: commit a copy of the files in an engine
    container that never runs.
    """

    engine_id: str
    base_id: str
    reference: str
    author: str
    comment: str
    changes: tuple[str, ...]
    freeze: bool
    total_bytes: int
    revision: int
    owner: str = ""
    replace: bool = False
    shadow: bool = False
    allocated_bytes: int = 0


class FileHolder(Record):
    """The shadow: the engine container that never runs and has a copy of the files."""

    shadow_id: str


class CommittedFiles(Record):
    """The image that the engine's commit created."""

    image_id: str


class StrippedImage(Record):
    """The image without data about its container. `replaced`: the image that had its name before; empty if none."""

    image_id: str
    size_bytes: int
    replaced: str


_COPIED = StepResult("copy-files", FileHolder)
_COMMITTED = StepResult("commit-files", CommittedFiles)
_STRIPPED = StepResult("image", StrippedImage)


class _CopyPlan(Record):
    """Whether the files of a running container are copied to a shadow first; if not, a warning says why."""

    shadow: bool
    bytes_to_copy: int = 0
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CommitContainer:
    """Drafts the commit of a container's files to an image."""

    containers: ContainerResource
    engine: Engine
    engine_containers: EngineContainers
    images: Images
    layers: LayerStore
    snapshots: SnapshotStore

    async def draft(self, command: Commit) -> OperationDraft:
        """Check that the container has files and that the name can be used, and estimate the cost. Changes nothing."""
        view = await self.containers.find_unlocked(command.name, command.etag)
        container = view.container
        state = container.status.state
        engine_container = await self.engine.inspect(container.engine.engine_id) if container.engine else None
        if engine_container is None or state in (ContainerState.CREATING, ContainerState.DELETING):
            needs = "its current files are lost; clone one of its revisions and commit the clone"
            raise ContainerNotRunning(container=command.name, state=state.value, needs=needs)
        self.images.policy.require_allowed(command.reference.rpartition(":")[0], container.owner)
        await self.images.find_replaceable(CommitName(command.reference, container.owner, command.replace))
        cost = await self.layers.commit_cost(engine_container)
        freeze = command.pause and state is ContainerState.RUNNING
        copy = await self._copy_plan(engine_container, cost) if freeze else _CopyPlan(shadow=False)
        arguments = CommitArguments(
            engine_id=engine_container.id,
            base_id=engine_container.image_id,
            reference=command.reference,
            author=command.author,
            comment=command.comment,
            changes=command.changes,
            freeze=freeze,
            total_bytes=cost.apparent_bytes,
            revision=container.revision,
            owner=container.owner,
            replace=command.replace,
            shadow=copy.shadow,
            allocated_bytes=cost.allocated_bytes,
        )
        return OperationDraft(
            kind=OperationKind.COMMIT,
            target=container.target,
            target_record=PutContainer(container, expect=view.version),
            arguments=arguments.model_dump(mode="json"),
            plan=OperationPlan(
                placement=container.status.placement,
                kept_gpu_uuids=container.status.placement.gpu_uuids,
                bytes_to_move=cost.apparent_bytes + copy.bytes_to_copy,
                bytes_available=cost.bytes_available,
                warnings=(*cost.warnings, *_sparse_file_warnings(cost), *copy.warnings),
                apparent_bytes=cost.apparent_bytes,
                allocated_bytes=cost.allocated_bytes,
                expected_freeze_seconds=_freeze_seconds(cost, shadow=copy.shadow) if freeze else None,
            ),
            build=partial(CommitSaga, self),
        )

    async def _copy_plan(self, engine_container: EngineContainer, cost: CommitCost) -> _CopyPlan:
        method, reason = await self.snapshots.method(engine_container)
        if method is not None and cost.measured:
            try:
                plan = await self.snapshots.plan(engine_container, None)
            except (DiskFull, SnapshotFailed) as error:
                plan, reason = None, error.message
            if plan is not None and plan.too_large:
                reason = f"the layer is too large to copy: {plan.too_large}"
            elif plan is not None:
                needed = plan.bytes_to_copy
                if needed + cost.apparent_bytes <= cost.bytes_available:
                    return _CopyPlan(shadow=True, bytes_to_copy=needed)
                total = needed + cost.apparent_bytes
                reason = f"copy and image need {size_text(total)}, but only {size_text(cost.bytes_available)} are free"
        duration = "" if cost.measured else " (duration unknown)"
        reason = reason or "its files cannot be measured"
        warning = f"the container is frozen while the engine writes the image{duration}: {reason}"
        return _CopyPlan(shadow=False, warnings=(warning,))


def _sparse_file_warnings(cost: CommitCost) -> tuple[str, ...]:
    if cost.apparent_bytes - cost.allocated_bytes <= max(_MIN_SPARSE_BYTES, cost.allocated_bytes // 10):
        return ()
    sizes = f"{size_text(cost.allocated_bytes)} on the disk and {size_text(cost.apparent_bytes)} in the image"
    return (f"sparse files: {sizes}; the engine writes holes as zeros",)


def _freeze_seconds(cost: CommitCost, *, shadow: bool) -> float | None:
    if shadow:
        return _MIN_FREEZE_SECONDS + cost.entries * _FREEZE_SECONDS_PER_ENTRY
    return _MIN_FREEZE_SECONDS + cost.apparent_bytes / _ENGINE_BYTES_PER_SECOND if cost.measured else None


def _shadow_name(operation: Operation) -> str:
    return f"commit-{operation.target.uid[:8]}"


def committed_image_name(operation: Operation) -> str:
    """The internal name of the image until it gets the requested one."""
    return f"gpudock/commit:{operation.id}"


class CommitSaga(Saga[ContainerView]):
    """Commits the files and names the image; see the module's docstring."""

    def __init__(self, commit: CommitContainer, operation: Operation) -> None:
        """Read the arguments from the operation's record."""
        super().__init__(commit.containers)
        self._commit = commit
        self._arguments = CommitArguments.model_validate(operation.arguments)

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        if self._arguments.shadow:
            before: tuple[Step, ...] = (
                Step(_COPIED.step, self._copy, self._remove_shadow, interruptible=True),
                Step("difference", self._copy_difference, self._thaw),
            )
        else:
            before = (Step("freeze", self._freeze, self._thaw),) if self._arguments.freeze else ()
        thaw = (Step("thaw", self._thaw),) if self._arguments.freeze and not self._arguments.shadow else ()
        return (
            *before,
            Step(_COMMITTED.step, self._commit_files, self._remove_raw),
            *thaw,
            Step(_STRIPPED.step, self._image, self._remove_image),
            Step("tag", self._tag, self._restore_tag),
        )

    @property
    @override
    def cleanup_steps(self) -> tuple[Step, ...]:
        return (Step("clean", self._clean),)

    # -- the container's files ---------------------------------------------------------------------------------------

    async def _copy(self, run: OperationRun) -> FileHolder:
        """Copy most files while the container runs, so that it is frozen only for the rest."""
        operation = run.operation
        labels = {
            # The uid of no container: without its operation, the shadow is removed and never adopted.
            LABEL_UID: operation.id,
            LABEL_NAME: _shadow_name(operation),
            LABEL_NODE: operation.node,
            LABEL_OPERATION: operation.id,
        }
        name = engine_container_name(_shadow_name(operation), operation.id)
        shadow_id = await self._commit.engine.create_file_holder(self._arguments.engine_id, name, labels)
        await self._mirror(run, shadow_id, still=False)
        return FileHolder(shadow_id=shadow_id)

    async def _copy_difference(self, run: OperationRun) -> None:
        """Copy the changes while frozen. Freeze and thaw are one step, so no write of a record prolongs the freeze."""
        await self._freeze(run)
        try:
            await self._mirror(run, _COPIED.of(run.operation).shadow_id, still=True)
        finally:
            await self._thaw(run)

    async def _mirror(self, run: OperationRun, shadow_id: str, *, still: bool) -> None:
        source = await self._commit.engine_containers.inspect_for_copy(self._arguments.engine_id)
        shadow = await self._commit.engine_containers.inspect_for_copy(shadow_id)
        try:
            await self._commit.snapshots.mirror(source, shadow, run.operation.id, still=still, progress=run.progress)
        except LayerTooLarge as error:
            raise SnapshotFailed(detail=f"the layer is too large to copy: {error}") from error

    async def _remove_shadow(self, run: OperationRun) -> None:
        name = engine_container_name(_shadow_name(run.operation), run.operation.id)
        found = await self._commit.engine.inspect(name)
        if found is not None and found.labels.get(LABEL_OPERATION) == run.operation.id:
            await self._commit.engine_containers.remove(found.id, name)

    async def _freeze(self, _run: OperationRun) -> None:
        await self._commit.engine_containers.freeze(self._arguments.engine_id)

    async def _thaw(self, _run: OperationRun) -> None:
        # The container ran when the operation began, and no other operation can freeze it while it is locked.
        await self._commit.engine_containers.thaw_if_frozen(self._arguments.engine_id)

    async def _commit_files(self, run: OperationRun) -> CommittedFiles:
        arguments, engine, layers = self._arguments, self._commit.engine, self._commit.layers
        reference = raw_image_name(run.operation)
        if (image := await engine.image(reference)) is not None:
            return CommittedFiles(image_id=image.id)
        total = arguments.total_bytes
        holder = _COPIED.find(run.operation)
        committed_id = holder.shadow_id if holder else arguments.engine_id
        engine_container = await engine.inspect(committed_id)
        if engine_container is None:
            detail = f"engine container {committed_id[:12]} not found; it was removed outside gpudock"
            raise EngineRejected(call="commit a container", status=_NOT_FOUND, detail=detail)
        await layers.require_committable(engine_container)
        run.progress(0, total)
        async with layers.report_commit_progress(engine_container, total, run.progress):
            image_id = await engine.commit(
                committed_id,
                reference,
                {LABEL_OPERATION: run.operation.id},
                author=arguments.author,
                comment=arguments.comment,
                changes=arguments.changes,
                config_of=arguments.engine_id,
            )
        run.progress(total, total)
        return CommittedFiles(image_id=image_id)

    async def _remove_raw(self, run: OperationRun) -> None:
        await self._commit.engine.remove_image(raw_image_name(run.operation))

    # -- the image ---------------------------------------------------------------------------------------------------

    async def _image(self, run: OperationRun) -> StrippedImage:
        engine, reference = self._commit.engine, committed_image_name(run.operation)
        if await engine.image(reference) is None:
            committed = _COMMITTED.of(run.operation)
            await engine.strip_identity(committed.image_id, self._arguments.base_id, reference)
        image = await self._require_image(reference)
        replaced = await self._commit.images.find_replaceable(self._name)
        return StrippedImage(image_id=image.id, size_bytes=image.size_bytes, replaced=replaced)

    @property
    def _name(self) -> CommitName:
        return CommitName(self._arguments.reference, self._arguments.owner, self._arguments.replace)

    async def _require_image(self, reference: str) -> EngineImage:
        image = await self._commit.engine.image(reference)
        if image is None:
            detail = f"image {reference} was removed right after it was created"
            raise EngineRejected(call="show an image", status=_NOT_FOUND, detail=detail)
        return image

    async def _remove_image(self, run: OperationRun) -> None:
        await self._commit.engine.remove_image(committed_image_name(run.operation))

    async def _tag(self, run: OperationRun) -> None:
        engine, reference, stripped = self._commit.engine, self._arguments.reference, _STRIPPED.of(run.operation)
        async with self._commit.images.policy.names.commit_lock(reference):
            named = await engine.image(reference)
            # Undo restores the name only to the recorded image, so no other image may lose it.
            if (named.id if named else "") not in (stripped.replaced, stripped.image_id):
                raise ImageExists(image=reference, detail="the name was given to another image during the commit")
            await engine.tag(stripped.image_id, reference)

    async def _restore_tag(self, run: OperationRun) -> None:
        engine, reference = self._commit.engine, self._arguments.reference
        stripped = _STRIPPED.of(run.operation)
        named = await engine.image(reference)
        if named is None or named.id != stripped.image_id:
            return
        if stripped.replaced and await engine.image(stripped.replaced) is not None:
            await engine.tag(stripped.replaced, reference)
        else:
            await engine.remove_image(reference)

    async def _clean(self, run: OperationRun) -> None:
        await self._remove_shadow(run)
        await self._remove_raw(run)
        await self._remove_image(run)

    # -- the record --------------------------------------------------------------------------------------------------

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        stripped = _STRIPPED.of(run.operation)
        image = CommittedImage(
            image_id=stripped.image_id,
            name=self._arguments.reference,
            size_bytes=stripped.size_bytes,
            container=view.container.name,
            revision=self._arguments.revision,
            create_time=now(),
        )
        origin = self._commit.images.committed_origin(image.image_id, self._name)
        return Outcome([*await self._status_changes(view), origin], image)

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        return await self._status_changes(view)

    async def _status_changes(self, view: ContainerView) -> Sequence[StoreChange]:
        # The commit changes only the status: the container was frozen and thawed, and may have exited.
        container = await self._commit.engine_containers.observe(view.container, self._arguments.engine_id)
        return [PutContainer(container, expect=view.version)]
