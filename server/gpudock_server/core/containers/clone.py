"""CloneContainer: a new container from a revision of another one, with a copy of its files.

The clone is made on the very image that the files lie on. Then, of what the source has now,

    create -> gather -> (freeze) complete (thaw) -> start -> verify | commit

where the source is frozen only while what changed during `gather` is copied; or, where the layers are out of reach,

    (freeze) snapshot to an image (thaw) -> create -> start -> verify | commit

and of what was kept of an older revision,

    create -> restore files -> start -> verify | commit        (a tree)
    name the image -> create -> start -> verify | commit       (an image)

The source is locked all the while, so that neither its files nor what is kept of them go away. An image that came of a
carry or a snapshot belongs to the source and goes with it: the clone gives it a name of its own.
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
from gpudock_server.errors import (
    ContainerNotRunning,
    ImageNotFound,
    SnapshotFailed,
    SnapshotNotFound,
)
from gpudock_server.model.container import (
    Container,
    ContainerState,
    EngineBinding,
    RevisionCause,
)
from gpudock_server.model.engine import EngineContainer, EngineState
from gpudock_server.model.operation import LayerTransferMethod, Operation, OperationKind, OperationPlan
from gpudock_server.model.record import Record, now
from gpudock_server.model.resource import ResourceRef
from gpudock_server.model.snapshot import SnapshotKey, SnapshotKind
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.model.store_changes import (
    PutContainer,
    StoreChange,
)
from gpudock_server.ports import ContainerView, Engine, LayerStore, SnapshotStore


class CloneOrigin(StrEnum):
    """Where the files come from: the source as it is, by copy or as an image, or what was kept of a revision."""

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
    """The files of the clone. `image_id` is what they lie on, `base_image_id` the image that the source's user named.

    `source` is what serves the source, where its files of now are taken, and is frozen while they must be still if
    `freeze` says so; else `revision` is whose files were kept.
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
    """What the saga needs to be built again."""

    source: ResourceRef
    files: CloneFiles


@dataclass(frozen=True, slots=True)
class CloneContainer:
    """Checks that a clone can be made, finds its files, and picks what it is given."""

    new: NewContainers
    engine: Engine
    images: Images
    layers: LayerStore
    layer_images: LayerImages
    snapshots: SnapshotStore
    history: History

    async def draft(self, command: Clone) -> OperationDraft:
        """Check that it can be made, find its files, and pick what it would be given."""
        await self.new.containers.require_free_name(command.name)
        view = await self.new.containers.find_unlocked(command.source)
        source = view.container
        found, files = await self._spec_and_files(source, command.revision)
        owner = command.owner or source.owner
        if owner != source.owner and not await self.images.may_use(files.base_image_id, owner):
            # The same words as for an image that is not there: another owner's images are not told.
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
            # It must be as it was read: another operation may have come and gone before the lock is taken.
            conditions=(PutContainer(source, expect=view.version), *require_unchanged(volumes)),
            build=partial(CloneSaga, self),
        )

    async def _spec_and_files(self, source: Container, revision: int) -> tuple[ContainerSpec, CloneFiles]:
        """The spec and the files of a revision; 0 and the current one are the source as it is."""
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
        seen = await self.engine.inspect(engine.engine_id) if engine is not None else None
        if engine is None or seen is None:
            raise ContainerNotRunning(
                container=source.name,
                state=source.status.state.value,
                needs="its files of now are lost; clone one of its revisions",
            )
        files = CloneFiles(
            origin=CloneOrigin.COMMIT,
            image_id=engine.image_id,
            base_image_id=engine.user_image_id,
            source=engine,
            freeze=seen.running and seen.state is not EngineState.PAUSED,
        )
        carry = await self.layers.plan(seen)
        if carry.method is LayerTransferMethod.COMMIT:
            return files.model_copy(
                update={
                    "bytes_to_move": carry.bytes_to_move,
                    "bytes_available": carry.bytes_available,
                    "warnings": carry.warnings,
                }
            )
        method, why_not = await self.snapshots.method(seen)
        if method is None:
            warning = f"its files are taken as an image, which does not keep everything: {why_not}"
            return files.model_copy(update={"warnings": (warning,)})
        cost = await self.snapshots.plan(seen, None)
        if cost.too_large:
            raise SnapshotFailed(detail=f"the source's layer is too large to be copied: {cost.too_large}")
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
    return tuple(
        f"what {source.name} has at {target}, in a volume that its image asks for, does not come along"
        for target in sorted(targets)
    )


class CloneSaga(NewContainerSaga):
    """See the module's docstring."""

    def __init__(self, clone: CloneContainer, operation: Operation) -> None:
        """Builds the script from the operation's arguments."""
        self._arguments = CloneArguments.model_validate(operation.arguments)
        super().__init__(clone.new, self._arguments)
        self._clone = clone
        self._files = self._arguments.files

    # -- the script --------------------------------------------------------------------------------------------------

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
        """Whether the image is one that goes when its owner, the source, has no more use for it."""
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

    # -- its files ---------------------------------------------------------------------------------------------------

    async def _restore(self, run: OperationRun) -> None:
        key = SnapshotKey(uid=self._arguments.source.uid, revision=self._files.revision)
        await self._clone.snapshots.restore(key, await self._inspect(_clone_engine_id(run)), run.progress)

    async def _gather(self, run: OperationRun) -> None:
        await self._mirror(run, still=False)

    async def _complete(self, run: OperationRun) -> None:
        async with self._frozen_source(run):
            await self._mirror(run, still=True)

    async def _mirror(self, run: OperationRun, *, still: bool) -> None:
        source, clone = (
            await self._inspect(self._source_binding().engine_id),
            await self._inspect(_clone_engine_id(run)),
        )
        await self._clone.snapshots.mirror(source, clone, run.operation.id, still=still, progress=run.progress)

    @asynccontextmanager
    async def _frozen_source(self, run: OperationRun) -> AsyncIterator[None]:
        """The source frozen, if it has to be. All of it is one step, so that it waits for no record meanwhile."""
        if self._files.freeze:
            await self._new.engine_containers.freeze((await self._inspect(self._source_binding().engine_id)).id)
        try:
            yield
        finally:
            await self._thaw(run)

    async def _thaw(self, _run: OperationRun) -> None:
        if self._files.freeze:
            await self._new.engine_containers.thaw_if_frozen(self._source_binding().engine_id)

    def _source_binding(self) -> EngineBinding:
        if self._files.source is None:
            raise SnapshotFailed(detail="the source has nothing that serves it")
        return self._files.source

    async def _inspect(self, engine_id: str) -> EngineContainer:
        seen = await self._clone.engine.inspect(engine_id)
        if seen is None:
            raise SnapshotFailed(detail=f"engine container {engine_id[:12]} is gone")
        return seen

    # -- the point of no return --------------------------------------------------------------------------------------

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        binding = await self._binding(run)
        seen = await self._clone.engine.inspect(binding.engine_id)
        made = await self._outcome(run, view, binding, seen, RevisionCause.CLONED)
        return Outcome([*made.changes, *await self._source_changes()], made.result)

    async def _binding(self, run: OperationRun) -> EngineBinding:
        arguments, created = self._arguments, CREATED.of(run.operation)
        seen = await self._inspect(created.engine_id)
        owns_image = self._needs_own_tag or self._files.origin is CloneOrigin.COMMIT
        return EngineBinding(
            engine_id=seen.id,
            engine_name=created.engine_name,
            image_id=created.image_id,
            base_image_id=self._files.base_image_id,
            placement=arguments.placement,
            fixed_digest=arguments.spec.fixed_digest,
            anonymous_volumes=anonymous_volumes(arguments.spec, seen.volumes),
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
        """What its engine container did meanwhile: nobody looks at one that is locked."""
        view = await self._containers.view_of(self._arguments.source)
        if view is None or view.container.engine is None:
            return []
        source = view.container
        seen = await self._clone.engine.inspect(view.container.engine.engine_id)
        status = observed_status(source, seen) if seen is not None else source.status
        if status == source.status:
            return []
        return [PutContainer(source.changed(status=status, update_time=now()), expect=view.version)]


def _clone_engine_id(run: OperationRun) -> str:
    return CREATED.of(run.operation).engine_id
