"""Checks requests of OperationService that name an operation."""

from __future__ import annotations

from gpudock.v1 import operation_service_pb2 as pb

from gpudock_server.errors import OperationNotFound
from gpudock_server.rpc.validation import fields
from gpudock_server.rpc.validation.violations import Violations


def operation_id(
    request: pb.GetOperationRequest | pb.WatchOperationRequest | pb.CancelOperationRequest,
) -> str:
    """The id in a request. Raises OperationNotFound if it is not a UUID, since no operation can have it."""
    violations = Violations()
    if not request.id:
        violations.add("id", "is required")
    if isinstance(request, pb.CancelOperationRequest):
        fields.optional_uuid(violations, "request_id", request.request_id)
    violations.raise_if_any()
    if not fields.is_uuid(request.id):
        # The contract allows any id here. It is not looked up: it may be of any length.
        raise OperationNotFound(operation_id=request.id)
    return request.id.lower()
