"""CreateVolume: a store on the host, the engine's volume that leads to it, and only then a volume."""

import uuid
from collections.abc import Mapping, Sequence

from typing_extensions import override

from gpudock_server.core.containers.engine_volumes import engine_labels
from gpudock_server.core.containers.mounts import engine_volume_without_record
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Step, StepResult
from gpudock_server.core.volumes.commands import Create
from gpudock_server.core.volumes.saga import VolumeSaga, revision_of
from gpudock_server.core.volumes.storage import Storage
from gpudock_server.errors import SizeNotSupported, VolumeExists, VolumeRecordLost
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
from gpudock_server.ports import VolumeBackend, VolumeView


class CreatedEngineVolume(Record):
    """Where the engine mounts the volume that it was asked to create."""

    mountpoint: str


BACKING = StepResult("store", VolumeBacking)
ENGINE_VOLUME = StepResult("engine-volume", CreatedEngineVolume)


class CreateArguments(Record):
    """What the saga needs to be built again."""

    kind: VolumeBackendKind
    size_bytes: int


async def draft(storage: Storage, command: Create) -> OperationDraft:
    """Check that it can be made, and choose what of."""
    volume = await new_volume(storage, command.name, command.owner, command.labels, command.size_bytes)
    backend = await backend_for(storage, command.name, command.size_bytes, command.backend)
    await storage.require_pool_space(backend.kind, volume.uid, command.size_bytes)
    arguments = CreateArguments(kind=backend.kind, size_bytes=command.size_bytes)
    return OperationDraft(
        kind=OperationKind.CREATE_VOLUME,
        target=volume.target,
        target_record=PutVolume(volume, expect=0),
        arguments=arguments.model_dump(mode="json"),
        plan=OperationPlan(),
        build=lambda operation: CreateSaga(storage, operation),
    )


async def new_volume(storage: Storage, name: str, owner: str, labels: Mapping[str, str], size_bytes: int) -> Volume:
    """A head that is still to be given its backing. Raises VolumeExists."""
    if await storage.world.store.volume(name) is not None:
        raise VolumeExists(volume=name)
    # Its files would be taken for those of the new one.
    if engine_volume := await engine_volume_without_record(storage.world, name):
        raise VolumeRecordLost(volume=name, engine_volume=engine_volume)
    moment = now()
    return Volume(
        name=name,
        uid=str(uuid.uuid4()),
        node=storage.world.node,
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


async def backend_for(storage: Storage, name: str, size_bytes: int, asked: VolumeBackendKind | None) -> VolumeBackend:
    """The caller's backend, else the settings', else the best. Raises SizeNotSupported."""
    forced = asked or (storage.forced if size_bytes else None)
    return await choose_backend(storage.backends, name=name, size_bytes=size_bytes, forced=forced)


class NewVolumeSaga(VolumeSaga):
    """What makes a volume: a store, and the engine's volume that leads to it."""

    def __init__(self, storage: Storage, kind: VolumeBackendKind, size_bytes: int) -> None:
        super().__init__(storage)
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
        await self._storage.require_pool_space(self._kind, target.uid, self._size_bytes)
        identity = await self._identity(run)
        backend = self._storage.backend(self._kind)
        return await backend.create(target.uid, target.name, self._size_bytes, identity)

    async def _destroy(self, run: OperationRun) -> None:
        await self._storage.backend(self._kind).destroy(self._backing(run.operation))

    def _backing(self, operation: Operation) -> VolumeBacking:
        """What was made, as far as it is known: a store is found by its uid."""
        target = operation.target
        if (backing := BACKING.find(operation)) is not None:
            return backing
        return VolumeBacking(kind=self._kind, uid=target.uid, name=target.name, engine_volume="")

    async def _create_engine_volume(self, run: OperationRun) -> CreatedEngineVolume:
        backing = self._backing(run.operation)
        made = await self._world.engine.create_volume(
            backing.engine_volume,
            labels=engine_labels(self._world.node, backing, await self._identity(run)),
            driver_options=backing.driver_options,
        )
        return CreatedEngineVolume(mountpoint=made.mountpoint)

    async def _identity(self, run: OperationRun) -> VolumeIdentity | None:
        view = await self.read_target(run)
        return view.volume.identity if view is not None else None

    async def _remove_engine_volume(self, run: OperationRun) -> None:
        if (backing := BACKING.find(run.operation)) is not None:
            await self._world.engine.remove_volume(backing.engine_volume)

    def _with_backing(self, run: OperationRun, volume: Volume) -> Volume:
        """The volume with what was made for it."""
        mountpoint = ENGINE_VOLUME.of(run.operation).mountpoint
        backing = self._backing(run.operation)
        if not backing.folder:
            # The engine keeps it where it likes.
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
    """Store -> engine volume, then the head and its first revision."""

    def __init__(self, storage: Storage, operation: Operation) -> None:
        """Builds the script from the operation's arguments."""
        arguments = CreateArguments.model_validate(operation.arguments)
        super().__init__(storage, arguments.kind, arguments.size_bytes)

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        return self._creation_steps

    @override
    async def success_changes(self, run: OperationRun, view: VolumeView) -> Outcome:
        return self._outcome(run, view, self._with_backing(run, view.volume), VolumeCause.CREATED)


async def choose_backend(
    backends: Sequence[VolumeBackend], *, name: str, size_bytes: int, forced: VolumeBackendKind | None = None
) -> VolumeBackend:
    """The forced backend, else the first of `backends` (the best first) that this host has and that fits the size.

    A volume without a size is PLAIN, and only such a one is. Raises SizeNotSupported with what each backend lacks.
    """
    lacking = []
    for backend in backends:
        reason = await _unfit_reason(backend, sized=size_bytes > 0)
        if not reason and forced in (None, backend.kind):
            return backend
        lacking.append(f"{backend.kind}: {reason or 'can, but another one was asked for'}")
    raise SizeNotSupported(volume=name, size_bytes=size_bytes, detail="; ".join(lacking))


async def _unfit_reason(backend: VolumeBackend, *, sized: bool) -> str:
    match backend.kind is VolumeBackendKind.PLAIN, sized:
        case True, True:
            return "has no size"
        case False, False:
            return "needs a size"
        case _:
            return await backend.unavailable_reason()
