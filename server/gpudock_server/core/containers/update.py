"""UpdateContainer: change fields of a container's spec, in place if possible."""

from __future__ import annotations

from dataclasses import dataclass

from gpudock_server.core.containers.change_draft import ChangeDrafter
from gpudock_server.core.containers.change_plan import DesiredState, SuccessorFiles, SuccessorSource
from gpudock_server.core.containers.commands import FieldChange, FilesPolicy, PullPolicy, Update
from gpudock_server.core.containers.history import History
from gpudock_server.core.containers.images import ImageChoice, Images
from gpudock_server.core.containers.resource import UNPAUSED_STATES, ContainerResource, require_state
from gpudock_server.core.operations.saga import OperationDraft
from gpudock_server.errors import ImageDiffers, VolumeMountedByRunning
from gpudock_server.model.container import RUNNING_STATES, STOPPED_STATES, Container
from gpudock_server.model.operation import OperationKind
from gpudock_server.model.resource import ResourceRef
from gpudock_server.model.spec import ContainerSpec


@dataclass(frozen=True, slots=True)
class UpdateContainer:
    """Drafts an update, and decides where the files come from."""

    containers: ContainerResource
    history: History
    images: Images
    changes: ChangeDrafter

    async def draft(self, command: Update) -> OperationDraft:
        """Draft the change of a container's spec."""
        view = await self.containers.find_unlocked(command.name, command.etag)
        container = view.container
        await self.history.refuse_if_gone(container)
        require_state(container, UNPAUSED_STATES, "to update it, it must be RUNNING, STOPPED or EXITED")
        spec = command.change.apply(container.spec)
        desired = DesiredState(
            OperationKind.UPDATE,
            spec,
            runs=container.status.state in RUNNING_STATES,
            snapshots=command.snapshots,
            source=await self._source(container, command, spec),
            registry_auth=command.registry_auth,
        )
        return await self.changes.draft(view, desired)

    async def _source(self, container: Container, command: Update, spec: ContainerSpec) -> SuccessorSource:
        """The current files if the image stays the same; for another image, what the command requests."""
        image = spec.image
        if "image" not in command.change.fields:
            return await self._current_files(container, spec)
        choice = await self._choice(image, command, container.owner)
        image_id = choice.image_id
        current = container.engine.user_image_id if container.engine else ""
        if image_id == current and command.files is not FilesPolicy.DISCARD:
            return await self._current_files(container, spec)
        pulled = SuccessorSource(
            image_id=image_id,
            present_id=choice.present_id,
            pull_stall_seconds=command.pull_stall_seconds,
            base_image_id=image_id,
        )
        match command.files:
            case FilesPolicy.DISCARD:
                await self.images.require_user(image_id, image, spec.user)
                return pulled.model_copy(update={"files": SuccessorFiles.FRESH})
            case FilesPolicy.CARRY_COMMIT:
                return pulled.model_copy(update={"files": SuccessorFiles.GRAFT})
            case _:
                raise ImageDiffers(container=container.name, image=image, image_id=image_id, current_image_id=current)

    async def _current_files(self, container: Container, spec: ContainerSpec) -> SuccessorSource:
        # An unchanged user is not checked: its name may have been removed from the files after the process started.
        if spec.user != container.spec.user:
            await self.images.require_user_in_files(container, spec.user)
        return SuccessorSource()

    async def _choice(self, image: str, command: Update, owner: str) -> ImageChoice:
        # Without a files policy another image is refused anyway, so it is not pulled.
        policy = PullPolicy.NEVER if command.files is None and command.pull_policy is PullPolicy.MISSING else None
        return await self.images.choose(image, policy or command.pull_policy, owner)

    async def draft_unmount(self, target: ResourceRef, volume: str) -> OperationDraft:
        """Draft the update of a stopped container to a spec without a volume. Raises VolumeMountedByRunning."""
        view = await self.containers.find_unlocked(target.name)
        if view.container.status.state not in STOPPED_STATES:
            raise VolumeMountedByRunning(volume=volume, holders=(target.name,))
        mounts = tuple(mount for mount in view.container.spec.mounts if mount.volume != volume)
        return await self.draft(Update(name=target.name, change=FieldChange("mounts", mounts)))
