"""Images that an operation had under way when it ended without them.

An engine goes on with a commit whose caller is gone: the image appears, with the operation's name, when the undo has
looked for it in vain, or when the daemon that asked is dead.
"""

from __future__ import annotations

import structlog

from gpudock_server.core.containers.images import Images
from gpudock_server.model.operation import Operation, OperationState
from gpudock_server.ports import Engine, Store

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Of use while their operation is at work, and never after.
_TEMPORARY_REPOSITORIES = frozenset({"gpudock/raw", "gpudock/commit"})
# What a container stands on, if the operation was not undone.
_LAYER_REPOSITORY = "gpudock/layer"


async def remove_unused_images(store: Store, engine: Engine, images: Images) -> None:
    """Remove the images of operations that have ended and have no use for them.

    An operation that is not on record may be another installation's on the same engine: its images are left alone.
    """
    await images.delete_stale_origins()
    for name in await engine.image_names():
        repository, _, operation_id = name.rpartition(":")
        if repository not in _TEMPORARY_REPOSITORIES and repository != _LAYER_REPOSITORY:
            continue
        stored = await store.operation(operation_id.removesuffix("-graft"))
        if stored is not None and _is_unused(repository, stored.value):
            log.info("an image that its operation has left is removed", image=name)
            await engine.remove_image(name)


def _is_unused(repository: str, operation: Operation) -> bool:
    if repository == _LAYER_REPOSITORY:
        return operation.state in (OperationState.FAILED, OperationState.CANCELLED)
    return operation.state.ended
