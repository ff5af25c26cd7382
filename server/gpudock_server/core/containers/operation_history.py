"""What the operations in the store say of containers that have no record, and whether a name is free of such."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gpudock_server.core.containers.world import World
from gpudock_server.core.listings import read_all_pages
from gpudock_server.errors import ContainerRecordLost
from gpudock_server.model.engine import LABEL_NAME, LABEL_NODE, LABEL_OPERATION, LABEL_SPEC, LABEL_UID
from gpudock_server.model.operation import Operation, OperationKind, OperationState
from gpudock_server.ports import Store

_CREATING_KINDS = (OperationKind.CREATE, OperationKind.CLONE)
_UNDONE_STATES = (OperationState.FAILED, OperationState.CANCELLED)


@dataclass(frozen=True, slots=True)
class OperationHistory:
    """What the store still knows of operations: those that are asked for, and which uids were deleted."""

    operations: Mapping[str, Operation]
    deleted: frozenset[str]

    def is_known_gone(self, uid: str) -> bool:
        """Whether a container is known to have been deleted, or never to have come to be."""
        made = (one for one in self.operations.values() if one.target.uid == uid and one.kind in _CREATING_KINDS)
        return uid in self.deleted or any(one.state in _UNDONE_STATES for one in made)

    def was_undone(self, operation_id: str) -> bool:
        """Whether an operation is known to have been undone."""
        known = self.operations.get(operation_id)
        return known is not None and known.state in _UNDONE_STATES


async def read_operation_history(store: Store, uids: Collection[str]) -> OperationHistory:
    """What the store knows of operations on these."""
    listed = await read_all_pages(store.operations)
    operations = {one.id: one for one in listed.items if one.target.uid in uids}
    return OperationHistory(
        operations, frozenset(one.target.uid for one in operations.values() if is_finished_deletion(one))
    )


def is_finished_deletion(operation: Operation) -> bool:
    """Whether it deleted its target."""
    return operation.kind is OperationKind.DELETE and operation.state is OperationState.SUCCEEDED


async def refuse_if_record_lost(world: World, name: str) -> None:
    """Raise ContainerRecordLost if engine containers of a name that has no record may have files.

    A new container of that name would keep them from getting their record again. Engine containers that reconcile
    removes (core/reconcile/orphans.py) do not count.
    """
    labelled = await world.engine.find({LABEL_NODE: world.node, LABEL_NAME: name})
    found = [one for one in labelled if one.name == one.created_name]
    if not found:
        return
    history = await read_operation_history(world.store, {one.labels.get(LABEL_UID, "") for one in found})
    kept = [one for one in found if LABEL_SPEC in one.labels and one.labels.get(LABEL_UID, "") not in history.deleted]
    if len(found) == 1:
        kept = [one for one in kept if not history.was_undone(one.labels.get(LABEL_OPERATION, ""))]
    if kept:
        raise ContainerRecordLost(container=name)
