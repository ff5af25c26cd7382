"""AdoptVolume: give an existing engine volume a record, as it is or copied into a new volume with a size."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from functools import partial

from typing_extensions import override

from gpudock_server.core.listings import all_containers, all_volumes
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Step
from gpudock_server.core.volumes.adoption_rules import AdoptionRules
from gpudock_server.core.volumes.commands import Adopt
from gpudock_server.core.volumes.create import NewVolumes, NewVolumeSaga
from gpudock_server.core.volumes.saga import copy_and_verify
from gpudock_server.errors import (
    AdoptionForbidden,
    EngineVolumeInUse,
    EngineVolumeNotFound,
    SizeNotSupported,
    VolumeExists,
    VolumeFailed,
)
from gpudock_server.model.engine import LABEL_UID, EngineVolume
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.record import Record
from gpudock_server.model.store_changes import PutVolume
from gpudock_server.model.volume import VolumeBackendKind, VolumeBacking, VolumeCause
from gpudock_server.ports import VolumeCopier, VolumeView
from gpudock_server.sizes import size_text


class AdoptArguments(Record):
    """The saga's arguments. `source` is the engine volume; for PLAIN, it also becomes the volume's backing."""

    kind: VolumeBackendKind
    size_bytes: int
    source: VolumeBacking


@dataclass(frozen=True, slots=True)
class AdoptVolume(NewVolumes):
    """Drafts the adoption of an engine volume."""

    copier: VolumeCopier
    adoption: AdoptionRules

    async def draft(self, command: Adopt) -> OperationDraft:
        """Check that the engine volume exists, may be adopted and is unused; for a copy, that its files fit."""
        volume = await self.new_record(command.name, command.owner, command.labels, command.size_bytes)
        engine_volume = await self._find_adoptable(command)
        backend = await self.backends.for_new_volume(command.name, command.size_bytes, command.backend)
        plan = OperationPlan()
        # The source of a copy gets its own uid; a source that becomes the backing has the uid of the volume.
        plain = backend.kind is VolumeBackendKind.PLAIN
        source = VolumeBacking(
            kind=VolumeBackendKind.PLAIN,
            uid=volume.uid if plain else str(uuid.uuid4()),
            name=command.name,
            engine_volume=command.engine_volume,
            folder=engine_volume.mountpoint,
        )
        await self.require_unused(command.name, engine_volume.name)
        if not plain:
            plan = await self._plan_copy(command, engine_volume, source)
            await self.backends.require_space(backend.kind, volume.uid, command.size_bytes)
        arguments = AdoptArguments(kind=backend.kind, size_bytes=command.size_bytes, source=source)
        return OperationDraft(
            kind=OperationKind.ADOPT_VOLUME,
            target=volume.target,
            target_record=PutVolume(volume, expect=0),
            arguments=arguments.model_dump(mode="json"),
            plan=plan,
            build=partial(AdoptSaga, self),
        )

    async def _find_adoptable(self, command: Adopt) -> EngineVolume:
        """The engine volume to adopt.

        Raises VolumeExists, EngineVolumeNotFound, AdoptionForbidden.
        """
        name = command.engine_volume
        found = await self.engine.inspect_volume(name)
        if found is not None:
            owners = [
                volume.name
                for volume in await all_volumes(self.store)
                if volume.node == self.volumes.node and volume.backing and volume.backing.engine_volume == name
            ]
            # A labelled engine volume without a record may belong to another installation.
            if owners or LABEL_UID in found.labels:
                raise VolumeExists(volume=owners[0] if owners else name)
        # The same error for both cases, so that callers cannot probe which engine volumes exist.
        if found is None or not self.adoption.allow(found):
            raise EngineVolumeNotFound(volume=name, available=())
        if found.anonymous:
            detail = "an anonymous volume belongs to one container"
            raise AdoptionForbidden(volume=command.name, engine_volume=name, detail=detail)
        if found.hazard:
            detail = f"{found.hazard}; mount it as a host path below allowed_host_paths"
            raise AdoptionForbidden(volume=command.name, engine_volume=name, detail=detail)
        return found

    async def require_unused(self, name: str, engine_volume: str) -> None:
        """Raise EngineVolumeInUse if a container outside this installation mounts it, running or not."""
        users = await self.engine.mounting(engine_volume)
        uids = {view.container.uid for view in await all_containers(self.store)} if users else set()
        others = tuple(
            user.name for user in users if user.labels.get(LABEL_UID) not in uids or user.name != user.created_name
        )
        if others:
            raise EngineVolumeInUse(volume=name, engine_volume=engine_volume, holders=others)

    async def _plan_copy(self, command: Adopt, found: EngineVolume, source: VolumeBacking) -> OperationPlan:
        if found.driver != "local" or found.options:
            detail = (
                f"engine volume {found.name} has a driver or options, so its files cannot be copied;"
                " adopt it without a size"
            )
            raise VolumeFailed(volume=command.name, call="copy", detail=detail)
        await self.require_not_running(command.name, found.name)
        usage = await self.backends.of_kind(source.kind).usage(source)
        if usage.used_bytes > command.size_bytes:
            detail = f"engine volume {found.name} has {size_text(usage.used_bytes)} of files"
            raise SizeNotSupported(volume=command.name, size_bytes=command.size_bytes, detail=detail)
        pool = await self.backends.pool_usage()
        return OperationPlan(bytes_to_move=usage.used_bytes, bytes_available=pool.free_bytes if pool else 0)

    async def require_not_running(self, name: str, engine_volume: str) -> None:
        """Raise EngineVolumeInUse if a running container mounts it."""
        users = await self.engine.mounting(engine_volume)
        if running := tuple(user.name for user in users if user.running):
            raise EngineVolumeInUse(volume=name, engine_volume=engine_volume, holders=running)


class AdoptSaga(NewVolumeSaga):
    """For PLAIN, write the record only. Else backing -> engine volume -> copy -> verify | record."""

    def __init__(self, adopt: AdoptVolume, operation: Operation) -> None:
        """Read the arguments from the operation's record."""
        self._adopt = adopt
        self._arguments = AdoptArguments.model_validate(operation.arguments)
        super().__init__(adopt, self._arguments.kind, self._arguments.size_bytes)

    @property
    def _copies(self) -> bool:
        return self._arguments.kind is not VolumeBackendKind.PLAIN

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        return (*self._creation_steps, Step("copy", self._copy, interruptible=True)) if self._copies else ()

    async def _copy(self, run: OperationRun) -> None:
        source = self._arguments.source
        await self._adopt.require_unused(source.name, source.engine_volume)
        await self._adopt.require_not_running(source.name, source.engine_volume)
        await copy_and_verify(self._adopt.copier, source, self._backing(run.operation), run.progress)

    @override
    async def success_changes(self, run: OperationRun, view: VolumeView) -> Outcome:
        source = self._arguments.source
        finished = (
            self._with_backing(run, view.volume)
            if self._copies
            else view.volume.changed(backing=source, mountpoint=source.folder)
        )
        return self._outcome(run, view, finished, VolumeCause.ADOPTED)
