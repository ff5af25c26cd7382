"""The saga of start, restart, scale, update and rollback: bring a container to another placement and spec.

If possible, the existing engine container is updated, stopped and started. Otherwise (other GPUs, ports or /dev/shm
size) a successor takes over its writable layer:

    create successor -> locate layers -> stop old -> carry layer -> start successor -> verify | commit | retire old

If files can only be transferred as an image:

    stop old -> snapshot to an image -> create successor -> start successor -> verify | commit | retire old

With the files of a revision, which are restored before the old engine container stops:

    create successor -> restore files -> stop old -> start successor -> verify | commit | retire old

With another image, the successor has the files of that image only, or also the old files as one more layer on it:

    stop old -> snapshot to an image -> graft -> create successor -> start successor -> verify | commit | retire old

In between, the files of the old revision are kept (see `snapshots`).

The old engine container is kept, complete or restorable, until the successor runs and the commit is durable. The bar
marks the point of no return. New GPUs and ports are claimed in the transaction that begins the operation, old ones are
released in the transaction that commits it: at every moment each of them has exactly one holder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from gpudock_server.core.containers.change_arguments import ChangeArguments, SuccessorFiles
from gpudock_server.core.containers.engine_containers import CREATED, CreatedEngineContainer, EngineContainers
from gpudock_server.core.containers.history import History, revision_of
from gpudock_server.core.containers.images import PULLED, Images, Pull, PulledImage
from gpudock_server.core.containers.layer_images import (
    GRAFTED,
    LAYER_IMAGE,
    GraftedImage,
    LayerImage,
    LayerImages,
    grafted_image_name,
)
from gpudock_server.core.containers.mounts import Mounts
from gpudock_server.core.containers.new_container import (
    VERIFIED,
    WatchedStart,
    anonymous_volumes,
    exit_code_of_start,
)
from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.core.containers.revision_backups import write_revision_backup
from gpudock_server.core.containers.saga import ContainerSaga
from gpudock_server.core.containers.snapshots import RevisionSnapshots
from gpudock_server.core.containers.status import observed_status, status_after_start
from gpudock_server.core.operations.saga import OperationRun, Outcome, Step, StepResult
from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.errors import LayerCarryFailed, PulledImageDiffers, StartFailed
from gpudock_server.model.claims import claim_keys
from gpudock_server.model.container import Container, EngineBinding
from gpudock_server.model.engine import EngineContainer, RegistryAuth
from gpudock_server.model.names import engine_container_name
from gpudock_server.model.operation import LayerTransferMethod, Operation, StageState
from gpudock_server.model.record import Record, now
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotKind
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.model.store_changes import PutContainer, PutRevision, PutSnapshot, StoreChange
from gpudock_server.ports import ContainerView, Engine, LayerPair, LayerStore, RevisionBackupStore, SnapshotStore


class LayerTransfer(Record):
    """How the writable layer was transferred to the successor."""

    method: LayerTransferMethod


_LOCATED = StepResult("locate", LayerPair)
_TRANSFERRED = StepResult("carry", LayerTransfer)


@dataclass(frozen=True, slots=True)
class ContainerChanges:
    """The dependencies of a change of a container."""

    containers: ContainerResource
    engine: Engine
    engine_containers: EngineContainers
    mounts: Mounts
    images: Images
    layers: LayerStore
    layer_images: LayerImages
    revision_files: SnapshotStore
    snapshots: RevisionSnapshots
    history: History
    revision_backups: RevisionBackupStore
    claims: HostClaims


class ChangeSaga(ContainerSaga):
    """Changes a container in place or by a successor; see the module's docstring."""

    def __init__(
        self, changes: ContainerChanges, operation: Operation, registry_auth: RegistryAuth | None = None
    ) -> None:
        """`registry_auth` is not recorded: a resumed pull is made without credentials."""
        super().__init__(changes.containers)
        self._changes = changes
        self._auth = registry_auth
        self._arguments = ChangeArguments.model_validate(operation.arguments)
        self._snapshot_steps = changes.snapshots.steps(self._arguments.keep)

    # -- the steps ---------------------------------------------------------------------------------------------------

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        return self._replacement_steps() if self._arguments.replace else self._in_place_steps()

    def _in_place_steps(self) -> tuple[Step, ...]:
        arguments, snapshot_steps = self._arguments, self._snapshot_steps
        still = (*snapshot_steps.steps_while_stopped, *self._image_steps())
        if arguments.was_running and not arguments.frozen:
            still = snapshot_steps.with_freeze(*still)
        limits = [Step("limits", self._set_limits, self._restore_limits)] if arguments.limits else []
        start = (*self._start_steps(), *(self._verify_steps() if arguments.verify else ()))
        return (
            *snapshot_steps.steps_while_running,
            *still,
            *snapshot_steps.steps_at_end,
            *self._stop_steps(),
            *limits,
            *start,
        )

    def _replacement_steps(self) -> tuple[Step, ...]:
        arguments, snapshot_steps = self._arguments, self._snapshot_steps
        pull = [Step(PULLED.step, self._pull, self._restrict_image, interruptible=True)] if self._pulls else []
        if arguments.source.fetch:
            pull = [Step(PULLED.step, self._pull_revision_image, interruptible=True)]
        create = Step(CREATED.step, self._create, self._remove_successor)
        stop, start = self._stop_steps(), (*self._start_steps(), *self._verify_steps())
        if arguments.carry is LayerTransferMethod.COMMIT:
            graft = (
                [Step(GRAFTED.step, self._graft, self._remove_graft)]
                if arguments.source.files is SuccessorFiles.GRAFT
                else []
            )
            return (*pull, *stop, self._image_step(), *graft, create, *start)
        before, after = [create], []
        if arguments.source.files is SuccessorFiles.CARRY:
            before.append(Step(_LOCATED.step, self._locate))
            after.append(Step(_TRANSFERRED.step, self._transfer_layer, self._undo_layer_transfer))
        elif self._restores_tree:
            before.append(Step("restore", self._restore, interruptible=True))
        still = (*stop, *snapshot_steps.steps_while_stopped, *self._image_steps())
        return (
            *pull,
            *before,
            *snapshot_steps.steps_while_running,
            *still,
            *after,
            *start,
            *snapshot_steps.steps_at_end,
        )

    def _stop_steps(self) -> tuple[Step, ...]:
        return (Step("stop", self._stop, self._start_old),) if self._arguments.stop else ()

    def _start_steps(self) -> tuple[Step, ...]:
        return (Step("start", self._start, self._stop_successor),) if self._arguments.start else ()

    def _verify_steps(self) -> tuple[Step, ...]:
        return (Step(VERIFIED.step, self._verify),) if self._arguments.start else ()

    def _image_steps(self) -> tuple[Step, ...]:
        return (self._image_step(),) if self._snapshot_steps.as_image else ()

    def _image_step(self) -> Step:
        return Step(LAYER_IMAGE.step, self._snapshot, self._remove_snapshot)

    @property
    def _pulls(self) -> bool:
        return (
            self._arguments.source.files in (SuccessorFiles.FRESH, SuccessorFiles.GRAFT)
            and not self._arguments.source.image_id
        )

    def _new_image(self, operation: Operation) -> str:
        """The id of the new image that the user named."""
        return PULLED.of(operation).image_id if self._pulls else self._arguments.source.image_id

    @property
    def _restores_tree(self) -> bool:
        snapshot = self._arguments.source.snapshot
        return snapshot is not None and snapshot.kind is SnapshotKind.TREE

    @property
    @override
    def cleanup_steps(self) -> tuple[Step, ...]:
        retire = [Step("retire", self._retire)] if self._arguments.replace else []
        prune = [Step("prune", self._prune)] if self._arguments.prunes else []
        return (*retire, *prune)

    # -- stopping and starting engine containers ---------------------------------------------------------------------

    async def _stop(self, _run: OperationRun) -> None:
        arguments = self._arguments
        await self._changes.engine_containers.stop(
            arguments.old.engine_id, arguments.old_spec, arguments.stop_timeout, frozen=arguments.frozen
        )

    async def _start_old(self, _run: OperationRun) -> None:
        if self._arguments.was_running:
            await self._changes.engine_containers.start(
                self._arguments.old.engine_id, self._arguments.old_spec, renew=False
            )

    async def _set_limits(self, _run: OperationRun) -> None:
        await self._apply_limits(self._arguments.spec)

    async def _restore_limits(self, _run: OperationRun) -> None:
        await self._apply_limits(self._arguments.old_spec)

    async def _apply_limits(self, spec: ContainerSpec) -> None:
        await self._changes.engine.update(
            self._arguments.old.engine_id,
            cpus=spec.cpus,
            memory_bytes=spec.memory_bytes,
            pids_limit=spec.pids_limit,
            restart_policy=spec.restart_policy,
        )

    async def _start(self, run: OperationRun) -> None:
        await self._changes.engine_containers.start(await self._serving_engine_id(run), self._arguments.spec)

    async def _stop_successor(self, run: OperationRun) -> None:
        # Also in place: undoing the start of a container that was stopped stops it again.
        serving = await self._serving_engine_id(run)
        if serving and not (serving == self._arguments.old.engine_id and self._arguments.was_running):
            await self._changes.engine.stop(serving, 0)

    async def _serving_engine_id(self, run: OperationRun) -> str:
        """The engine container after the change: the successor, or the old one if the change is in place."""
        if not self._arguments.replace:
            return self._arguments.old.engine_id
        created = CREATED.find(run.operation)
        return created.engine_id if created else ""

    async def _verify(self, run: OperationRun) -> WatchedStart:
        starts = self._changes.engine_containers
        seconds = starts.settle_seconds if self._arguments.replace else starts.start_watch_seconds
        code = await starts.wait_for_exit(await self._serving_engine_id(run), seconds)
        if code is not None and (code != 0 or self._arguments.must_live) and not self._arguments.may_end:
            raise StartFailed(
                container=run.operation.target.name,
                detail=f"its process exited with code {code} within {seconds:g} s of its start",
            )
        return WatchedStart(exit_code=code)

    # -- the successor -----------------------------------------------------------------------------------------------

    @property
    def _image_pull(self) -> Pull:
        return Pull(
            self._arguments.spec.image,
            self._arguments.owner,
            self._auth,
            authenticated=self._arguments.authenticated,
            present_id=self._arguments.source.present_id,
            stall_seconds=self._arguments.source.pull_stall_seconds,
        )

    async def _pull(self, run: OperationRun) -> PulledImage:
        return PulledImage(image_id=(await self._changes.images.pull(run, self._image_pull)).id)

    async def _pull_revision_image(self, run: OperationRun) -> PulledImage:
        """Pull the image of a revision again. Raises PulledImageDiffers if its name now refers to another image."""
        source, engine = self._arguments.source, self._changes.engine
        if await engine.image(source.image_id) is None:
            pulled = await self._changes.images.pull(run, self._image_pull)
            if await engine.image(source.image_id) is None:
                raise PulledImageDiffers(
                    container=run.operation.target.name,
                    image=self._arguments.spec.image,
                    image_id=pulled.id,
                    current_image_id=source.image_id,
                )
        return PulledImage(image_id=source.image_id)

    async def _restrict_image(self, _run: OperationRun) -> None:
        await self._changes.images.restrict_after_failed_pull(self._image_pull)

    def _successor_image(self, operation: Operation) -> str:
        # An id and not the tag, which may have moved: a layer is only valid on the image that it was written on.
        if self._arguments.source.files is SuccessorFiles.GRAFT:
            return GRAFTED.of(operation).image_id
        if self._arguments.carry is LayerTransferMethod.COMMIT:
            return LAYER_IMAGE.of(operation).image_id
        return self._new_image(operation) or self._arguments.old.image_id

    async def _create(self, run: OperationRun) -> CreatedEngineContainer:
        arguments = self._arguments
        return await self._changes.engine_containers.create(
            run.operation,
            image_id=self._successor_image(run.operation),
            spec=arguments.spec,
            placement=arguments.placement,
            revision=arguments.revision,
            owner=arguments.owner,
            mounted=await self._changes.mounts.ensure_engine_volumes(arguments.spec.mounts),
            anonymous=arguments.old.anonymous_volumes,
        )

    async def _remove_successor(self, run: OperationRun) -> None:
        if await self._predecessor_is_gone(run):
            run.add_message("the old engine container was removed outside gpudock; its successor is kept as it is")
            return
        await self._changes.engine_containers.remove_created(run.operation)

    async def _restore(self, run: OperationRun) -> None:
        source = self._arguments.source
        key = SnapshotKey(uid=run.operation.target.uid, revision=source.revision)
        await self._changes.revision_files.restore(
            key, await self._inspect(await self._serving_engine_id(run)), run.progress
        )

    async def _predecessor_is_gone(self, run: OperationRun) -> bool:
        """Whether the old engine container was removed outside gpudock after files may have reached the successor."""
        if await self._changes.engine.inspect(self._arguments.old.engine_id) is not None:
            return False
        name = engine_container_name(run.operation.target.name, run.operation.id)
        successor = await self._changes.engine.inspect(name)
        carried = any(
            stage.name in (_TRANSFERRED.step, LAYER_IMAGE.step) and stage.state is not StageState.PENDING
            for stage in run.operation.stages
        )
        return carried or (successor is not None and successor.start_time is not None)

    async def _locate(self, run: OperationRun) -> LayerPair:
        old = await self._inspect(self._arguments.old.engine_id)
        new = await self._inspect(await self._serving_engine_id(run))
        return await self._changes.layers.locate(old, new)

    async def _inspect(self, engine_id: str) -> EngineContainer:
        engine_container = await self._changes.engine.inspect(engine_id)
        if engine_container is None:
            raise LayerCarryFailed(
                method=self._arguments.carry.value,
                detail=f"engine container {engine_id[:12]} was removed during the operation",
            )
        return engine_container

    async def _transfer_layer(self, run: OperationRun) -> LayerTransfer:
        layers, pair = self._changes.layers, _LOCATED.of(run.operation)
        await self._require_both_stopped(run)
        if self._arguments.carry is LayerTransferMethod.EXCHANGE and await layers.exchange(pair):
            return LayerTransfer(method=LayerTransferMethod.EXCHANGE)
        await layers.copy(pair, run.progress)
        return LayerTransfer(method=LayerTransferMethod.COPY)

    async def _require_both_stopped(self, run: OperationRun) -> None:
        """Raise LayerCarryFailed if one of them runs: a user may have started it, and it may write to its layer."""
        old, new = self._arguments.old.engine_id, await self._serving_engine_id(run)
        for engine_container in await asyncio.gather(self._inspect(old), self._inspect(new)):
            if engine_container.running:
                raise LayerCarryFailed(
                    method=self._arguments.carry.value,
                    detail=f"engine container {engine_container.name} is running; it must be stopped",
                )

    async def _undo_layer_transfer(self, run: OperationRun) -> None:
        pair = _LOCATED.find(run.operation)
        if pair is not None and not await self._predecessor_is_gone(run):
            # The successor may have the old files; it must not write to them while they are moved back.
            await self._stop_successor(run)
            await self._changes.layers.exchange_back(pair)

    async def _snapshot(self, run: OperationRun) -> LayerImage:
        return await self._changes.layer_images.make(run, self._arguments.old)

    async def _remove_snapshot(self, run: OperationRun) -> None:
        if await self._predecessor_is_gone(run):
            return
        await self._changes.layer_images.remove(run.operation)

    async def _graft(self, run: OperationRun) -> GraftedImage:
        layer_image_id = LAYER_IMAGE.of(run.operation).image_id
        image_id = await self._changes.layer_images.graft(
            run.operation, layer_image_id=layer_image_id, onto=self._new_image(run.operation)
        )
        return GraftedImage(image_id=image_id, reference=grafted_image_name(run.operation))

    async def _remove_graft(self, run: OperationRun) -> None:
        await self._changes.engine.remove_image(grafted_image_name(run.operation))

    # -- the commit and the steps after it ---------------------------------------------------------------------------

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        arguments = self._arguments
        binding = await self._binding(run)
        engine_container = await self._changes.engine.inspect(binding.engine_id)
        moment = now()
        container = view.container.changed(
            spec=arguments.spec,
            engine=binding,
            revision=arguments.revision,
            generation=view.container.generation + 1,
            update_time=moment,
        ).with_status(placement=arguments.placement, holds_resources=self._holds_resources(view.container))
        if arguments.start:
            status = status_after_start(container, engine_container, exit_code_of_start(run.operation))
        else:
            status = observed_status(container, engine_container)
        container = container.changed(status=status)
        changes: list[StoreChange] = [PutContainer(container, expect=view.version)]
        if arguments.cause is not None:
            revision = revision_of(container, arguments.cause, run.operation.id)
            changes.append(PutRevision(revision))
            if (snapshot := self._snapshot_steps.snapshot_of(run.operation)) is not None:
                changes.append(PutSnapshot(container.uid, arguments.keep.revision, snapshot))
            # A snapshot on the disk describes itself; an image in the engine does not.
            image = snapshot if isinstance(snapshot, Snapshot) and snapshot.kind is SnapshotKind.IMAGE else None
            await write_revision_backup(
                self._changes.revision_backups, container, revision, (arguments.keep.revision, image) if image else None
            )
        claimed = claim_keys(arguments.placement)
        changes += self._changes.claims.confirm(container, claimed)
        released = [key for key in claim_keys(arguments.old_placement) if key not in claimed]
        changes += self._changes.claims.release(container.uid, released)
        return Outcome(changes, container)

    def _holds_resources(self, container: Container) -> bool:
        """Whether the container holds what its spec requests. A stopped container keeps its old placement."""
        arguments = self._arguments
        if arguments.start:
            return True
        return container.status.holds_resources and arguments.placement.serves(arguments.spec)

    async def _binding(self, run: OperationRun) -> EngineBinding:
        arguments = self._arguments
        if not arguments.replace:
            return arguments.old
        created = CREATED.of(run.operation)
        engine_container = await self._inspect(created.engine_id)
        images = [image for result in (LAYER_IMAGE, GRAFTED) if (image := result.find(run.operation)) is not None]
        return EngineBinding(
            engine_id=engine_container.id,
            engine_name=created.engine_name,
            image_id=created.image_id,
            base_image_id=self._base_image(run.operation),
            placement=arguments.placement,
            fixed_digest=arguments.spec.fixed_digest,
            anonymous_volumes=anonymous_volumes(arguments.spec, engine_container.volumes),
            layer_images=(
                *arguments.old.layer_images,
                *(image.reference for image in images if image.reference),
            ),
            base_depth=self._base_depth(run.operation),
        )

    def _base_depth(self, operation: Operation) -> int:
        if self._base_image(operation) != self._arguments.old.user_image_id:
            return 0
        image = LAYER_IMAGE.find(operation)
        return image.base_depth if image and image.base_depth is not None else self._arguments.old.base_depth

    def _base_image(self, operation: Operation) -> str:
        if self._pulls:
            return self._new_image(operation)
        return self._arguments.source.base_image_id or self._arguments.old.user_image_id

    async def _retire(self, _run: OperationRun) -> None:
        await self._changes.engine_containers.remove(self._arguments.old.engine_id, self._arguments.old.engine_name)

    async def _prune(self, run: OperationRun) -> None:
        await self._changes.history.prune(run.operation.target.uid, self._arguments.spec)

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        arguments = self._arguments
        container = await self._changes.engine_containers.observe(view.container, arguments.old.engine_id)
        container = container.changed(update_time=now())
        kept = claim_keys(arguments.old_placement)
        released = [key for key in claim_keys(arguments.placement) if key not in kept]
        return [
            PutContainer(container, expect=view.version),
            *self._changes.claims.release(container.uid, released),
        ]
