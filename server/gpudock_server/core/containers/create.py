"""CreateContainer: claim, pull where needed, create, start, and only then be a container."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from gpudock_server.core.containers.commands import Create
from gpudock_server.core.containers.engine_containers import EngineContainers
from gpudock_server.core.containers.history import revision_of
from gpudock_server.core.containers.images import PULLED, Images, Pull, PulledImage
from gpudock_server.core.containers.ledger import write_ledger_entry
from gpudock_server.core.containers.limits import check_limits
from gpudock_server.core.containers.mounts import Mounts, require_unchanged
from gpudock_server.core.containers.resource import ContainerResource
from gpudock_server.core.containers.saga import ContainerSaga
from gpudock_server.core.containers.status import observed_status, status_after_start
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Step, StepResult
from gpudock_server.core.placement.allocator import AllocationRequest, Allocator
from gpudock_server.core.placement.claims import HostClaims
from gpudock_server.errors import ImageNotFound
from gpudock_server.model.claims import claim_keys
from gpudock_server.model.container import (
    Container,
    ContainerState,
    ContainerStatus,
    EngineBinding,
    Placement,
    RevisionCause,
)
from gpudock_server.model.engine import (
    LABEL_NAME,
    LABEL_NODE,
    LABEL_OPERATION,
    LABEL_OWNER,
    LABEL_REVISION,
    LABEL_UID,
    EngineContainerSpec,
    NodeLimits,
    RegistryAuth,
)
from gpudock_server.model.names import engine_container_name
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.record import Record, now
from gpudock_server.model.spec import ContainerSpec
from gpudock_server.model.store_changes import (
    DeleteContainer,
    PutContainer,
    PutRevision,
    StoreChange,
)
from gpudock_server.ports import ContainerView, Engine, RevisionBackupStore


class CreatedEngineContainer(Record):
    """The engine container that an operation created, its name, and the image that it was created from."""

    engine_id: str
    engine_name: str
    image_id: str


class WatchedStart(Record):
    """How a process ended that was watched after its start; None: it runs."""

    exit_code: int | None = None


CREATED = StepResult("create", CreatedEngineContainer)
VERIFIED = StepResult("verify", WatchedStart)


class CreateArguments(Record):
    """What the saga needs to be built again.

    `image_id` is empty where the image has to be pulled first; `authenticated`: with credentials, which are not
    recorded. `present_id` is the image that has the name until then. `verify`: the process is watched for a while
    (`start_watch_seconds`) before the start is reported.
    """

    spec: ContainerSpec
    placement: Placement
    image_id: str
    start: bool
    verify: bool = False
    owner: str = ""
    authenticated: bool = False
    present_id: str = ""
    pull_stall_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class CreateContainer:
    """Checks that a container can be made, and picks what it is given."""

    containers: ContainerResource
    engine: Engine
    engine_containers: EngineContainers
    mounts: Mounts
    images: Images
    allocator: Allocator
    claims: HostClaims
    ledger: RevisionBackupStore
    limits: NodeLimits

    async def draft(self, command: Create) -> OperationDraft:
        """Check that it can be made, and pick what it would be given."""
        await self.containers.require_free_name(command.name)
        check_limits(self.limits, command.spec)
        volumes = await self.mounts.check(command.spec.mounts)
        choice = await self.images.choose(command.spec.image, command.pull_policy, command.owner)
        await self.images.require_user(choice.image_id, command.spec.image, command.spec.user)
        uid = str(uuid.uuid4())
        allocation = await self.allocator.allocate(
            AllocationRequest(uid=uid, gpus=command.spec.gpus, ports=command.spec.ports)
        )
        moment = now()
        container = Container(
            name=command.name,
            uid=uid,
            node=self.containers.node,
            owner=command.owner,
            generation=1,
            revision=0,
            spec=command.spec,
            status=ContainerStatus(state=ContainerState.CREATING, placement=allocation.placement, holds_resources=True),
            create_time=moment,
            update_time=moment,
        )
        arguments = CreateArguments(
            spec=command.spec,
            placement=allocation.placement,
            image_id=choice.image_id,
            start=not command.create_only,
            verify=not command.create_only and self.engine_containers.watches_starts,
            owner=command.owner,
            authenticated=command.registry_auth is not None,
            present_id=choice.present_id,
            pull_stall_seconds=command.pull_stall_seconds,
        )
        return OperationDraft(
            kind=OperationKind.CREATE,
            target=container.target,
            target_record=PutContainer(container, expect=0),
            arguments=arguments.model_dump(mode="json"),
            plan=OperationPlan(
                placement=allocation.placement,
                claimed_gpu_uuids=allocation.placement.gpu_uuids,
                claimed_ports=allocation.placement.ports,
            ),
            claims=self.claims.claim(container, allocation.to_claim),
            conditions=require_unchanged(volumes),
            build=lambda operation: CreateSaga(self, operation, command.registry_auth),
        )

    def saga(self, operation: Operation) -> CreateSaga:
        """The saga of a recorded operation."""
        return CreateSaga(self, operation)


def exit_code_of_start(operation: Operation) -> int | None:
    """With what the process that an operation started has ended since; None if it has not."""
    watched = VERIFIED.find(operation)
    return watched.exit_code if watched else None


def engine_container_labels(operation: Operation, revision: int, owner: str = "") -> dict[str, str]:
    """What marks an engine container as ours, made by `operation`; and, with its spec, what makes up its record."""
    return {
        LABEL_UID: operation.target.uid,
        LABEL_NAME: operation.target.name,
        LABEL_NODE: operation.node,
        LABEL_REVISION: str(revision),
        LABEL_OPERATION: operation.id,
        LABEL_OWNER: owner,
    }


class CreateSaga(ContainerSaga):
    """pull -> create -> start -> verify, then the head and its first revision."""

    def __init__(
        self, create: CreateContainer, operation: Operation, registry_auth: RegistryAuth | None = None
    ) -> None:
        """`registry_auth` is not recorded: a daemon that resumes a pull does so without it."""
        super().__init__(create.containers)
        self._create = create
        self._auth = registry_auth
        self._arguments = CreateArguments.model_validate(operation.arguments)
        self._spec = self._arguments.spec

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        steps = [Step(CREATED.step, self._create_engine_container, self._remove)]
        if not self._arguments.image_id:
            steps.insert(0, Step(PULLED.step, self._pull, self._restrict_image, interruptible=True))
        if self._arguments.start:
            steps.append(Step("start", self._start))
        if self._arguments.verify:
            steps.append(Step(VERIFIED.step, self._verify))
        return tuple(steps)

    @property
    def _image_pull(self) -> Pull:
        return Pull(
            self._spec.image,
            self._arguments.owner,
            self._auth,
            authenticated=self._arguments.authenticated,
            present_id=self._arguments.present_id,
            stall_seconds=self._arguments.pull_stall_seconds,
        )

    async def _pull(self, run: OperationRun) -> PulledImage:
        return PulledImage(image_id=(await self._create.images.pull(run, self._image_pull)).id)

    async def _restrict_image(self, _run: OperationRun) -> None:
        await self._create.images.restrict_after_failed_pull(self._image_pull)

    async def _create_engine_container(self, run: OperationRun) -> CreatedEngineContainer:
        operation = run.operation
        image_id = self._arguments.image_id or await self._pulled_image(operation)
        name = engine_container_name(operation.target.name, operation.id)
        engine_id = await self._create.engine_containers.create(
            EngineContainerSpec(
                name=name,
                image_id=image_id,
                spec=self._spec,
                placement=self._arguments.placement,
                hostname=self._spec.hostname or operation.target.name,
                labels=engine_container_labels(operation, 1, self._arguments.owner),
                mounted=await self._create.mounts.ensure_engine_volumes(self._spec.mounts),
            )
        )
        return CreatedEngineContainer(engine_id=engine_id, engine_name=name, image_id=image_id)

    async def _pulled_image(self, operation: Operation) -> str:
        if (pulled := PULLED.find(operation)) is not None:
            return pulled.image_id
        # An older daemon pulled it, and did not record what came.
        image = await self._create.engine.image(self._spec.image)
        if image is None:
            raise ImageNotFound(image=self._spec.image)
        return image.id

    async def _remove(self, run: OperationRun) -> None:
        await self._create.engine_containers.remove_created(run.operation)

    async def _start(self, run: OperationRun) -> None:
        await self._create.engine_containers.start(CREATED.of(run.operation).engine_id, self._spec)

    async def _verify(self, run: OperationRun) -> WatchedStart:
        """A process that ends at once is no failure; its exit code is for the status."""
        engine_id = CREATED.of(run.operation).engine_id
        starts = self._create.engine_containers
        code = await starts.wait_for_exit(engine_id, starts.start_watch_seconds)
        return WatchedStart(exit_code=code)

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        arguments = self._arguments
        created = CREATED.of(run.operation)
        seen = await self._create.engine.inspect(created.engine_id)
        binding = EngineBinding(
            engine_id=created.engine_id,
            engine_name=created.engine_name,
            image_id=created.image_id,
            placement=arguments.placement,
            fixed_digest=self._spec.fixed_digest,
            anonymous_volumes=anonymous_volumes(self._spec, seen.volumes if seen else {}),
        )
        container = view.container.changed(engine=binding, revision=1, update_time=now())
        if arguments.start:
            status = status_after_start(container, seen, exit_code_of_start(run.operation))
        else:
            status = observed_status(container, seen)
        container = container.changed(status=status)
        revision = revision_of(container, RevisionCause.CREATED, run.operation.id)
        await write_ledger_entry(self._create.ledger, container, revision)
        changes: list[StoreChange] = [
            PutContainer(container, expect=view.version),
            PutRevision(revision),
            *self._create.claims.confirm(container, claim_keys(arguments.placement)),
        ]
        return Outcome(changes, container)

    @override
    async def failure_changes(self, run: OperationRun, view: ContainerView) -> Sequence[StoreChange]:
        return [
            DeleteContainer(view.container.name, view.container.uid, expect=view.version),
            *self._create.claims.release(view.container.uid, claim_keys(self._arguments.placement)),
        ]


def anonymous_volumes(spec: ContainerSpec, volumes: dict[str, str]) -> dict[str, str]:
    """Of the engine volumes mounted in a container, those that its image asked for and its spec did not."""
    named = {mount.target for mount in spec.mounts}
    return {target: name for target, name in volumes.items() if target not in named}
