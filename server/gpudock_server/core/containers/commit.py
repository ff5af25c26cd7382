"""CommitContainer: the files as they are, as an image that anybody may run.

    freeze -> commit -> thaw -> image -> tag | clean

What the engine commits carries the container's labels and says which cards it had, and no option takes that away. So it
is committed under a name of ours, made an image that says nothing of the container (`image`), and only that is given
the name that was asked for: the last step before the point of no return, which the undo of takes back.
"""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import override

from gpudock_server.core.containers.commands import Commit
from gpudock_server.core.containers.depth import raw_image
from gpudock_server.core.containers.images import CommitName, committed_origin, replaceable
from gpudock_server.core.containers.observation import observed
from gpudock_server.core.containers.saga import ContainerSaga
from gpudock_server.core.containers.world import World
from gpudock_server.core.operations import Draft
from gpudock_server.core.saga import Outcome, Run, Step
from gpudock_server.errors import ContainerNotRunning, EngineRejected, ImageExists
from gpudock_server.model.changes import Change, PutContainer
from gpudock_server.model.container import RUNS, ContainerState
from gpudock_server.model.engine import LABEL_OPERATION, EngineContainer, EngineImage, EngineState
from gpudock_server.model.image import CommittedImage
from gpudock_server.model.operation import Operation, OperationKind, OperationPlan
from gpudock_server.model.record import JsonObject, Record, now
from gpudock_server.ports import ContainerView

_NOT_FOUND = 404


class CommitArguments(Record):
    """What the saga needs to be built again. `base_id` is the image that the engine container was made from."""

    engine_id: str
    base_id: str
    reference: str
    author: str
    comment: str
    changes: tuple[str, ...]
    freeze: bool
    total_bytes: int
    revision: int
    owner: str = ""
    replace: bool = False


async def draft(world: World, command: Commit) -> Draft:
    """Whatever has files can be committed; what runs is frozen for it, unless that is not wanted."""
    view = await world.lookup(command.name, command.etag)
    container = view.container
    state = container.status.state
    seen = await world.engine.inspect(container.engine.engine_id) if container.engine else None
    if seen is None or state in (ContainerState.CREATING, ContainerState.DELETING):
        raise ContainerNotRunning(container=command.name, state=state.value)
    world.images.require_allowed(command.reference.rpartition(":")[0], container.owner)
    await replaceable(world, CommitName(command.reference, container.owner, command.replace))
    cost = await world.layers.commit_plan(seen)
    arguments = CommitArguments(
        engine_id=seen.id,
        base_id=seen.image_id,
        reference=command.reference,
        author=command.author,
        comment=command.comment,
        changes=command.changes,
        freeze=command.pause and state in RUNS,
        total_bytes=cost.bytes_to_move,
        revision=container.revision,
        owner=container.owner,
        replace=command.replace,
    )
    return Draft(
        kind=OperationKind.COMMIT,
        target=container.target,
        head=PutContainer(container, expect=view.version),
        arguments=arguments.model_dump(mode="json"),
        plan=OperationPlan(
            placement=container.status.placement,
            kept_gpu_uuids=container.status.placement.gpu_uuids,
            bytes_to_move=cost.bytes_to_move,
            bytes_available=cost.bytes_available,
            warnings=cost.warnings,
        ),
        build=lambda operation: CommitSaga(world, operation),
    )


def commit_image(operation: Operation) -> str:
    """The image's name until it is given the one that was asked for."""
    return f"gpudock/commit:{operation.id}"


class CommitSaga(ContainerSaga):
    """See the module's docstring."""

    def __init__(self, world: World, operation: Operation) -> None:
        """Builds the script from the operation's arguments."""
        super().__init__(world)
        self._arguments = CommitArguments.model_validate(operation.arguments)

    @property
    @override
    def steps(self) -> tuple[Step, ...]:
        freeze = [Step("freeze", self._freeze, self._thaw)] if self._arguments.freeze else []
        thaw = [Step("thaw", self._thaw)] if self._arguments.freeze else []
        return (
            *freeze,
            Step("commit-files", self._commit, self._remove_raw),
            *thaw,
            Step("image", self._image, self._remove_image),
            Step("tag", self._tag, self._give_tag_back),
        )

    @property
    @override
    def after(self) -> tuple[Step, ...]:
        return (Step("clean", self._clean),)

    # -- the container's files ---------------------------------------------------------------------------------------

    async def _freeze(self, _run: Run) -> None:
        await self._world.freeze(self._arguments.engine_id)

    async def _thaw(self, _run: Run) -> None:
        # It ran when this began, and nobody else may freeze it while this is at work.
        if (seen := await self._seen()) and seen.state is EngineState.PAUSED:
            await self._world.engine.unpause(self._arguments.engine_id)

    async def _seen(self) -> EngineContainer | None:
        return await self._world.engine.inspect(self._arguments.engine_id)

    async def _commit(self, run: Run) -> JsonObject:
        arguments, world, reference = self._arguments, self._world, raw_image(run.operation)
        if (made := await world.engine.image(reference)) is not None:
            return {"image_id": made.id}
        total = arguments.total_bytes
        seen = await self._seen()
        if seen is None:
            detail = f"there is no container {arguments.engine_id[:12]}; it was removed outside gpudock"
            raise EngineRejected(call="commit a container", status=_NOT_FOUND, detail=detail)
        run.progress(0, total)
        async with world.layers.commit_watched(seen, total, run.progress):
            image_id = await world.engine.commit(
                arguments.engine_id,
                reference,
                {LABEL_OPERATION: run.operation.id},
                author=arguments.author,
                comment=arguments.comment,
                changes=arguments.changes,
            )
        run.progress(total, total)
        return {"image_id": image_id}

    async def _remove_raw(self, run: Run) -> None:
        await self._world.engine.remove_image(raw_image(run.operation))

    # -- the image ---------------------------------------------------------------------------------------------------

    async def _image(self, run: Run) -> JsonObject:
        engine, reference = self._world.engine, commit_image(run.operation)
        if await engine.image(reference) is None:
            committed = str(run.operation.facts("commit-files")["image_id"])
            await engine.without_identity(committed, self._arguments.base_id, reference)
        image = await self._made(reference)
        replaced = await replaceable(self._world, self._name)
        return {"image_id": image.id, "size_bytes": image.size_bytes, "replaced": replaced}

    @property
    def _name(self) -> CommitName:
        return CommitName(self._arguments.reference, self._arguments.owner, self._arguments.replace)

    async def _made(self, reference: str) -> EngineImage:
        image = await self._world.engine.image(reference)
        if image is None:
            raise EngineRejected(call="show an image", status=_NOT_FOUND, detail=f"{reference}, just made, is gone")
        return image

    async def _remove_image(self, run: Run) -> None:
        await self._world.engine.remove_image(commit_image(run.operation))

    async def _tag(self, run: Run) -> None:
        engine, reference, facts = self._world.engine, self._arguments.reference, run.operation.facts("image")
        image_id = str(facts["image_id"])
        async with self._world.images.names.naming(reference):
            named = await engine.image(reference)
            # An undo gives the name back to what is recorded here, so nothing else may lose it.
            if (named.id if named else "") not in (facts["replaced"], image_id):
                raise ImageExists(image=reference, detail="another image was given the name meanwhile")
            await engine.tag(image_id, reference)

    async def _give_tag_back(self, run: Run) -> None:
        engine, reference = self._world.engine, self._arguments.reference
        facts = run.operation.facts("image")
        named = await engine.image(reference)
        if named is None or named.id != facts["image_id"]:
            return
        replaced = str(facts["replaced"])
        if replaced and await engine.image(replaced) is not None:
            await engine.tag(replaced, reference)
        else:
            await engine.remove_image(reference)

    async def _clean(self, run: Run) -> None:
        await self._remove_raw(run)
        await self._remove_image(run)

    # -- the record --------------------------------------------------------------------------------------------------

    @override
    async def commit(self, run: Run, view: ContainerView) -> Outcome:
        facts = run.operation.facts("image")
        image = CommittedImage(
            image_id=str(facts["image_id"]),
            name=self._arguments.reference,
            size_bytes=int(str(facts["size_bytes"])),
            container=view.container.name,
            revision=self._arguments.revision,
            create_time=now(),
        )
        origin = committed_origin(self._world, image.image_id, self._name)
        return Outcome([*await self._as_seen(view), origin], image)

    @override
    async def abandon(self, run: Run, view: ContainerView) -> Sequence[Change]:
        return await self._as_seen(view)

    async def _as_seen(self, view: ContainerView) -> Sequence[Change]:
        # It was frozen and thawed meanwhile, and may have ended; nothing else has changed.
        container = view.container.changed(status=observed(view.container, await self._seen()))
        return [PutContainer(container, expect=view.version)]
