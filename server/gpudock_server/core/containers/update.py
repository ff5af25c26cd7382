"""UpdateContainer: other fields of the spec, in place where that can be."""

from __future__ import annotations

from gpudock_server.core.containers.change_plan import DesiredState, draft_change
from gpudock_server.core.containers.change_saga import SuccessorFiles, SuccessorSource
from gpudock_server.core.containers.commands import FilesPolicy, PullPolicy, Update
from gpudock_server.core.containers.history import refuse_if_gone
from gpudock_server.core.containers.images import ImageChoice, choose_image, require_user, require_user_in_files
from gpudock_server.core.containers.world import World
from gpudock_server.core.operations.saga import OperationDraft
from gpudock_server.errors import ContainerNotRunning, ContainerPaused, ImageDiffers
from gpudock_server.model.container import RUNNING_STATES, STOPPED_STATES, Container, ContainerState
from gpudock_server.model.operation import OperationKind
from gpudock_server.model.spec import ContainerSpec


async def draft_update(world: World, command: Update) -> OperationDraft:
    """The same container, with another spec."""
    view = await world.lookup(command.name, command.etag)
    container, state = view.container, view.container.status.state
    await refuse_if_gone(world, container)
    if state is ContainerState.PAUSED:
        raise ContainerPaused(container=command.name)
    if state not in RUNNING_STATES and state not in STOPPED_STATES:
        needs = "to change it, it must be RUNNING, STOPPED or EXITED"
        raise ContainerNotRunning(container=command.name, state=state.value, needs=needs)
    spec = command.change.apply(container.spec)
    desired = DesiredState(
        OperationKind.UPDATE,
        spec,
        runs=state in RUNNING_STATES,
        snapshots=command.snapshots,
        source=await _source(world, container, command, spec),
        registry_auth=command.registry_auth,
    )
    return await draft_change(world, view, desired)


async def _source(world: World, container: Container, command: Update, spec: ContainerSpec) -> SuccessorSource:
    """The files of today on the image they were written on; on another one, what the caller says."""
    image = spec.image
    if "image" not in command.change.fields:
        return await _files_of_now(world, container, spec)
    choice = await _choice(world, image, command, container.owner)
    image_id = choice.image_id
    current = container.engine.user_image_id if container.engine else ""
    if image_id == current and command.files is not FilesPolicy.DISCARD:
        return await _files_of_now(world, container, spec)
    pulled = SuccessorSource(
        image_id=image_id,
        present_id=choice.present_id,
        pull_stall_seconds=command.pull_stall_seconds,
        base_image_id=image_id,
    )
    match command.files:
        case FilesPolicy.DISCARD:
            await require_user(world, image_id, image, spec.user)
            return pulled.model_copy(update={"files": SuccessorFiles.FRESH})
        case FilesPolicy.CARRY_COMMIT:
            return pulled.model_copy(update={"files": SuccessorFiles.GRAFT})
        case _:
            raise ImageDiffers(container=container.name, image=image, image_id=image_id, current_image_id=current)


async def _files_of_now(world: World, container: Container, spec: ContainerSpec) -> SuccessorSource:
    # A user that it has already is not looked for: the process may have been started before its name was removed.
    if spec.user != container.spec.user:
        await require_user_in_files(world, container, spec.user)
    return SuccessorSource()


async def _choice(world: World, image: str, command: Update, owner: str) -> ImageChoice:
    # Without a word on its files it is refused in any case, and not pulled for that.
    policy = PullPolicy.NEVER if command.files is None and command.pull_policy is PullPolicy.MISSING else None
    return await choose_image(world, image, policy or command.pull_policy, owner)
