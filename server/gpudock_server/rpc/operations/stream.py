"""The stream of an operation: the operation each time it changes, then its result or its error."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, Protocol, TypeAlias, TypeVar

from gpudock.v1 import committed_image_pb2, container_pb2, operation_pb2, volume_pb2

from gpudock_server.core.operations.active_operation import OperationView
from gpudock_server.core.operations.commands import Commands
from gpudock_server.core.operations.engine import Operations, raise_operation_error
from gpudock_server.model.image import CommittedImage
from gpudock_server.model.operation import Operation, OperationKind
from gpudock_server.model.volume import Volume
from gpudock_server.rpc.containers.messages import committed_image_message, container_message
from gpudock_server.rpc.operations.messages import operation_message
from gpudock_server.rpc.operations.request_key import OperationRequest, request_key
from gpudock_server.rpc.volumes.messages import volume_message

# The result of an operation as a message.
ResultMessage: TypeAlias = container_pb2.Container | committed_image_pb2.CommittedImage | volume_pb2.Volume

R_co = TypeVar("R_co", covariant=True)

_KINDS_WITHOUT_RESULT = (OperationKind.DELETE, OperationKind.DELETE_VOLUME)


class OperationResponse(Protocol[R_co]):
    """The class of a response that holds an operation or its result."""

    def __call__(
        self,
        *,
        operation: operation_pb2.Operation | None = None,
        result: Any = None,  # noqa: ANN401 - each response class takes the result type of its own RPC
    ) -> R_co:
        """Create a response."""
        ...


async def operate(
    commands: Commands,
    operations: Operations,
    request: OperationRequest,
    command: object,
    response: OperationResponse[R_co],
) -> AsyncIterator[R_co]:
    """Stream the plan of `command`, or its operation until it ends. Disconnecting does not cancel the operation."""
    if request.validate_only:
        yield response(operation=record_message(await commands.preview(command)))
        return
    operation_id = await commands.begin(command, request_key(request))
    async with aclosing(follow(operations, operation_id)) as messages:
        async for message in messages:
            if isinstance(message, operation_pb2.Operation):
                yield response(operation=message)
            else:
                yield response(result=message)


async def follow(
    operations: Operations, operation_id: str
) -> AsyncGenerator[operation_pb2.Operation | ResultMessage | None, None]:
    """Yield the operation each time it changes, then its result; None for an operation without a result.

    A slow reader skips to the latest state. Closing the generator does not cancel the operation. Raises
    OperationNotFound, ShuttingDown, and the error of a failed operation.
    """
    last: Operation | None = None
    # Closed here, not by the garbage collector: a caller may disconnect at any yield.
    async with aclosing(operations.watch(operation_id)) as snapshots:
        async for snapshot in snapshots:
            last = snapshot.operation
            yield operation_message(snapshot)
    if last is not None:
        yield await _result(operations, last)


async def _result(operations: Operations, operation: Operation) -> ResultMessage | None:
    if not operation.state.ended:
        # Only the daemon that runs the operation can watch it.
        raise operations.wrong_node_error(operation)
    if operation.kind in _KINDS_WITHOUT_RESULT:
        raise_operation_error(operation)
        return None
    result = await operations.result_of(operation)
    match result:
        case CommittedImage():
            return committed_image_message(result)
        case Volume():
            return volume_message(result)
        case container:
            return container_message(container)


def record_message(operation: Operation) -> operation_pb2.Operation:
    """An operation as it is recorded, without progress: a plan, or an item of a list."""
    return operation_message(OperationView(operation))
