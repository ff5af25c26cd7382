"""The stream that shows an operation: snapshots of it, and last its result, or the error that it ended with."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeAlias

from gpudock.v1 import committed_image_pb2, container_pb2, operation_pb2, volume_pb2

from gpudock_server.core.operations.active_operation import OperationView
from gpudock_server.core.operations.engine import Operations, raise_operation_error, wrong_node_error
from gpudock_server.model.image import CommittedImage
from gpudock_server.model.operation import Operation, OperationKind
from gpudock_server.model.volume import Volume
from gpudock_server.rpc.containers.messages import committed_image_message, container_message
from gpudock_server.rpc.operations.messages import operation_message
from gpudock_server.rpc.volumes.messages import volume_message

# What an operation leaves, as it is shown.
ResultMessage: TypeAlias = container_pb2.Container | committed_image_pb2.CommittedImage | volume_pb2.Volume

_KINDS_WITHOUT_RESULT = (OperationKind.DELETE, OperationKind.DELETE_VOLUME)


async def follow(
    operations: Operations, operation_id: str
) -> AsyncGenerator[operation_pb2.Operation | ResultMessage | None, None]:
    """Each snapshot as it is taken, then what was left; None for an operation that leaves nothing.

    Whoever is slow to ask for the next gets what is then the latest. Leaving it does nothing to the operation. Raises
    OperationNotFound, ShuttingDown, and what the operation failed with.
    """
    last: Operation | None = None
    # Closed here and not by the garbage collector: a caller may hang up at any yield.
    async with aclosing(operations.watch(operation_id)) as snapshots:
        async for snapshot in snapshots:
            last = snapshot.operation
            yield operation_message(snapshot)
    if last is not None:
        yield await _result(operations, last)


async def _result(operations: Operations, operation: Operation) -> ResultMessage | None:
    if not operation.state.ended:
        # Only the daemon that runs it knows how it goes on.
        raise wrong_node_error(operation, address="")
    if operation.kind in _KINDS_WITHOUT_RESULT:
        raise_operation_error(operation)
        return None
    left = await operations.result_of(operation)
    match left:
        case CommittedImage():
            return committed_image_message(left)
        case Volume():
            return volume_message(left)
        case container:
            return container_message(container)


def record_message(operation: Operation) -> operation_pb2.Operation:
    """An operation as its record has it: one that is only planned, or one of a list."""
    return operation_message(OperationView(operation))
