"""CreateContainer: claim GPUs and ports, pull the image if needed, create and start, then write the record."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from gpudock_server.core.containers.commands import Create
from gpudock_server.core.containers.engine_containers import CREATED, CreatedEngineContainer
from gpudock_server.core.containers.images import PULLED, Images, Pull
from gpudock_server.core.containers.mounts import require_unchanged
from gpudock_server.core.containers.new_container import (
    NewContainerArguments,
    NewContainers,
    NewContainerSaga,
    anonymous_volumes,
)
from gpudock_server.core.operations.saga import OperationDraft, OperationRun, Outcome, Step
from gpudock_server.errors import ImageNotFound
from gpudock_server.model.container import EngineBinding, RevisionCause
from gpudock_server.model.engine import RegistryAuth
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.store_changes import PutContainer
from gpudock_server.ports import ContainerView, Engine


class CreateArguments(NewContainerArguments):
    """The arguments from which the saga is rebuilt.

    `image_id`: empty if the image is pulled first. `authenticated`: the pull has credentials, which are not recorded.
    `present_id`: the image that has the name before the pull.
    """

    image_id: str
    authenticated: bool = False
    present_id: str = ""
    pull_stall_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class CreateContainer:
    """Drafts the creation of a container from an image."""

    new: NewContainers
    engine: Engine
    images: Images

    async def draft(self, command: Create) -> OperationDraft:
        """Check the command, choose the image, and allocate GPUs and ports. Changes nothing."""
        await self.new.containers.require_free_name(command.name)
        volumes = await self.new.check(command.spec)
        choice = await self.images.choose(command.spec.image, command.pull_policy, command.owner)
        await self.images.require_user(choice.image_id, command.spec.image, command.spec.user)
        container, allocation = await self.new.new_record(command.name, command.owner, command.spec)
        arguments = CreateArguments(
            spec=command.spec,
            placement=allocation.placement,
            image_id=choice.image_id,
            start=not command.create_only,
            verify=not command.create_only and self.new.engine_containers.watches_starts,
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
            claims=self.new.claims.claim(container, allocation.to_claim),
            conditions=require_unchanged(volumes),
            build=lambda operation: CreateSaga(self, operation, command.registry_auth),
        )


class CreateSaga(NewContainerSaga):
    """pull -> create -> start -> verify | the record and its first revision."""

    def __init__(
        self, create: CreateContainer, operation: Operation, registry_auth: RegistryAuth | None = None
    ) -> None:
        """`registry_auth` is not recorded: a resumed pull is made without credentials."""
        self._arguments = CreateArguments.model_validate(operation.arguments)
        super().__init__(create.new, self._arguments)
        self._engine = create.engine
        self._images = create.images
        self._auth = registry_auth
        self._spec = self._arguments.spec

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        pull = Pull(
            self._spec.image,
            self._arguments.owner,
            self._auth,
            authenticated=self._arguments.authenticated,
            present_id=self._arguments.present_id,
            stall_seconds=self._arguments.pull_stall_seconds,
        )
        create = Step(CREATED.step, self._create, self._remove)
        return (*(() if self._arguments.image_id else (self._images.pull_step(pull),)), create, *self._start_steps)

    async def _create(self, run: OperationRun) -> CreatedEngineContainer:
        return await self._create_from(run, self._arguments.image_id or await self._pulled_image(run.operation))

    async def _pulled_image(self, operation: Operation) -> str:
        if (pulled := PULLED.find(operation)) is not None:
            return pulled.image_id
        # An older version pulled the image and did not record its id.
        image = await self._engine.image(self._spec.image)
        if image is None:
            raise ImageNotFound(image=self._spec.image)
        return image.id

    @override
    async def success_changes(self, run: OperationRun, view: ContainerView) -> Outcome:
        created = CREATED.of(run.operation)
        engine_container = await self._engine.inspect(created.engine_id)
        binding = EngineBinding(
            engine_id=created.engine_id,
            engine_name=created.engine_name,
            image_id=created.image_id,
            placement=self._arguments.placement,
            fixed_digest=self._spec.fixed_digest,
            anonymous_volumes=anonymous_volumes(self._spec, engine_container.volumes if engine_container else {}),
        )
        return await self._outcome(run, view, binding, engine_container, RevisionCause.CREATED)
