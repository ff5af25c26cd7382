"""What a call can end with: one exception class for each status code, with the details that the server sent.

Every error of gpudockd carries google.rpc.ErrorInfo, as https://google.aip.dev/193 has it. An error without one did not
come from the server but from the way there; then `answered` is False and `reason` is the name of the status code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"
_DOMAIN = "gpudock"


@dataclass(frozen=True, slots=True)
class Violation:
    """A field of the request that breaks a rule: its path, such as `spec.memory_bytes`, and the rule."""

    field: str
    description: str

    def __str__(self) -> str:
        """The field and the rule in one line."""
        return f"{self.field}: {self.description}" if self.field else self.description


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """What stands in google.rpc.ErrorInfo, BadRequest and RetryInfo; all empty if the server did not answer."""

    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: Sequence[Violation] = ()
    retry_after: float | None = None


class GpudockError(Exception):
    """A call that failed. Its classes follow the status code; `reason` says exactly why."""

    def __init__(
        self, message: str, *, code: grpc.StatusCode = grpc.StatusCode.UNKNOWN, details: ErrorDetails | None = None
    ) -> None:
        details = details or ErrorDetails()
        super().__init__(message)
        self.message: str = message
        """For people."""
        self.code: grpc.StatusCode = code
        """The gRPC status code."""
        self.answered: bool = bool(details.reason)
        """Whether the server itself said so, and not the way there."""
        self.reason: str = details.reason or code.name
        """The name of an ErrorReason without its prefix, such as `GPU_EXHAUSTED`."""
        self.metadata: dict[str, str] = dict(details.metadata)
        """Every changing value of the message; the keys are those of the ErrorReason."""
        self.violations: tuple[Violation, ...] = tuple(details.violations)
        """Every field of the request that breaks a rule, with InvalidArgument."""
        self.retry_after: float | None = details.retry_after
        """How many seconds to wait before the call is made again; None if the server did not say."""

    @property
    def operation_id(self) -> str:
        """The operation that the error is about, such as the one that keeps a container busy; mostly empty."""
        return self.metadata.get("operation_id", "")


class NotFound(GpudockError):
    """What the request names is not there."""


class AlreadyExists(GpudockError):
    """There is one of that name or id already."""


class Aborted(GpudockError):
    """The object was changed or is being changed. Read it, decide again, call again."""


class Busy(Aborted):
    """Another operation (`operation_id`) is at work on the object. Watch that one to its end, then call again."""


class Exhausted(GpudockError):
    """Too few GPUs or ports are free, or too little disk. Ask for less, or again later."""


class InvalidArgument(GpudockError):
    """The request breaks a rule; `violations` lists every field that does."""


class PreconditionFailed(GpudockError):
    """The object's state, or that of the node, does not allow it."""


class OutOfRange(GpudockError):
    """The moment that a page token stands for is no longer kept. Begin the list again."""


class Unavailable(GpudockError):
    """The server, its store or its engine does not answer. Call again later, a mutation with the same request_id."""


class Cancelled(GpudockError):
    """The operation was cancelled and undone, or the call was."""


class DeadlineExceeded(GpudockError):
    """No answer came within the call's timeout. A mutation may have been made all the same."""


class Unauthenticated(GpudockError):
    """The call has no identity, or one that is not valid."""


class PermissionDenied(GpudockError):
    """This identity may not do this, or nobody may."""


class Unimplemented(GpudockError):
    """The server does not know this RPC: it is older than this client."""


class Internal(GpudockError):
    """A fault of the server. Report `metadata["error_id"]`: its log has the details under that id."""


# The one table from status to exception; a code that is not in it is a fault of the server.
_CLASS_BY_CODE: Mapping[grpc.StatusCode, type[GpudockError]] = {
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exhausted,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionFailed,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.DATA_LOSS: Internal,
}
# Where a reason has a class of its own below that of its code.
_CLASS_BY_REASON: Mapping[str, type[GpudockError]] = {"CONTAINER_BUSY": Busy, "VOLUME_BUSY": Busy}


def error_of(failure: grpc.aio.AioRpcError) -> GpudockError:
    """The exception for what gRPC raised, with the details out of its trailers."""
    code: grpc.StatusCode = failure.code()
    details = _details_of(failure)
    made = _CLASS_BY_REASON.get(details.reason) or _CLASS_BY_CODE.get(code, Internal)
    return made(failure.details() or code.name, code=code, details=details)


def _details_of(failure: grpc.aio.AioRpcError) -> ErrorDetails:
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry: error_details_pb2.RetryInfo | None = None
    for detail in _unpacked(failure):
        match detail:
            case error_details_pb2.ErrorInfo() if detail.domain == _DOMAIN:
                info = detail
            case error_details_pb2.BadRequest():
                bad_request = detail
            case error_details_pb2.RetryInfo():
                retry = detail
            case _:
                pass
    return ErrorDetails(
        reason=info.reason,
        metadata=dict(info.metadata),
        violations=tuple(Violation(each.field, each.description) for each in bad_request.field_violations),
        retry_after=None if retry is None else retry.retry_delay.ToTimedelta().total_seconds(),
    )


def _unpacked(failure: grpc.aio.AioRpcError) -> Iterator[Message]:
    """The details that this client knows; what it cannot read it passes over, since the status itself is enough."""
    kinds = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo)
    for packed in _rich_status(failure).details:
        for kind in kinds:
            detail = kind()
            try:
                if packed.Unpack(detail):
                    yield detail
            except DecodeError:
                continue


def _rich_status(failure: grpc.aio.AioRpcError) -> status_pb2.Status:
    trailers = cast("Iterable[tuple[str, str | bytes]]", failure.trailing_metadata() or ())
    for key, value in trailers:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()
