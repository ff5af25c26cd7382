"""Calls of OperationService that several tests make."""

from __future__ import annotations

from typing import Any

from gpudock.v1 import operation_pb2, operation_service_pb2

from tests.calls import Caller


async def get_operation(caller: Caller, operation_id: str, *, timeout: float | None = None) -> operation_pb2.Operation:
    """An operation in its current state; the call takes at most `timeout` seconds."""
    request = operation_service_pb2.GetOperationRequest(id=operation_id)
    return (await caller.operations.GetOperation(request, timeout=timeout)).operation


async def list_operations(caller: Caller, page_size: int = 0, **filters: Any) -> list[operation_pb2.Operation]:
    """All pages of a list of operations; `filters` are fields of OperationFilter."""
    operations: list[operation_pb2.Operation] = []
    token = ""
    while True:
        request = operation_service_pb2.ListOperationsRequest(
            page_size=page_size, page_token=token, filter=operation_service_pb2.OperationFilter(**filters)
        )
        page = await caller.operations.ListOperations(request)
        assert not page_size or len(page.operations) <= page_size
        operations += page.operations
        token = page.next_page_token
        if not token:
            return operations


async def cancel_operation(caller: Caller, operation_id: str) -> operation_pb2.Operation:
    """Request that an operation is cancelled; returns it after the request."""
    request = operation_service_pb2.CancelOperationRequest(id=operation_id)
    return (await caller.operations.CancelOperation(request)).operation
