"""Removes images that an ended operation left in the engine.

The engine continues a commit whose caller has disconnected. The image then appears, with the operation's id as its tag,
after the undo has looked for it, or after the daemon has died.
"""

from __future__ import annotations

import structlog

from gpudock_server.core.containers.images import Images
from gpudock_server.model.operation import Operation, OperationState
from gpudock_server.ports import Engine, Store

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)

# Images that are needed only until their operation ends.
_TEMPORARY_REPOSITORIES = frozenset({"gpudock/raw", "gpudock/commit"})
# Images that a container is based on, unless the operation was undone.
_LAYER_REPOSITORY = "gpudock/layer"


async def remove_unused_images(store: Store, engine: Engine, images: Images) -> None:
    """Remove images of ended operations that no container needs.

    An operation without a record may be of another installation on the same engine, so its images are kept.
    """
    await images.delete_stale_origins()
    for name in await engine.image_names():
        repository, _, operation_id = name.rpartition(":")
        if repository not in _TEMPORARY_REPOSITORIES and repository != _LAYER_REPOSITORY:
            continue
        stored = await store.operation(operation_id.removesuffix("-graft"))
        if stored is not None and _is_unused(repository, stored.value):
            log.info("removing unused image", image=name)
            await engine.remove_image(name)


def _is_unused(repository: str, operation: Operation) -> bool:
    if repository == _LAYER_REPOSITORY:
        return operation.state in (OperationState.FAILED, OperationState.CANCELLED)
    return operation.state.ended
