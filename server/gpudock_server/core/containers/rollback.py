"""RollbackContainer: return to a revision, as a new one.

Cards and ports are claimed afresh, whatever the revision had: others may hold those by now.
"""

from __future__ import annotations

from gpudock_server.core.containers.change import Files, Source
from gpudock_server.core.containers.commands import Rollback
from gpudock_server.core.containers.history import find_revision
from gpudock_server.core.containers.planning import Wanted, draft
from gpudock_server.core.containers.world import World
from gpudock_server.core.operations import Draft
from gpudock_server.errors import (
    ContainerNotRunning,
    ContainerPaused,
    ImageDiffers,
    ImageNotFound,
    SnapshotNotFound,
)
from gpudock_server.model.container import DOES_NOT_RUN, RUNS, Container, ContainerRevision, ContainerState
from gpudock_server.model.operation import OperationKind
from gpudock_server.model.snapshot import Snapshot
from gpudock_server.ports import RevisionView


async def draft_rollback(world: World, command: Rollback) -> Draft:
    """Its spec with its files, or with those of today. A FAILED one, whose files are lost, can be brought back."""
    view = await world.lookup(command.name, command.etag)
    container, state = view.container, view.container.status.state
    if state is ContainerState.PAUSED:
        raise ContainerPaused(container=command.name)
    lost = state is ContainerState.FAILED and not command.spec_only
    if state not in RUNS and state not in DOES_NOT_RUN and not lost:
        raise ContainerNotRunning(container=command.name, state=state.value)
    found = await find_revision(world, container, command.revision)
    wanted = Wanted(
        OperationKind.ROLLBACK,
        found.revision.spec,
        runs=state in RUNS,
        snapshots=command.snapshots,
        source=await _source(world, container, found, command),
    )
    return await draft(world, view, wanted)


async def _source(world: World, container: Container, found: RevisionView, command: Rollback) -> Source:
    if command.revision == container.revision:
        # What it is already: its files are those of today.
        return Source()
    if command.spec_only:
        _must_be_on_one_image(container, found.revision)
        return Source()
    if found.snapshot is None:
        raise SnapshotNotFound(container=container.name, revision=command.revision)
    await _must_have_image(world, found.revision, found.snapshot)
    return Source(
        files=Files.RESTORE,
        image_id=found.snapshot.image_id,
        base_image_id=found.revision.image_id,
        revision=command.revision,
        snapshot=found.snapshot,
        bytes_to_move=found.snapshot.layer_bytes,
    )


def _must_be_on_one_image(container: Container, revision: ContainerRevision) -> None:
    current = container.engine.user_image_id if container.engine else ""
    if revision.image_id != current:
        raise ImageDiffers(
            container=container.name,
            image=revision.spec.image,
            image_id=revision.image_id,
            current_image_id=current,
        )


async def _must_have_image(world: World, revision: ContainerRevision, snapshot: Snapshot) -> None:
    if await world.engine.image(snapshot.image_id) is None:
        raise ImageNotFound(image=f"{revision.spec.image} ({snapshot.image_id})")
