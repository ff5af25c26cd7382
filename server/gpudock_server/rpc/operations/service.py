"""OperationService: gets, lists, watches and cancels operations."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing

from gpudock.v1 import committed_image_pb2, operation_pb2, volume_pb2
from gpudock.v1 import operation_service_pb2 as pb
from gpudock.v1.operation_service_pb2_grpc import OperationServiceServicer
from typing_extensions import override

from gpudock_server.core.operations.engine import Operations
from gpudock_server.rpc import list_requests, pagination
from gpudock_server.rpc.middleware.interceptor import Context
from gpudock_server.rpc.operations import requests as validation
from gpudock_server.rpc.operations import stream
from gpudock_server.rpc.operations.messages import operation_message

SERVICE = pb.DESCRIPTOR.services_by_name["OperationService"].full_name


class OperationService(OperationServiceServicer):
    """Serves gpudock.v1.OperationService. Its streaming method returns a generator: see ContainerService."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    @override
    async def GetOperation(self, request: pb.GetOperationRequest, context: Context) -> pb.GetOperationResponse:
        snapshot = await self._operations.get(validation.operation_id(request))
        return pb.GetOperationResponse(operation=operation_message(snapshot))

    @override
    async def ListOperations(self, request: pb.ListOperationsRequest, context: Context) -> pb.ListOperationsResponse:
        page = await pagination.from_store(
            list_requests.operations(request), self._operations.list, stream.record_message
        )
        return pb.ListOperationsResponse(operations=page.messages, next_page_token=page.next_token)

    @override
    def WatchOperation(
        self, request: pb.WatchOperationRequest, context: Context
    ) -> AsyncIterator[pb.WatchOperationResponse]:
        return self._watch(validation.operation_id(request))

    @override
    async def CancelOperation(self, request: pb.CancelOperationRequest, context: Context) -> pb.CancelOperationResponse:
        snapshot = await self._operations.cancel(validation.operation_id(request))
        return pb.CancelOperationResponse(operation=operation_message(snapshot))

    async def _watch(self, operation_id: str) -> AsyncIterator[pb.WatchOperationResponse]:
        async with aclosing(stream.follow(self._operations, operation_id)) as messages:
            async for message in messages:
                if isinstance(message, operation_pb2.Operation):
                    yield pb.WatchOperationResponse(operation=message)
                else:
                    yield pb.WatchOperationResponse(result=_result(message))


def _result(message: stream.ResultMessage | None) -> pb.OperationResult:
    match message:
        case committed_image_pb2.CommittedImage():
            return pb.OperationResult(image=message)
        case volume_pb2.Volume():
            return pb.OperationResult(volume=message)
        case _:
            return pb.OperationResult(container=message)
