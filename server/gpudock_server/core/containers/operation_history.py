"""What the recorded operations tell about containers without a record."""

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
    """The recorded operations on certain uids, and which of these uids were deleted."""

    operations: Mapping[str, Operation]
    deleted: frozenset[str]

    def is_known_gone(self, uid: str) -> bool:
        """Whether a container is known to have been deleted, or its creation to have been undone."""
        creations = (
            operation
            for operation in self.operations.values()
            if operation.target.uid == uid and operation.kind in _CREATING_KINDS
        )
        return uid in self.deleted or any(operation.state in _UNDONE_STATES for operation in creations)

    def was_undone(self, operation_id: str) -> bool:
        """Whether an operation is known to have been undone."""
        operation = self.operations.get(operation_id)
        return operation is not None and operation.state in _UNDONE_STATES


async def read_operation_history(store: Store, uids: Collection[str]) -> OperationHistory:
    """Read the recorded operations on containers with these uids."""
    page = await read_all_pages(store.operations)
    operations = {operation.id: operation for operation in page.items if operation.target.uid in uids}
    deleted = frozenset(operation.target.uid for operation in operations.values() if is_finished_deletion(operation))
    return OperationHistory(operations, deleted)


def is_finished_deletion(operation: Operation) -> bool:
    """Whether an operation deleted its target."""
    return operation.kind is OperationKind.DELETE and operation.state is OperationState.SUCCEEDED
