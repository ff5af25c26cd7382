"""Errors about operations."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from gpudock_server.errors.base import Code, GpudockError


@dataclass(eq=False)
class OperationNotFound(GpudockError):
    """No operation has this id; its record may have been pruned."""

    code = Code.NOT_FOUND
    reason = "OPERATION_NOT_FOUND"
    template = "operation {operation_id!r} not found; its record may have expired"
    operation_id: str


@dataclass(eq=False)
class OperationResultGone(OperationNotFound):
    """The operation succeeded, but its result has expired and its object was deleted or replaced."""

    template = "operation {operation_id!r} succeeded; its result has expired, and its object no longer exists"


@dataclass(eq=False)
class OperationNotCancellable(GpudockError):
    """The operation is past the point after which it cannot be undone."""

    code = Code.FAILED_PRECONDITION
    reason = "OPERATION_NOT_CANCELLABLE"
    template = "operation {operation_id} is {state} and can no longer be cancelled"
    operation_id: str
    state: str


@dataclass(eq=False)
class OperationOvertaken(GpudockError):
    """The store was restored to an earlier state, and the engine has a newer revision than the operation."""

    code = Code.ABORTED
    reason = "OPERATION_OVERTAKEN"
    template = (
        "operation {operation_id} is obsolete: {container} is at revision {revision} in the engine, and the store was"
        " restored to an earlier state"
    )
    operation_id: str
    container: str
    revision: int


@dataclass(eq=False)
class OperationCancelled(GpudockError):
    """A caller cancelled the operation."""

    code = Code.CANCELLED
    reason = "OPERATION_CANCELLED"
    template = "operation {operation_id} was cancelled and undone"
    operation_id: str


@dataclass(eq=False)
class OperationFailed(GpudockError):
    """The recorded error of an operation that has ended."""

    code = Code.INTERNAL
    reason = "INTERNAL"
    recorded_code: int
    recorded_reason: str
    recorded_message: str
    recorded_metadata: dict[str, str]

    @property
    @override
    def message(self) -> str:
        return self.recorded_message

    @property
    @override
    def metadata(self) -> dict[str, str]:
        return self.recorded_metadata
