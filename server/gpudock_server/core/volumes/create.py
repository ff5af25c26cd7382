"""CreateVolume: create the backing on the host, the engine volume that points to it, and last the record."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from typing_extensions import override

from gpudock_server.core.listings import containers_mounting
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Saga, Step, StepResult
from gpudock_server.core.volumes.backends import VolumeBackends
from gpudock_server.core.volumes.commands import Create
from gpudock_server.core.volumes.engine_volumes import EngineVolumes, mounted_engine_volumes
from gpudock_server.core.volumes.resource import VolumeResource
from gpudock_server.core.volumes.saga import revision_of
from gpudock_server.errors import VolumeExists, VolumeRecordLost
from gpudock_server.model.engine import LABEL_NAME, LABEL_NODE
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.record import Record, now
from gpudock_server.model.store_changes import DeleteVolume, PutVolume, StoreChange
from gpudock_server.model.volume import (
    Volume,
    VolumeBackendKind,
    VolumeBacking,
    VolumeCause,
    VolumeIdentity,
    VolumeState,
)
from gpudock_server.ports import Engine, Store, VolumeView


class CreatedEngineVolume(Record):
    """The mountpoint of the engine volume that was created."""

    mountpoint: str


BACKING = StepResult("store", VolumeBacking)
ENGINE_VOLUME = StepResult("engine-volume", CreatedEngineVolume)


class CreateArguments(Record):
    """The arguments from which the saga is rebuilt."""

    kind: VolumeBackendKind
    size_bytes: int


@dataclass(frozen=True, slots=True)
class NewVolumes:
    """The dependencies of the use cases that create volumes, and the checks that these share."""

    store: Store
    engine: Engine
    volumes: VolumeResource
    engine_volumes: EngineVolumes
    backends: VolumeBackends

    async def new_record(self, name: str, owner: str, labels: Mapping[str, str], size_bytes: int) -> Volume:
        """The record of a new volume, still without its backing. Raises VolumeExists, VolumeRecordLost."""
        if await self.volumes.view(name) is not None:
            raise VolumeExists(volume=name)
        # Its files would be mistaken for those of the new volume.
        if engine_volume := await self._engine_volume_without_record(name):
            raise VolumeRecordLost(volume=name, engine_volume=engine_volume)
        moment = now()
        return Volume(
            name=name,
            uid=str(uuid.uuid4()),
            node=self.volumes.node,
            owner=owner,
            generation=1,
            revision=0,
            state=VolumeState.CREATING,
            size_bytes=size_bytes,
            reserved_bytes=size_bytes,
            labels=dict(labels),
            create_time=moment,
            update_time=moment,
        )

    async def _engine_volume_without_record(self, name: str) -> str:
        """An engine volume with the files of a volume of this name that has no record; empty if there is none."""
        node = self.volumes.node
        labelled = await self.engine.find_volumes({LABEL_NAME: name, LABEL_NODE: node})
        if labelled:
            return labelled[0].name
        for view in await containers_mounting(self.store, name):
            container = view.container
            if container.node == node and container.engine is not None:
                engine_container = await self.engine.inspect(container.engine.engine_id)
                if engine_container is not None and (
                    mounted := mounted_engine_volumes(engine_container, container.spec.mounts).get(name)
                ):
                    return mounted
        return ""


@dataclass(frozen=True, slots=True)
class CreateVolume(NewVolumes):
    """Drafts the creation of a volume."""

    async def draft(self, command: Create) -> OperationDraft:
        """Check that the volume can be created, and choose its backend. Changes nothing."""
        volume = await self.new_record(command.name, command.owner, command.labels, command.size_bytes)
        backend = await self.backends.for_new_volume(command.name, command.size_bytes, command.backend)
        await self.backends.require_space(backend.kind, volume.uid, command.size_bytes)
        arguments = CreateArguments(kind=backend.kind, size_bytes=command.size_bytes)
        return OperationDraft(
            kind=OperationKind.CREATE_VOLUME,
            target=volume.target,
            target_record=PutVolume(volume, expect=0),
            arguments=arguments.model_dump(mode="json"),
            plan=OperationPlan(),
            build=partial(CreateSaga, self),
        )


class NewVolumeSaga(Saga[VolumeView]):
    """The steps that create a volume's backing and the engine volume that points to it."""

    def __init__(self, new: NewVolumes, kind: VolumeBackendKind, size_bytes: int) -> None:
        super().__init__(new.volumes)
        self._new = new
        self._kind = kind
        self._size_bytes = size_bytes

    @property
    def _creation_steps(self) -> tuple[Step, ...]:
        return (
            Step(BACKING.step, self._create_backing, self._destroy),
            Step(ENGINE_VOLUME.step, self._create_engine_volume, self._remove_engine_volume),
        )

    async def _create_backing(self, run: OperationRun) -> VolumeBacking:
        target = run.operation.target
        await self._new.backends.require_space(self._kind, target.uid, self._size_bytes)
        identity = await self._identity(run)
        backend = self._new.backends.of_kind(self._kind)
        return await backend.create(target.uid, target.name, self._size_bytes, identity)

    async def _destroy(self, run: OperationRun) -> None:
        await self._new.backends.of_kind(self._kind).destroy(self._backing(run.operation))

    def _backing(self, operation: Operation) -> VolumeBacking:
        """The backing as created; before its result is recorded, only its uid and name, by which it can be found."""
        target = operation.target
        if (backing := BACKING.find(operation)) is not None:
            return backing
        return VolumeBacking(kind=self._kind, uid=target.uid, name=target.name, engine_volume="")

    async def _create_engine_volume(self, run: OperationRun) -> CreatedEngineVolume:
        backing = self._backing(run.operation)
        created = await self._new.engine_volumes.create(backing, await self._identity(run))
        return CreatedEngineVolume(mountpoint=created.mountpoint)

    async def _identity(self, run: OperationRun) -> VolumeIdentity | None:
        view = await self.read_target(run)
        return view.volume.identity if view is not None else None

    async def _remove_engine_volume(self, run: OperationRun) -> None:
        if (backing := BACKING.find(run.operation)) is not None:
            await self._new.engine.remove_volume(backing.engine_volume)

    def _with_backing(self, run: OperationRun, volume: Volume) -> Volume:
        """The volume with its new backing and mountpoint."""
        mountpoint = ENGINE_VOLUME.of(run.operation).mountpoint
        backing = self._backing(run.operation)
        if not backing.folder:
            # The engine chose the folder of this backing.
            backing = backing.model_copy(update={"folder": mountpoint})
        return volume.changed(backing=backing, mountpoint=mountpoint)

    def _outcome(self, run: OperationRun, view: VolumeView, finished: Volume, cause: VolumeCause) -> Outcome:
        volume = finished.changed(state=VolumeState.READY, revision=1, update_time=now())
        changes: list[StoreChange] = [
            PutVolume(volume, expect=view.version),
            revision_of(volume, cause, run.operation.id),
        ]
        return Outcome(changes, volume)

    @override
    async def failure_changes(self, run: OperationRun, view: VolumeView) -> Sequence[StoreChange]:
        return [DeleteVolume(view.volume.name, view.volume.uid, expect=view.version)]


class CreateSaga(NewVolumeSaga):
    """backing -> engine volume | the record and its first revision."""

    def __init__(self, new: NewVolumes, operation: Operation) -> None:
        """Read the arguments from the operation's record."""
        arguments = CreateArguments.model_validate(operation.arguments)
        super().__init__(new, arguments.kind, arguments.size_bytes)

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        return self._creation_steps

    @override
    async def success_changes(self, run: OperationRun, view: VolumeView) -> Outcome:
        return self._outcome(run, view, self._with_backing(run, view.volume), VolumeCause.CREATED)
