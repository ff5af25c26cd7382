"""The checks, the record and the saga steps that CreateContainer and CloneContainer share."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from gpudock_server.core.containers.engine_containers import CREATED, CreatedEngineContainer, EngineContainers
from gpudock_server.core.containers.history import revision_of
from gpudock_server.core.containers.limits import check_limits
from gpudock_server.core.containers.mounts import Mounts
from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.core.containers.revision_backups import write_revision_backup
from gpudock_server.core.containers.status import observed_status, status_after_start
from gpudock_server.core.operations.saga import OperationRun, Outcome, Saga, Step, StepResult
from gpudock_server.core.placement.allocator import Allocation, AllocationRequest, Allocator
from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.model.claims import claim_keys
from gpudock_server.model.container import (
    Container,
    ContainerState,
    ContainerStatus,
    EngineBinding,
    Placement,
    RevisionCause,
)
from gpudock_server.model.engine import EngineContainer, NodeLimits
from gpudock_server.model.operation import Operation
from gpudock_server.model.record import Record, now
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.model.store_changes import DeleteContainer, PutContainer, PutRevision, StoreChange
from gpudock_server.ports import ContainerView, RevisionBackupStore, VolumeView


class WatchedStart(Record):
    """The exit code of a process that was watched after its start; None: it is running."""

    exit_code: int | None = None


VERIFIED = StepResult("verify", WatchedStart)


class NewContainerArguments(Record):
    """The arguments from which the saga of a new container is rebuilt.

    `verify`: watch the process for `start_watch_seconds` before its start is reported.
    """

    spec: ContainerSpec
    placement: Placement
    start: bool
    verify: bool = False
    owner: str = ""


@dataclass(frozen=True, slots=True)
class NewContainers:
    """The dependencies of the use cases that create containers, and the checks that these share."""

    containers: ContainerResource
    engine_containers: EngineContainers
    mounts: Mounts
    allocator: Allocator
    claims: HostClaims
    revision_backups: RevisionBackupStore
    limits: NodeLimits

    async def check(self, spec: ContainerSpec) -> tuple[VolumeView, ...]:
        """Check a spec; returns the volumes that it mounts. Raises LimitForbidden, and the errors of Mounts.check."""
        check_limits(self.limits, spec)
        return await self.mounts.check(spec.mounts)

    async def new_record(self, name: str, owner: str, spec: ContainerSpec) -> tuple[Container, Allocation]:
        """The record of a new container, still without its engine container, and its proposed GPUs and ports."""
        uid = str(uuid.uuid4())
        allocation = await self.allocator.allocate(AllocationRequest(uid=uid, gpus=spec.gpus, ports=spec.ports))
        moment = now()
        container = Container(
            name=name,
            uid=uid,
            node=self.containers.node,
            owner=owner,
            generation=1,
            revision=0,
            spec=spec,
            status=ContainerStatus(state=ContainerState.CREATING, placement=allocation.placement, holds_resources=True),
            create_time=moment,
            update_time=moment,
        )
        return container, allocation


class NewContainerSaga(Saga[ContainerView]):
    """The steps that create and start an engine container, and the record and first revision at the end."""

    def __init__(self, new: NewContainers, arguments: NewContainerArguments) -> None:
        super().__init__(new.containers)
        self._new = new
        self._new_arguments = arguments

    @property
    def _start_steps(self) -> tuple[Step, ...]:
        start = (Step("start", self._start),) if self._new_arguments.start else ()
        return (*start, Step(VERIFIED.step, self._verify)) if self._new_arguments.verify else start

    async def _create_from(self, run: OperationRun, image_id: str) -> CreatedEngineContainer:
        arguments = self._new_arguments
        return await self._new.engine_containers.create(
            run.operation,
            image_id=image_id,
            spec=arguments.spec,
            placement=arguments.placement,
            revision=1,
            owner=arguments.owner,
            mounted=await self._new.mounts.ensure_engine_volumes(arguments.spec.mounts),
        )

    async def _remove(self, run: OperationRun) -> None:
        await self._new.engine_containers.remove_created(run.operation)

    async def _start(self, run: OperationRun) -> None:
        await self._new.engine_containers.start(CREATED.of(run.operation).engine_id, self._new_arguments.spec)

    async def _verify(self, run: OperationRun) -> WatchedStart:
        """Watch the process for a while. Its exit is no failure; the exit code is recorded in the status."""
        starts, engine_id = self._new.engine_containers, CREATED.of(run.operation).engine_id
        return WatchedStart(exit_code=await starts.wait_for_exit(engine_id, starts.start_watch_seconds))

    async def _outcome(
        self,
        run: OperationRun,
        view: ContainerView,
        binding: EngineBinding,
        engine_container: EngineContainer | None,
        cause: RevisionCause,
    ) -> Outcome:
        """The record of the container with its engine container, its first revision, and its claims."""
        container = view.container.changed(engine=binding, revision=1, update_time=now())
        status = status_at_commit(container, engine_container, run.operation, started=self._new_arguments.start)
        container = container.changed(status=status)
        revision = revision_of(container, cause, run.operation.id)
        await write_revision_backup(self._new.revision_backups, container, revision)
        changes: list[StoreChange] = [
            PutContainer(container, expect=view.version),
            PutRevision(revision),
            *self._new.claims.confirm(container, claim_keys(self._new_arguments.placement)),
        ]
        return Outcome(changes, container)

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        return [
            DeleteContainer(view.container.name, view.container.uid, expect=view.version),
            *self._new.claims.release(view.container.uid, claim_keys(self._new_arguments.placement)),
        ]


def status_at_commit(
    container: Container, engine_container: EngineContainer | None, operation: Operation, *, started: bool
) -> ContainerStatus:
    """The status of a container at the commit of an operation, which has `started` its process or not."""
    if not started:
        return observed_status(container, engine_container)
    watched = VERIFIED.find(operation)
    return status_after_start(container, engine_container, watched.exit_code if watched else None)


def anonymous_volumes(spec: ContainerSpec, volumes: dict[str, str]) -> dict[str, str]:
    """The engine volumes mounted in a container because of its image and not because of its spec."""
    named = {mount.target for mount in spec.mounts}
    return {target: name for target, name in volumes.items() if target not in named}
