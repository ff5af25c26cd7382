"""Recorded operations for tests."""

from __future__ import annotations

from gpudock_server.core.operations.engine import Operations
from gpudock_server.model.operation import (
    Operation,
    OperationKind,
    OperationState,
)
from gpudock_server.model.resource import ResourceKind
from gpudock_server.ports import Versioned

from tests.rpc.fakes import LONG_AGO
from tests.unit.model_node import NODE, ModelNode

ID = "1b4e28ba-2fa1-41d2-883f-0016d3cca427"


def start_recovering_daemon(model: ModelNode) -> Operations:
    """Begin a daemon process that has not recovered yet; return its operations."""
    model.start_daemon(recovering=True)
    return model.operations


def record_operation(model: ModelNode, **changes: object) -> Operation:
    """Record an operation on container `a` that no process drives."""
    operation = Operation(
        id=ID,
        kind=OperationKind.STOP,
        target=model.container().target,
        node=NODE,
        state=OperationState.RUNNING,
        create_time=LONG_AGO,
        update_time=LONG_AGO,
    ).changed(**changes)
    model.store.journal[operation.id] = Versioned(operation, 1)
    # A daemon finds unfinished operations by their locks.
    model.store.locks[ResourceKind.CONTAINER, f"locked by {operation.id}"] = operation.id
    return operation
