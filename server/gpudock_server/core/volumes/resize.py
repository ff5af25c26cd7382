"""ResizeVolume: in place if possible, else by a copy into a smaller backing that replaces the old one.

A resize in place is one step that does not affect containers. If a filesystem cannot shrink:

    make -> copy -> stop containers -> copy the rest, verify -> exchange -> start | commit | remove the old backing

Most files are copied while containers write. The containers are locked from the beginning and stopped only for the last
difference. The exchange is one rename; the engine volume and the engine containers stay the same. The old backing stays
complete until the commit, and a failure or cancel exchanges it back.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from typing_extensions import override

from gpudock_server.core.listings import containers_mounting
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Saga, Step, StepResult
from gpudock_server.core.volumes.backends import VolumeBackends
from gpudock_server.core.volumes.commands import Resize
from gpudock_server.core.volumes.resource import VolumeResource
from gpudock_server.core.volumes.saga import backing_of, copy_and_verify, revision_of
from gpudock_server.errors import (
    ContainerPaused,
    DiskFull,
    StartFailed,
    VolumeFailed,
    VolumeInUse,
    VolumeTooSmallForData,
)
from gpudock_server.model.container import RUNNING_STATES, Container, ContainerState
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.record import Record, now
from gpudock_server.model.resource import ResourceRef
from gpudock_server.model.store_changes import PutContainer, PutVolume, StoreChange
from gpudock_server.model.volume import TreeSummary, Volume, VolumeBacking, VolumeCause, VolumeState, VolumeUsage
from gpudock_server.ports import ContainerView, Engine, ShrinkNeedsCopy, Store, VolumeCopier, VolumeView


class LocatedContent(Record):
    """The content of the old backing before the exchange, as its backend names it."""

    content: str


_MADE = StepResult("make", VolumeBacking)
_LOCATED = StepResult("locate", LocatedContent)


class ResizeMethod(StrEnum):
    """How a volume is resized."""

    NONE = "NONE"
    GROW = "GROW"
    SHRINK = "SHRINK"
    COPY = "COPY"


class MountingContainer(Record):
    """A container that mounts the volume, as it was when the operation began."""

    target: ResourceRef
    engine_id: str
    running: bool
    stop_seconds: float


class ResizeArguments(Record):
    """The arguments from which the saga is rebuilt. `copy_uid` is the uid of the new backing."""

    old: VolumeBacking
    size_bytes: int
    method: ResizeMethod
    copy_uid: str = ""
    users: tuple[MountingContainer, ...] = ()


class ContainerProcesses(Protocol):
    """What a resize needs of the containers that mount the volume."""

    @property
    def stop_seconds(self) -> float:
        """Seconds from stop signal to SIGKILL where the spec of the container sets none."""
        ...

    @property
    def settle_seconds(self) -> float:
        """Seconds that a process must run after its start to count as running."""
        ...

    async def start(self, engine_id: str, *, renew: bool) -> None:
        """Start an engine container; with `renew` False, keep its host paths bound as they are."""
        ...

    async def observe(self, container: Container, engine_id: str) -> Container:
        """The container with the status that the engine reports."""
        ...


@dataclass(frozen=True, slots=True)
class ResizeVolume:
    """Drafts the resize of a volume."""

    store: Store
    engine: Engine
    volumes: VolumeResource
    backends: VolumeBackends
    copier: VolumeCopier
    processes: ContainerProcesses

    async def draft(self, command: Resize) -> OperationDraft:
        """Check that the volume can have the size, and choose the method. Changes nothing."""
        view = await self.volumes.find_unlocked(command.name, command.etag)
        volume, size = view.volume, command.size_bytes
        if volume.state is not VolumeState.READY:
            raise VolumeFailed(volume=volume.name, call="resize", detail=f"it is {volume.state}; it must be READY")
        old = backing_of(volume)
        backend = self.backends.for_resize(old.kind, volume.name, size)
        arguments, plan = ResizeArguments(old=old, size_bytes=size, method=ResizeMethod.NONE), OperationPlan()
        if size > volume.size_bytes:
            await self.backends.require_space(old.kind, volume.uid, size)
            arguments = arguments.model_copy(update={"method": ResizeMethod.GROW})
        elif size < volume.size_bytes:
            usage = await backend.usage(old)
            _require_data_fits(volume, usage, size)
            arguments = arguments.model_copy(update={"method": ResizeMethod.SHRINK})
            if backend.needs_copy(old, size):
                arguments, plan = await self._plan_copy(volume, arguments, usage)
        reserved = volume.changed(reserved_bytes=max(size, volume.size_bytes))
        return OperationDraft(
            kind=OperationKind.RESIZE_VOLUME,
            target=volume.target,
            target_record=PutVolume(reserved, expect=view.version),
            arguments=arguments.model_dump(mode="json"),
            plan=plan,
            build=self.saga,
            locks=[user.target for user in arguments.users],
        )

    async def _plan_copy(
        self, volume: Volume, arguments: ResizeArguments, usage: VolumeUsage
    ) -> tuple[ResizeArguments, OperationPlan]:
        views = await containers_mounting(self.store, volume.name)
        users = [self._mounting_container(view) for view in views]
        known = {user.engine_id for user in users}
        mounting = await self.engine.mounting(arguments.old.engine_volume)
        if unknown := tuple(other.name for other in mounting if other.running and other.id not in known):
            raise VolumeInUse(volume=volume.name, holders=unknown)
        pool = await self.backends.of_kind(arguments.old.kind).pool()
        if pool.free_bytes < usage.minimum_bytes:
            raise DiskFull(path=self.backends.path, needed_bytes=usage.minimum_bytes, available_bytes=pool.free_bytes)
        arguments = arguments.model_copy(
            update={"method": ResizeMethod.COPY, "copy_uid": str(uuid.uuid4()), "users": tuple(users)}
        )
        plan = OperationPlan(
            bytes_to_move=usage.used_bytes,
            bytes_available=pool.free_bytes,
            restarts_process=any(user.running for user in users),
        )
        return arguments, plan

    def _mounting_container(self, view: ContainerView) -> MountingContainer:
        container = view.container
        if container.status.state is ContainerState.PAUSED:
            raise ContainerPaused(container=container.name)
        stop_timeout = container.spec.stop_timeout
        return MountingContainer(
            target=container.target,
            engine_id=container.engine.engine_id if container.engine else "",
            running=container.status.state in RUNNING_STATES,
            stop_seconds=self.processes.stop_seconds if stop_timeout is None else stop_timeout.total_seconds(),
        )

    def saga(self, operation: Operation) -> ResizeSaga:
        """The saga of a recorded operation: in place, or by a copy."""
        arguments = ResizeArguments.model_validate(operation.arguments)
        copies = arguments.method is ResizeMethod.COPY
        return CopyResizeSaga(self, arguments) if copies else InPlaceResizeSaga(self, arguments)


def _require_data_fits(volume: Volume, usage: VolumeUsage, size_bytes: int) -> None:
    if size_bytes < usage.minimum_bytes:
        raise VolumeTooSmallForData(
            volume=volume.name,
            requested_bytes=size_bytes,
            used_bytes=usage.used_bytes,
            minimum_bytes=usage.minimum_bytes,
        )


class ResizeSaga(Saga[VolumeView]):
    """The end of a resize, which both methods share."""

    def __init__(self, resize: ResizeVolume, arguments: ResizeArguments) -> None:
        super().__init__(resize.volumes)
        self._resize = resize
        self._arguments = arguments
        self._backend = resize.backends.of_kind(arguments.old.kind)

    @override
    async def success_changes(self, run: OperationRun, view: VolumeView) -> Outcome:
        arguments, volume = self._arguments, view.volume
        if arguments.method is ResizeMethod.NONE:
            return Outcome([PutVolume(volume, expect=view.version)], volume)
        resized = volume.changed(
            size_bytes=arguments.size_bytes,
            reserved_bytes=arguments.size_bytes,
            backing=arguments.old.model_copy(update={"size_bytes": arguments.size_bytes}),
            revision=volume.revision + 1,
            generation=volume.generation + 1,
            update_time=now(),
        )
        cause = VolumeCause.GROWN if arguments.method is ResizeMethod.GROW else VolumeCause.SHRUNK
        changes: list[StoreChange] = [
            PutVolume(resized, expect=view.version),
            revision_of(resized, cause, run.operation.id),
            *await self._refreshed_containers(),
        ]
        return Outcome(changes, resized)

    @override
    async def failure_changes(self, run: OperationRun, view: VolumeView) -> Sequence[StoreChange]:
        volume = view.volume.changed(reserved_bytes=view.volume.size_bytes)
        return [PutVolume(volume, expect=view.version), *await self._refreshed_containers()]

    async def _refreshed_containers(self) -> list[StoreChange]:
        """The containers with their current status, which reconcile did not update while they were locked."""
        changes: list[StoreChange] = []
        for user in self._arguments.users:
            view = await self._resize.store.container(user.target.name)
            if view is None or view.container.uid != user.target.uid or not user.engine_id:
                continue
            container = await self._resize.processes.observe(view.container, user.engine_id)
            changes.append(PutContainer(container.changed(update_time=now()), expect=view.version))
        return changes


class InPlaceResizeSaga(ResizeSaga):
    """One step of the backend. Not cancellable: it is short, and a filesystem that grew may not be able to shrink."""

    cancellable = False

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        match self._arguments.method:
            case ResizeMethod.GROW:
                return (Step("grow", self._grow),)
            case ResizeMethod.SHRINK:
                return (Step("shrink", self._shrink),)
            case _:
                return ()

    async def _grow(self, run: OperationRun) -> None:
        old, size = self._arguments.old, self._arguments.size_bytes
        await self._resize.backends.require_space(old.kind, run.operation.target.uid, size)
        await self._backend.grow(old, size)

    async def _shrink(self, _run: OperationRun) -> None:
        old = self._arguments.old
        try:
            await self._backend.shrink(old, self._arguments.size_bytes)
        except ShrinkNeedsCopy as reason:
            raise VolumeFailed(volume=old.name, call="shrink", detail=str(reason)) from reason


class CopyResizeSaga(ResizeSaga):
    """Resizes by a copy into a smaller backing; see the module's docstring."""

    def __init__(self, resize: ResizeVolume, arguments: ResizeArguments) -> None:
        super().__init__(resize, arguments)
        self._running = [user for user in arguments.users if user.running]

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        stop = [Step("stop", self._stop, self._start)] if self._running else []
        start = [Step("start", self._start, self._kill), Step("verify", self._verify)] if self._running else []
        return (
            Step(_MADE.step, self._make, self._remove),
            Step("copy", self._copy, interruptible=True),
            *stop,
            Step("difference", self._difference),
            Step(_LOCATED.step, self._locate),
            Step("exchange", self._exchange, self._exchange_back),
            *start,
        )

    @property
    @override
    def cleanup_steps(self) -> tuple[Step, ...]:
        return (Step("retire", self._remove),)

    @property
    def _new(self) -> VolumeBacking:
        """The identifiers by which the backend finds the new backing."""
        arguments = self._arguments
        return arguments.old.model_copy(
            update={
                "uid": arguments.copy_uid,
                "size_bytes": arguments.size_bytes,
                "engine_volume": f"gpudock-{arguments.copy_uid}",
            }
        )

    async def _make(self, _run: OperationRun) -> VolumeBacking:
        arguments = self._arguments
        await self._require_no_new_mounts()
        return await self._backend.replacement(arguments.old, arguments.copy_uid, arguments.size_bytes)

    async def _require_no_new_mounts(self) -> None:
        """Raise VolumeInUse if a container began to mount the volume after the draft listed its users."""
        known = {user.target for user in self._arguments.users}
        views = await containers_mounting(self._resize.store, self._arguments.old.name)
        if unknown := tuple(view.container.name for view in views if view.container.target not in known):
            raise VolumeInUse(volume=self._arguments.old.name, holders=unknown)

    async def _remove(self, _run: OperationRun) -> None:
        await self._backend.destroy(self._new)

    async def _copy(self, run: OperationRun) -> None:
        await self._resize.copier.copy(self._arguments.old, _MADE.of(run.operation), run.progress, final=False)

    async def _stop(self, _run: OperationRun) -> None:
        for user in self._running:
            await self._resize.engine.stop(user.engine_id, user.stop_seconds)

    async def _start(self, _run: OperationRun) -> None:
        for user in self._running:
            await self._resize.processes.start(user.engine_id, renew=False)

    async def _difference(self, run: OperationRun) -> TreeSummary:
        return await copy_and_verify(self._resize.copier, self._arguments.old, _MADE.of(run.operation), run.progress)

    async def _locate(self, _run: OperationRun) -> LocatedContent:
        return LocatedContent(content=await self._backend.content(self._arguments.old))

    async def _exchange(self, run: OperationRun) -> None:
        old, new = self._arguments.old, _MADE.of(run.operation)
        # The engine volume points to the folder of the old backing, so this folder gets the smaller content.
        await self._backend.exchange(
            new.model_copy(update={"size_bytes": old.size_bytes}),
            old.model_copy(update={"size_bytes": new.size_bytes}),
            _LOCATED.of(run.operation).content,
        )

    async def _exchange_back(self, run: OperationRun) -> None:
        if (located := _LOCATED.find(run.operation)) is not None:
            await self._backend.exchange(self._arguments.old, _MADE.of(run.operation), located.content)

    async def _kill(self, _run: OperationRun) -> None:
        for user in self._running:
            await self._resize.engine.stop(user.engine_id, 0)

    async def _verify(self, _run: OperationRun) -> None:
        for user in self._running:
            code = await self._resize.engine.exited_within(user.engine_id, self._resize.processes.settle_seconds)
            if code is not None:
                detail = f"its process exited with code {code} after the start with the smaller volume"
                raise StartFailed(container=user.target.name, detail=detail)
