"""The errors of calls: one exception class for each status code, with the details that the server sent.

Every error of gpudockd has google.rpc.ErrorInfo (https://google.aip.dev/193). An error without it comes from the
connection and not from the server; then `answered` is False and `reason` is the name of the status code.
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
    """An invalid field of the request: its path, such as `spec.memory_bytes`, and the rule that it breaks."""

    field: str
    description: str

    def __str__(self) -> str:
        """Return field and rule in one line."""
        return f"{self.field}: {self.description}" if self.field else self.description


@dataclass(frozen=True, slots=True)
class ErrorDetails:
    """The content of google.rpc.ErrorInfo, BadRequest and RetryInfo; empty if the server did not answer."""

    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    violations: Sequence[Violation] = ()
    retry_after: float | None = None


class GpudockError(Exception):
    """A failed call. The class depends on the status code; `reason` is the exact cause."""

    def __init__(
        self, message: str, *, code: grpc.StatusCode = grpc.StatusCode.UNKNOWN, details: ErrorDetails | None = None
    ) -> None:
        details = details or ErrorDetails()
        super().__init__(message)
        self.message: str = message
        """The message of the server, in English."""
        self.code: grpc.StatusCode = code
        """The gRPC status code."""
        self.answered: bool = bool(details.reason)
        """Whether the error comes from the server and not from the connection."""
        self.reason: str = details.reason or code.name
        """The name of an ErrorReason without its prefix, such as `GPU_EXHAUSTED`."""
        self.metadata: dict[str, str] = dict(details.metadata)
        """The values in the message; the comment of the ErrorReason lists the keys."""
        self.violations: tuple[Violation, ...] = tuple(details.violations)
        """The invalid fields of the request; only of InvalidArgument."""
        self.retry_after: float | None = details.retry_after
        """Seconds to wait before a retry; None if the server did not say."""

    @property
    def operation_id(self) -> str:
        """The id of the operation that caused the error, for instance of Busy; else empty."""
        return self.metadata.get("operation_id", "")


class NotFound(GpudockError):
    """The resource does not exist."""


class AlreadyExists(GpudockError):
    """A resource of that name or id already exists."""


class Aborted(GpudockError):
    """The resource has changed or is being changed. Read it again before another call."""


class Busy(Aborted):
    """Another operation (`operation_id`) is running on the resource. Wait for its end, then call again."""


class Exhausted(GpudockError):
    """Not enough free GPUs, ports or disk space. Request less, or try again later."""


class InvalidArgument(GpudockError):
    """The request is invalid; `violations` lists the invalid fields."""


class PreconditionFailed(GpudockError):
    """The state of the resource or of the node does not allow the call."""


class OutOfRange(GpudockError):
    """A page token or resume token has expired. Start the list or the watch again."""


class Unavailable(GpudockError):
    """The server, its store or its engine does not answer. Retry later, a mutation with the same request_id."""


class Cancelled(GpudockError):
    """The operation was cancelled and undone, or the call was cancelled."""


class DeadlineExceeded(GpudockError):
    """The server did not answer within the timeout. A mutation may have been made nevertheless."""


class Unauthenticated(GpudockError):
    """The token or the client certificate is missing or invalid."""


class PermissionDenied(GpudockError):
    """This caller is not permitted to do this, or no caller is."""


class Unimplemented(GpudockError):
    """The server does not have this RPC: it is older than this client."""


class Internal(GpudockError):
    """A bug of the server. Report `metadata["error_id"]`: the log of the server has the details under that id."""


# A code that is missing here is a bug of the server.
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
# Reasons with a class of their own, a subclass of the class of their code.
_CLASS_BY_REASON: Mapping[str, type[GpudockError]] = {"CONTAINER_BUSY": Busy, "VOLUME_BUSY": Busy}


def error_of(failure: grpc.aio.AioRpcError) -> GpudockError:
    """Return the exception for an error of gRPC, with the details in its trailers."""
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
    """Yield the details that this client can decode; others are skipped, since the status itself is enough."""
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
