"""Images that an operation had under way when it ended without them.

An engine goes on with a commit whose caller is gone: the image appears, with the operation's name, when the undo has
looked for it in vain, or when the daemon that asked is dead.
"""

from __future__ import annotations

import structlog

from gpudock_server.core.containers.images import forget_removed_images
from gpudock_server.core.containers.world import World
from gpudock_server.model.operation import Operation, OperationState

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Of use while their operation is at work, and never after.
_FOR_A_WHILE = frozenset({"gpudock/raw", "gpudock/commit"})
# What a container stands on, if the operation was not undone.
_LAYER = "gpudock/layer"


async def sweep_images(world: World) -> None:
    """Remove the images of operations that have ended and have no use for them.

    An operation that is not on record may be another installation's on the same engine: its images are left alone.
    """
    await forget_removed_images(world)
    for name in await world.engine.image_names():
        repository, _, operation_id = name.rpartition(":")
        if repository not in _FOR_A_WHILE and repository != _LAYER:
            continue
        stored = await world.store.operation(operation_id.removesuffix("-graft"))
        if stored is not None and _is_left_over(repository, stored.value):
            log.info("an image that its operation has left is removed", image=name)
            await world.engine.remove_image(name)


def _is_left_over(repository: str, operation: Operation) -> bool:
    if repository == _LAYER:
        return operation.state in (OperationState.FAILED, OperationState.CANCELLED)
    return operation.state.ended
