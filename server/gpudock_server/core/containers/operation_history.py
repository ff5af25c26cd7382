"""What the operations in the store say of containers that have no record."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from gpudock_server.core.listings import read_all_pages
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
