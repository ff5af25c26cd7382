"""The saga of start, restart, scale, update and rollback: carries out a ChangePlan.

`ChangeSaga` lists the steps of each method in order. Files reach a successor in one of four ways: its writable layer
and that of the old engine container are exchanged, or one is copied to the other; the engine commits the old layer to
an image, from which the successor is created; a snapshot is restored; or the successor has the files of its image only.
In between, the files of the old revision are kept (see `snapshots`).

The old engine container is kept, complete or restorable, until the successor runs and the commit is durable. New GPUs
and ports are claimed in the transaction that begins the operation, old ones are released in the transaction that
commits it: at every moment each of them has exactly one holder.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from typing_extensions import override

from gpudock_server.core.containers.change_plan import AllowedExits, ChangeMethod, ChangePlan, SuccessorFiles
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
from gpudock_server.core.containers.new_container import VERIFIED, WatchedStart, anonymous_volumes, status_at_commit
from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.core.containers.revision_backups import write_revision_backup
from gpudock_server.core.containers.snapshots import RevisionSnapshots
from gpudock_server.core.operations.saga import OperationRun, Outcome, Saga, Step, StepResult
from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.errors import LayerCarryFailed, PulledImageDiffers, StartFailed
from gpudock_server.model.claims import claim_keys
from gpudock_server.model.container import Container, ContainerState, EngineBinding
from gpudock_server.model.engine import EngineContainer, RegistryAuth
from gpudock_server.model.names import engine_container_name
from gpudock_server.model.operation import LayerTransferMethod, Operation, StageState
from gpudock_server.model.record import Record, now
from gpudock_server.model.snapshot import Snapshot, SnapshotKey, SnapshotKind
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.model.store_changes import PutContainer, PutRevision, PutSnapshot, StoreChange
from gpudock_server.ports import ContainerView, Engine, LayerPair, LayerStore


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
    snapshots: RevisionSnapshots
    history: History
    claims: HostClaims


class ChangeSaga(Saga[ContainerView]):
    """Carries out a ChangePlan; see the module's docstring."""

    def __init__(
        self, changes: ContainerChanges, operation: Operation, registry_auth: RegistryAuth | None = None
    ) -> None:
        """`registry_auth` is not recorded: a resumed pull is made without credentials."""
        super().__init__(changes.containers)
        self._changes = changes
        self._plan = ChangePlan.model_validate(operation.arguments)
        self._keep = changes.snapshots.steps(self._plan.keep)
        source = self._plan.source
        self._image_pull = Pull(
            self._plan.spec.image,
            self._plan.owner,
            registry_auth,
            authenticated=self._plan.authenticated,
            present_id=source.present_id,
            stall_seconds=source.pull_stall_seconds,
        )

    # -- the steps ---------------------------------------------------------------------------------------------------

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        match self._plan.method:
            case ChangeMethod.IN_PLACE:
                return self._in_place()
            case ChangeMethod.RESTART:
                return self._restart()
            case ChangeMethod.REPLACE if self._plan.transfer.method is LayerTransferMethod.COMMIT:
                return self._replace_by_commit()
            case ChangeMethod.REPLACE:
                return self._replace()

    def _in_place(self) -> tuple[Step, ...]:
        """The process continues: keep the files, frozen for their last changes, and set the limits."""
        keep, still = self._keep, self._keep_while_stopped()
        limits = Step(
            "limits", partial(self._set_limits, self._plan.spec), partial(self._set_limits, self._plan.old_spec)
        )
        return (
            *keep.steps_while_running,
            *(keep.with_freeze(*still) if self._plan.runs else still),
            *keep.steps_at_end,
            *_steps_if(self._plan.changes_limits, limits),
        )

    def _restart(self) -> tuple[Step, ...]:
        """The engine container stays. Files are kept only if the start of a stopped one makes a new revision."""
        keep = self._keep
        return (
            *keep.steps_while_running,
            *self._keep_while_stopped(),
            *keep.steps_at_end,
            *self._stop_old(),
            *self._start_and_verify(),
        )

    def _replace(self) -> tuple[Step, ...]:
        """The successor gets its files before it starts. What can be done while the old process runs comes first."""
        source, keep = self._plan.source, self._keep
        transfers = source.files is SuccessorFiles.CARRY
        return (
            *self._pull(),
            Step(CREATED.step, self._create, self._remove_successor),
            *_steps_if(transfers, Step(_LOCATED.step, self._locate)),
            *_steps_if(source.restores_tree, Step("restore", self._restore, interruptible=True)),
            *keep.steps_while_running,
            *self._stop_old(),
            *self._keep_while_stopped(),
            *_steps_if(transfers, Step(_TRANSFERRED.step, self._transfer_layer, self._undo_layer_transfer)),
            *self._start_and_verify(),
            *keep.steps_at_end,
        )

    def _replace_by_commit(self) -> tuple[Step, ...]:
        """The successor is created from an image of the old files, which is also what is kept of them."""
        grafts = self._plan.source.files is SuccessorFiles.GRAFT
        return (
            *self._pull(),
            *self._stop_old(),
            Step(LAYER_IMAGE.step, self._make_image, self._remove_image),
            *_steps_if(grafts, Step(GRAFTED.step, self._graft, self._remove_graft)),
            Step(CREATED.step, self._create, self._remove_successor),
            *self._start_and_verify(),
        )

    @property
    @override
    def cleanup_steps(self) -> tuple[Step, ...]:
        return (
            *_steps_if(self._plan.method is ChangeMethod.REPLACE, Step("retire", self._retire)),
            *_steps_if(self._plan.prunes, Step("prune", self._prune)),
        )

    def _pull(self) -> tuple[Step, ...]:
        if self._plan.source.fetch:
            return (Step(PULLED.step, self._pull_revision_image, interruptible=True),)
        return _steps_if(self._plan.source.pulls, self._changes.images.pull_step(self._image_pull))

    def _keep_while_stopped(self) -> tuple[Step, ...]:
        image = Step(LAYER_IMAGE.step, self._make_image, self._remove_image)
        return (*self._keep.steps_while_stopped, *_steps_if(self._keep.as_image, image))

    def _stop_old(self) -> tuple[Step, ...]:
        return _steps_if(self._plan.stops_process, Step("stop", self._stop, self._start_old))

    def _start_and_verify(self) -> tuple[Step, ...]:
        return (
            *_steps_if(self._plan.starts_process, Step("start", self._start, self._stop_started)),
            *_steps_if(self._plan.allowed_exits is not None, Step(VERIFIED.step, self._verify)),
        )

    # -- stopping and starting engine containers ---------------------------------------------------------------------

    async def _stop(self, _run: OperationRun) -> None:
        plan, frozen = self._plan, self._plan.old_state is ContainerState.PAUSED
        await self._changes.engine_containers.stop(plan.old.engine_id, plan.old_spec, plan.stop_timeout, frozen=frozen)

    async def _start_old(self, _run: OperationRun) -> None:
        await self._changes.engine_containers.start(self._plan.old.engine_id, self._plan.old_spec, renew=False)

    async def _set_limits(self, spec: ContainerSpec, _run: OperationRun) -> None:
        await self._changes.engine.update(
            self._plan.old.engine_id,
            cpus=spec.cpus,
            memory_bytes=spec.memory_bytes,
            pids_limit=spec.pids_limit,
            restart_policy=spec.restart_policy,
        )

    async def _start(self, run: OperationRun) -> None:
        await self._changes.engine_containers.start(self._serving_engine_id(run), self._plan.spec)

    async def _stop_started(self, run: OperationRun) -> None:
        """Stop the process that was started, except after a restart: the container ran before, too."""
        restarted = self._plan.method is ChangeMethod.RESTART and self._plan.stops_process
        if not restarted and (serving := self._serving_engine_id(run)):
            await self._changes.engine.stop(serving, 0)

    def _serving_engine_id(self, run: OperationRun) -> str:
        """The engine container after the change; empty if it is a successor that was not created yet."""
        if self._plan.method is not ChangeMethod.REPLACE:
            return self._plan.old.engine_id
        created = CREATED.find(run.operation)
        return created.engine_id if created else ""

    async def _verify(self, run: OperationRun) -> WatchedStart:
        starts, allowed = self._changes.engine_containers, self._plan.allowed_exits
        replaced = self._plan.method is ChangeMethod.REPLACE
        seconds = starts.settle_seconds if replaced else starts.start_watch_seconds
        code = await starts.wait_for_exit(self._serving_engine_id(run), seconds)
        failed = allowed is AllowedExits.NONE or (allowed is AllowedExits.ZERO and code != 0)
        if code is not None and failed:
            raise StartFailed(
                container=run.operation.target.name,
                detail=f"its process exited with code {code} within {seconds:g} s of its start",
            )
        return WatchedStart(exit_code=code)

    # -- the successor -----------------------------------------------------------------------------------------------

    async def _pull_revision_image(self, run: OperationRun) -> PulledImage:
        """Pull the image of a revision again. Raises PulledImageDiffers if its name now refers to another image."""
        source, engine = self._plan.source, self._changes.engine
        if await engine.image(source.image_id) is None:
            pulled = await self._changes.images.pull(run, self._image_pull)
            if await engine.image(source.image_id) is None:
                raise PulledImageDiffers(
                    container=run.operation.target.name,
                    image=self._plan.spec.image,
                    image_id=pulled.image_id,
                    current_image_id=source.image_id,
                )
        return PulledImage(image_id=source.image_id)

    def _new_image(self, operation: Operation) -> str:
        """The id of the image that the change names or pulls; empty if the container keeps its image."""
        return PULLED.of(operation).image_id if self._plan.source.pulls else self._plan.source.image_id

    def _successor_image(self, operation: Operation) -> str:
        # An id and not the tag, which may have moved: a layer is only valid on the image that it was written on.
        if self._plan.source.files is SuccessorFiles.GRAFT:
            return GRAFTED.of(operation).image_id
        if self._plan.transfer.method is LayerTransferMethod.COMMIT:
            return LAYER_IMAGE.of(operation).image_id
        return self._new_image(operation) or self._plan.old.image_id

    async def _create(self, run: OperationRun) -> CreatedEngineContainer:
        plan = self._plan
        return await self._changes.engine_containers.create(
            run.operation,
            image_id=self._successor_image(run.operation),
            spec=plan.spec,
            placement=plan.placement,
            revision=plan.revision,
            owner=plan.owner,
            mounted=await self._changes.mounts.ensure_engine_volumes(plan.spec.mounts),
            anonymous=plan.old.anonymous_volumes,
        )

    async def _remove_successor(self, run: OperationRun) -> None:
        if await self._predecessor_is_gone(run):
            run.add_message("the old engine container was removed outside gpudock; its successor is kept as it is")
            return
        await self._changes.engine_containers.remove_created(run.operation)

    async def _restore(self, run: OperationRun) -> None:
        source = self._plan.source
        key = SnapshotKey(uid=run.operation.target.uid, revision=source.revision)
        await self._changes.snapshots.store.restore(
            key, await self._inspect(self._serving_engine_id(run)), run.progress
        )

    async def _predecessor_is_gone(self, run: OperationRun) -> bool:
        """Whether the old engine container was removed outside gpudock after files may have reached the successor."""
        if await self._changes.engine.inspect(self._plan.old.engine_id) is not None:
            return False
        name = engine_container_name(run.operation.target.name, run.operation.id)
        successor = await self._changes.engine.inspect(name)
        carried = any(
            stage.name in (_TRANSFERRED.step, LAYER_IMAGE.step) and stage.state is not StageState.PENDING
            for stage in run.operation.stages
        )
        return carried or (successor is not None and successor.start_time is not None)

    async def _locate(self, run: OperationRun) -> LayerPair:
        old = await self._inspect(self._plan.old.engine_id)
        new = await self._inspect(self._serving_engine_id(run))
        return await self._changes.layers.locate(old, new)

    async def _inspect(self, engine_id: str) -> EngineContainer:
        engine_container = await self._changes.engine.inspect(engine_id)
        if engine_container is None:
            raise LayerCarryFailed(
                method=self._plan.transfer.method.value,
                detail=f"engine container {engine_id[:12]} was removed during the operation",
            )
        return engine_container

    async def _transfer_layer(self, run: OperationRun) -> LayerTransfer:
        layers, pair = self._changes.layers, _LOCATED.of(run.operation)
        await self._require_both_stopped(run)
        if self._plan.transfer.method is LayerTransferMethod.EXCHANGE and await layers.exchange(pair):
            return LayerTransfer(method=LayerTransferMethod.EXCHANGE)
        await layers.copy(pair, run.progress)
        return LayerTransfer(method=LayerTransferMethod.COPY)

    async def _require_both_stopped(self, run: OperationRun) -> None:
        """Raise LayerCarryFailed if one of them runs: a user may have started it, and it may write to its layer."""
        old, new = self._plan.old.engine_id, self._serving_engine_id(run)
        for engine_container in await asyncio.gather(self._inspect(old), self._inspect(new)):
            if engine_container.running:
                raise LayerCarryFailed(
                    method=self._plan.transfer.method.value,
                    detail=f"engine container {engine_container.name} is running; it must be stopped",
                )

    async def _undo_layer_transfer(self, run: OperationRun) -> None:
        pair = _LOCATED.find(run.operation)
        if pair is not None and not await self._predecessor_is_gone(run):
            # The successor may have the old files; it must not write to them while they are moved back.
            await self._stop_started(run)
            await self._changes.layers.exchange_back(pair)

    async def _make_image(self, run: OperationRun) -> LayerImage:
        return await self._changes.layer_images.make(run, self._plan.old)

    async def _remove_image(self, run: OperationRun) -> None:
        if not await self._predecessor_is_gone(run):
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
        plan = self._plan
        binding = await self._binding(run)
        engine_container = await self._changes.engine.inspect(binding.engine_id)
        container = view.container.changed(
            spec=plan.spec,
            engine=binding,
            revision=plan.revision,
            generation=view.container.generation + 1,
            update_time=now(),
        ).with_status(placement=plan.placement, holds_resources=self._holds_resources(view.container))
        status = status_at_commit(container, engine_container, run.operation, started=plan.starts_process)
        container = container.changed(status=status)
        changes: list[StoreChange] = [PutContainer(container, expect=view.version)]
        if plan.cause is not None:
            revision = revision_of(container, plan.cause, run.operation.id)
            changes.append(PutRevision(revision))
            if (snapshot := self._keep.snapshot_of(run.operation)) is not None:
                changes.append(PutSnapshot(container.uid, plan.keep.revision, snapshot))
            # A snapshot on the disk describes itself; an image in the engine does not.
            image = snapshot if isinstance(snapshot, Snapshot) and snapshot.kind is SnapshotKind.IMAGE else None
            await write_revision_backup(
                self._changes.history.revision_backups,
                container,
                revision,
                (plan.keep.revision, image) if image else None,
            )
        changes += self._changes.claims.confirm(container, claim_keys(plan.placement))
        changes += self._changes.claims.release(container.uid, plan.released)
        return Outcome(changes, container)

    def _holds_resources(self, container: Container) -> bool:
        """Whether the container holds what its spec requests. A stopped container keeps its old placement."""
        plan = self._plan
        return plan.starts_process or (container.status.holds_resources and plan.placement.serves(plan.spec))

    async def _binding(self, run: OperationRun) -> EngineBinding:
        plan = self._plan
        if plan.method is not ChangeMethod.REPLACE:
            return plan.old
        created = CREATED.of(run.operation)
        engine_container = await self._inspect(created.engine_id)
        images = [image for result in (LAYER_IMAGE, GRAFTED) if (image := result.find(run.operation)) is not None]
        return EngineBinding(
            engine_id=engine_container.id,
            engine_name=created.engine_name,
            image_id=created.image_id,
            base_image_id=self._base_image(run.operation),
            placement=plan.placement,
            fixed_digest=plan.spec.fixed_digest,
            anonymous_volumes=anonymous_volumes(plan.spec, engine_container.volumes),
            layer_images=(*plan.old.layer_images, *(image.reference for image in images if image.reference)),
            base_depth=self._base_depth(run.operation),
        )

    def _base_depth(self, operation: Operation) -> int:
        if self._base_image(operation) != self._plan.old.user_image_id:
            return 0
        image = LAYER_IMAGE.find(operation)
        return image.base_depth if image and image.base_depth is not None else self._plan.old.base_depth

    def _base_image(self, operation: Operation) -> str:
        if self._plan.source.pulls:
            return self._new_image(operation)
        return self._plan.source.base_image_id or self._plan.old.user_image_id

    async def _retire(self, _run: OperationRun) -> None:
        await self._changes.engine_containers.remove(self._plan.old.engine_id, self._plan.old.engine_name)

    async def _prune(self, run: OperationRun) -> None:
        await self._changes.history.prune(run.operation.target.uid, self._plan.spec)

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        plan = self._plan
        container = await self._changes.engine_containers.observe(view.container, plan.old.engine_id)
        container = container.changed(update_time=now())
        released = self._changes.claims.release(container.uid, plan.claimed)
        return [PutContainer(container, expect=view.version), *released]


def _steps_if(condition: bool, *steps: Step) -> tuple[Step, ...]:  # noqa: FBT001 - the condition comes first, as in an if statement
    return steps if condition else ()
