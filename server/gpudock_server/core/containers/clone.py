"""CloneContainer: create a container from a revision of another container (the source), with a copy of its files.

The clone is created from the image on which the files were written. To copy the current files of the source:

    create -> gather -> (freeze) complete (thaw) -> start -> verify | commit

The source is frozen only while the changes since `gather` are copied. If the writable layers are not accessible:

    (freeze) snapshot to an image (thaw) -> create -> start -> verify | commit

To copy the kept files of an older revision:

    create -> restore files -> start -> verify | commit        (a tree)
    name the image -> create -> start -> verify | commit       (an image)

The source is locked during the operation, so that its files and snapshots stay. An image made by a transfer or a
snapshot is deleted with the source, so the clone gives it a name of its own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from typing_extensions import override

from gpudock_server.core.containers.commands import Clone
from gpudock_server.core.containers.engine_containers import CREATED, CreatedEngineContainer
from gpudock_server.core.containers.history import History
from gpudock_server.core.containers.images import Images
from gpudock_server.core.containers.layer_images import LAYER_IMAGE, LayerImage, LayerImages, layer_image_name
from gpudock_server.core.containers.mounts import require_unchanged
from gpudock_server.core.containers.new_container import (
    NewContainerArguments,
    NewContainers,
    NewContainerSaga,
    anonymous_volumes,
)
from gpudock_server.core.containers.status import observed_status
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Step
from gpudock_server.errors import ContainerNotRunning, ImageNotFound, SnapshotFailed, SnapshotNotFound
from gpudock_server.model.container import Container, ContainerState, EngineBinding, RevisionCause
from gpudock_server.model.engine import EngineState
from gpudock_server.model.operation import LayerTransferMethod, Operation, OperationKind, OperationPlan
from gpudock_server.model.record import Record, now
from gpudock_server.model.resource import ResourceRef
from gpudock_server.model.snapshot import SnapshotKey, SnapshotKind
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.model.store_changes import PutContainer, StoreChange
from gpudock_server.ports import ContainerView, Engine, LayerStore, SnapshotStore


class CloneOrigin(StrEnum):
    """Where the files come from: the source now, by copy (MIRROR) or as an image (COMMIT), or a snapshot."""

    MIRROR = "MIRROR"
    COMMIT = "COMMIT"
    TREE = "TREE"
    IMAGE = "IMAGE"


_TRANSFER_METHODS = {
    CloneOrigin.MIRROR: LayerTransferMethod.COPY,
    CloneOrigin.COMMIT: LayerTransferMethod.COMMIT,
    CloneOrigin.TREE: LayerTransferMethod.COPY,
    CloneOrigin.IMAGE: LayerTransferMethod.NONE,
}


class CloneFiles(Record):
    """The files of the clone.

    `image_id`: the image on which the files were written. `base_image_id`: the image that the user of the source named.
    `source`: the engine container whose current files are copied, frozen for it if `freeze`; None to restore the
    snapshot of `revision`.
    """

    origin: CloneOrigin
    image_id: str
    base_image_id: str
    source: EngineBinding | None = None
    freeze: bool = False
    revision: int = 0
    bytes_to_move: int = 0
    bytes_available: int = 0
    warnings: tuple[str, ...] = ()


class CloneArguments(NewContainerArguments):
    """The arguments from which the saga is rebuilt."""

    source: ResourceRef
    files: CloneFiles


@dataclass(frozen=True, slots=True)
class CloneContainer:
    """Drafts a clone."""

    new: NewContainers
    engine: Engine
    images: Images
    layers: LayerStore
    layer_images: LayerImages
    snapshots: SnapshotStore
    history: History

    async def draft(self, command: Clone) -> OperationDraft:
        """Check the command, find the files, and allocate GPUs and ports. Changes nothing."""
        await self.new.containers.require_free_name(command.name)
        view = await self.new.containers.find_unlocked(command.source)
        source = view.container
        found, files = await self._spec_and_files(source, command.revision)
        owner = command.owner or source.owner
        if owner != source.owner and not await self.images.may_use(files.base_image_id, owner):
            # The same error as for a missing image, so that callers cannot probe the images of other owners.
            raise ImageNotFound(image=found.image)
        spec = command.change.apply(found)
        if files.source is not None and spec.user != found.user:
            await self.images.require_user_in_files(source, spec.user)
        volumes = await self.new.check(spec)
        container, allocation = await self.new.new_record(command.name, owner, spec)
        arguments = CloneArguments(
            source=source.target,
            files=files,
            spec=spec,
            placement=allocation.placement,
            start=not command.create_only,
            verify=not command.create_only and self.new.engine_containers.watches_starts,
            owner=container.owner,
        )
        return OperationDraft(
            kind=OperationKind.CLONE,
            target=container.target,
            target_record=PutContainer(container, expect=0),
            arguments=arguments.model_dump(mode="json"),
            plan=OperationPlan(
                placement=allocation.placement,
                claimed_gpu_uuids=allocation.placement.gpu_uuids,
                claimed_ports=allocation.placement.ports,
                bytes_to_move=files.bytes_to_move,
                bytes_available=files.bytes_available,
                carry_method=_TRANSFER_METHODS[files.origin],
                old_spec=found,
                new_spec=spec,
                warnings=(*files.warnings, *_anonymous_volume_warnings(source, spec)),
            ),
            claims=self.new.claims.claim(container, allocation.to_claim),
            locks=(source.target,),
            # The source must be unchanged: another operation may run and end before the lock is taken.
            conditions=(PutContainer(source, expect=view.version), *require_unchanged(volumes)),
            build=partial(CloneSaga, self),
        )

    async def _spec_and_files(self, source: Container, revision: int) -> tuple[ContainerSpec, CloneFiles]:
        """The spec and files of a revision; for 0 and the current revision, those of the source now."""
        gone = source.status.state is ContainerState.FAILED and await self.history.is_gone(source)
        revision = revision or source.revision
        if revision == source.revision and not gone:
            return source.spec, await self._current_files(source)
        found = await self.history.find_revision(source, revision)
        if found.snapshot is None:
            if revision == source.revision:
                await self.history.refuse_if_gone(source)
            raise SnapshotNotFound(container=source.name, revision=revision)
        if await self.engine.image(found.snapshot.image_id) is None:
            raise ImageNotFound(image=f"{found.revision.spec.image} ({found.snapshot.image_id})")
        as_tree = found.snapshot.kind is SnapshotKind.TREE
        return found.revision.spec, CloneFiles(
            origin=CloneOrigin.TREE if as_tree else CloneOrigin.IMAGE,
            image_id=found.snapshot.image_id,
            base_image_id=found.revision.image_id,
            revision=revision,
            bytes_to_move=found.snapshot.layer_bytes,
        )

    async def _current_files(self, source: Container) -> CloneFiles:
        engine = source.engine
        engine_container = await self.engine.inspect(engine.engine_id) if engine is not None else None
        if engine is None or engine_container is None:
            raise ContainerNotRunning(
                container=source.name,
                state=source.status.state.value,
                needs="its current files are lost; clone one of its revisions",
            )
        files = CloneFiles(
            origin=CloneOrigin.COMMIT,
            image_id=engine.image_id,
            base_image_id=engine.user_image_id,
            source=engine,
            freeze=engine_container.running and engine_container.state is not EngineState.PAUSED,
        )
        carry = await self.layers.plan(engine_container)
        if carry.method is LayerTransferMethod.COMMIT:
            return files.model_copy(
                update={
                    "bytes_to_move": carry.bytes_to_move,
                    "bytes_available": carry.bytes_available,
                    "warnings": carry.warnings,
                }
            )
        method, reason = await self.snapshots.method(engine_container)
        if method is None:
            warning = f"files are copied by an engine commit, which loses metadata: {reason}"
            return files.model_copy(update={"warnings": (warning,)})
        cost = await self.snapshots.plan(engine_container, None)
        if cost.too_large:
            raise SnapshotFailed(detail=f"the layer of the source is too large to copy: {cost.too_large}")
        return files.model_copy(
            update={
                "origin": CloneOrigin.MIRROR,
                "bytes_to_move": cost.bytes_to_copy,
                "bytes_available": cost.bytes_available,
            }
        )


def _anonymous_volume_warnings(source: Container, spec: ContainerSpec) -> tuple[str, ...]:
    volumes = source.engine.anonymous_volumes if source.engine else {}
    targets = anonymous_volumes(spec, volumes)
    return tuple(f"the anonymous volume of {source.name} at {target} is not copied" for target in sorted(targets))


class CloneSaga(NewContainerSaga):
    """Creates the clone and copies its files; see the module's docstring."""

    def __init__(self, clone: CloneContainer, operation: Operation) -> None:
        """Read the arguments from the operation's record."""
        self._arguments = CloneArguments.model_validate(operation.arguments)
        super().__init__(clone.new, self._arguments)
        self._clone = clone
        self._files = self._arguments.files

    # -- the steps ---------------------------------------------------------------------------------------------------

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        create = Step(CREATED.step, self._create, self._remove)
        if self._files.origin is CloneOrigin.COMMIT:
            return (Step(LAYER_IMAGE.step, self._snapshot, self._thaw_and_remove_images), create, *self._start_steps)
        own_name = (Step("name", self._tag_image, self._untag_image),) if self._needs_own_tag else ()
        return (*own_name, create, *self._file_steps, *self._start_steps)

    @property
    def _file_steps(self) -> tuple[Step, ...]:
        match self._files.origin:
            case CloneOrigin.MIRROR:
                return (Step("gather", self._gather, interruptible=True), Step("complete", self._complete, self._thaw))
            case CloneOrigin.TREE:
                return (Step("restore", self._restore, interruptible=True),)
            case CloneOrigin.COMMIT | CloneOrigin.IMAGE:
                return ()

    @property
    def _needs_own_tag(self) -> bool:
        """Whether the image belongs to the source and is deleted with it."""
        return self._files.image_id != self._files.base_image_id

    # -- the image ---------------------------------------------------------------------------------------------------

    async def _snapshot(self, run: OperationRun) -> LayerImage:
        engine, layer_images = self._source_binding(), self._clone.layer_images
        if await self._clone.engine.image(layer_image_name(run.operation)) is None:
            async with self._frozen_source(run):
                await layer_images.commit_raw(run.operation, engine.engine_id)
        return await layer_images.make(run, engine)

    async def _thaw_and_remove_images(self, run: OperationRun) -> None:
        await self._thaw(run)
        await self._clone.layer_images.remove(run.operation)

    async def _tag_image(self, run: OperationRun) -> None:
        await self._clone.engine.tag(self._files.image_id, layer_image_name(run.operation))

    async def _untag_image(self, run: OperationRun) -> None:
        await self._clone.engine.remove_image(layer_image_name(run.operation))

    # -- the clone ---------------------------------------------------------------------------------------------------

    async def _create(self, run: OperationRun) -> CreatedEngineContainer:
        image = LAYER_IMAGE.find(run.operation)
        return await self._create_from(run, image.image_id if image else self._files.image_id)

    # -- the files ---------------------------------------------------------------------------------------------------

    async def _restore(self, run: OperationRun) -> None:
        key = SnapshotKey(uid=self._arguments.source.uid, revision=self._files.revision)
        await self._clone.snapshots.restore(
            key, await self._new.engine_containers.inspect_for_copy(_clone_engine_id(run)), run.progress
        )

    async def _gather(self, run: OperationRun) -> None:
        await self._mirror(run, still=False)

    async def _complete(self, run: OperationRun) -> None:
        async with self._frozen_source(run):
            await self._mirror(run, still=True)

    async def _mirror(self, run: OperationRun, *, still: bool) -> None:
        source, clone = (
            await self._new.engine_containers.inspect_for_copy(self._source_binding().engine_id),
            await self._new.engine_containers.inspect_for_copy(_clone_engine_id(run)),
        )
        await self._clone.snapshots.mirror(source, clone, run.operation.id, still=still, progress=run.progress)

    @asynccontextmanager
    async def _frozen_source(self, run: OperationRun) -> AsyncIterator[None]:
        """Freeze the source if needed. Freeze and thaw are in one step, so no write of a record prolongs the freeze."""
        if self._files.freeze:
            await self._new.engine_containers.freeze(
                (await self._new.engine_containers.inspect_for_copy(self._source_binding().engine_id)).id
            )
        try:
            yield
        finally:
            await self._thaw(run)

    async def _thaw(self, _run: OperationRun) -> None:
        if self._files.freeze:
            await self._new.engine_containers.thaw_if_frozen(self._source_binding().engine_id)

    def _source_binding(self) -> EngineBinding:
        if self._files.source is None:
            raise SnapshotFailed(detail="the source has no engine container")
        return self._files.source

    # -- the commit --------------------------------------------------------------------------------------------------

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        binding = await self._binding(run)
        engine_container = await self._clone.engine.inspect(binding.engine_id)
        outcome = await self._outcome(run, view, binding, engine_container, RevisionCause.CLONED)
        return Outcome([*outcome.changes, *await self._source_changes()], outcome.result)

    async def _binding(self, run: OperationRun) -> EngineBinding:
        arguments, created = self._arguments, CREATED.of(run.operation)
        engine_container = await self._new.engine_containers.inspect_for_copy(created.engine_id)
        owns_image = self._needs_own_tag or self._files.origin is CloneOrigin.COMMIT
        return EngineBinding(
            engine_id=engine_container.id,
            engine_name=created.engine_name,
            image_id=created.image_id,
            base_image_id=self._files.base_image_id,
            placement=arguments.placement,
            fixed_digest=arguments.spec.fixed_digest,
            anonymous_volumes=anonymous_volumes(arguments.spec, engine_container.volumes),
            layer_images=(layer_image_name(run.operation),) if owns_image else (),
            base_depth=self._base_depth(run.operation),
        )

    def _base_depth(self, operation: Operation) -> int:
        image = LAYER_IMAGE.find(operation)
        if image is not None and image.base_depth is not None:
            return image.base_depth
        return self._files.source.base_depth if self._files.source else 0

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        return [*await super().failure_changes(run, view), *await self._source_changes()]

    async def _source_changes(self) -> list[StoreChange]:
        """The current status of the source, which reconcile did not update while the source was locked."""
        view = await self._new.containers.view_of(self._arguments.source)
        if view is None or view.container.engine is None:
            return []
        source = view.container
        engine_container = await self._clone.engine.inspect(view.container.engine.engine_id)
        status = observed_status(source, engine_container) if engine_container is not None else source.status
        if status == source.status:
            return []
        return [PutContainer(source.changed(status=status, update_time=now()), expect=view.version)]


def _clone_engine_id(run: OperationRun) -> str:
    return CREATED.of(run.operation).engine_id
