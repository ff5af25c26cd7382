"""Converts errors to statuses; no other module does.

A domain error becomes a google.rpc.Status with ErrorInfo and other details, in `grpc-status-details-bin`, as in
https://google.aip.dev/193. Any other exception becomes INTERNAL with an id that is also in the log, without its text.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import accumulate

import grpc
import grpc.aio
import structlog
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status
from typing_extensions import override

from gpudock_server.errors import Code, GpudockError, InvalidArgument, OperationFailed
from gpudock_server.logs import new_error_id
from gpudock_server.rpc.middleware.interceptor import Call, Interceptor

DOMAIN = "gpudock"

# Many clients refuse trailers above 8 KiB, and the caller then gets no status at all. Trailers hold the message
# percent-encoded and the details in base64: 1,500 + 4,200 * 4/3 bytes, which leaves space for other entries.
_MESSAGE_BYTES = 1500
_STATUS_BYTES = 4200
_ELLIPSIS = "…"

# Reason -> what ran out, as the subject of a QuotaFailure.
_QUOTAS = {
    "GPU_EXHAUSTED": "gpus",
    "PORT_EXHAUSTED": "ports",
    "DISK_FULL": "disk",
    "EXEC_LIMIT": "execs",
}

# Reason -> type of the resource, and the metadata key that holds its name.
_RESOURCES = {
    "CONTAINER_NOT_FOUND": ("gpudock.v1.Container", "container"),
    "CONTAINER_EXISTS": ("gpudock.v1.Container", "container"),
    "REVISION_NOT_FOUND": ("gpudock.v1.ContainerRevision", "revision"),
    "OPERATION_NOT_FOUND": ("gpudock.v1.Operation", "operation_id"),
    "EXEC_EXISTS": ("gpudock.v1.Exec", "exec_id"),
    "GPU_NOT_FOUND": ("gpudock.v1.Gpu", "uuids"),
    "IMAGE_NOT_FOUND": ("image", "image"),
    "NODE_NOT_FOUND": ("gpudock.v1.Node", "node"),
    "VOLUME_NOT_FOUND": ("gpudock.v1.Volume", "volume"),
    "VOLUME_EXISTS": ("gpudock.v1.Volume", "volume"),
}

_log = structlog.stdlib.get_logger("gpudock.rpc")


def status_of(error: GpudockError) -> status_pb2.Status:
    """The google.rpc.Status of a domain error; values are cut so that it fits into the trailers of a call."""
    code, reason = _code_and_reason(error)
    status = status_pb2.Status(code=code, message=_shortened(error.message, _MESSAGE_BYTES))
    metadata = {key: value for key, value in error.metadata.items() if value}
    # The most useful detail comes first; details that no longer fit are left out.
    for detail in _details(error, reason, metadata):
        _append(status, detail)
    return status


def code_of(error: BaseException) -> grpc.StatusCode:
    """The status code of a call whose behaviour raised `error`."""
    if isinstance(error, asyncio.CancelledError):
        return grpc.StatusCode.CANCELLED
    domain_error = _domain_error(error)
    number = _code_and_reason(domain_error)[0] if domain_error is not None else Code.INTERNAL
    return next(code for code in grpc.StatusCode if code.value[0] == number)


def internal_status(error_id: str) -> status_pb2.Status:
    """The status of an unexpected exception, whose traceback is in the log under this id."""
    status = status_pb2.Status(code=Code.INTERNAL, message=f"internal error, id {error_id}")
    _append(status, error_details_pb2.ErrorInfo(reason="INTERNAL", domain=DOMAIN, metadata={"error_id": error_id}))
    return status


def _code_and_reason(error: GpudockError) -> tuple[int, str]:
    if not isinstance(error, OperationFailed):
        return error.code, error.reason
    known = error.recorded_code in {status.value[0] for status in grpc.StatusCode} - {0}
    return (error.recorded_code if known else Code.INTERNAL), error.recorded_reason


def _details(error: GpudockError, reason: str, metadata: dict[str, str]) -> Iterator[Message]:
    yield _error_info(reason, metadata)
    if error.retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromTimedelta(error.retry_after)
        yield error_details_pb2.RetryInfo(retry_delay=delay)
    description = _shortened(error.message, _MESSAGE_BYTES // 3)
    if reason in _QUOTAS:
        violation = error_details_pb2.QuotaFailure.Violation(subject=_QUOTAS[reason], description=description)
        yield error_details_pb2.QuotaFailure(violations=[violation])
    if reason in _RESOURCES:
        resource_type, key = _RESOURCES[reason]
        name = _shortened(metadata.get(key, ""), _MESSAGE_BYTES // 3)
        yield error_details_pb2.ResourceInfo(resource_type=resource_type, resource_name=name, description=description)
    if isinstance(error, InvalidArgument):
        yield _bad_request(error)


def _error_info(reason: str, metadata: dict[str, str]) -> error_details_pb2.ErrorInfo:
    limit = 512
    while True:
        shortened = {key: _shortened(value, limit) for key, value in metadata.items()}
        info = error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=shortened)
        if info.ByteSize() <= _STATUS_BYTES // 4 or limit == 0:
            return info
        limit //= 2


def _bad_request(error: InvalidArgument) -> error_details_pb2.BadRequest:
    detail = error_details_pb2.BadRequest()
    for number, violation in enumerate(error.violations):
        detail.field_violations.add(
            field=_shortened(violation.field, 200), description=_shortened(violation.description, 300)
        )
        if detail.ByteSize() > _STATUS_BYTES // 3:
            rest = len(error.violations) - number
            del detail.field_violations[-1]
            detail.field_violations.add(description=f"{rest} more violations; fix these first")
            break
    return detail


def _append(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    if status.ByteSize() + packed.ByteSize() <= _STATUS_BYTES:
        status.details.append(packed)


def _shortened(text: str, limit: int) -> str:
    """`text`, cut to `limit` bytes as encoded in a header."""
    # A lone surrogate, from undecodable output of a program, would make the status invalid.
    text = text[: limit + 1].encode(errors="replace").decode()
    # lengths[n] is the encoded length of the first n characters, in ascending order.
    lengths = list(accumulate(map(_header_length, text), initial=0))
    if lengths[-1] <= limit:
        return text
    kept = bisect_right(lengths, limit - _header_length(_ELLIPSIS)) - 1
    return text[:kept] + _ELLIPSIS if kept > 0 else ""


def _header_length(char: str) -> int:
    """Bytes of a character in a header, where all but printable ASCII is percent-encoded."""
    return sum(1 if 0x20 <= byte <= 0x7E and byte != ord("%") else 3 for byte in char.encode())  # noqa: PLR2004 - ASCII


class ErrorInterceptor(Interceptor):
    """Ends a failed call with the status of its error."""

    @override
    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[None]:
        structlog.contextvars.bind_contextvars(rpc=call.method)
        try:
            yield
        except grpc.aio.AbortError:
            # The status of the call is already set.
            raise
        except asyncio.CancelledError as error:
            if _task_is_cancelled():
                raise
            status = _unexpected(error)
        except Exception as error:
            if call.context.done() or call.context.cancelled():
                # The caller has disconnected; a write to it fails like this.
                _log.debug("call ended before its error could be sent", error=repr(error))
                raise
            domain_error = _domain_error(error)
            status = status_of(domain_error) if domain_error is not None else _unexpected(error)
        else:
            return
        outcome = rpc_status.to_status(status)
        await call.context.abort(outcome.code, outcome.details, outcome.trailing_metadata)


def _task_is_cancelled() -> bool:
    """Whether this call is being cancelled. If not, a task that the handler awaited was, which is a bug."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0


def _domain_error(error: BaseException) -> GpudockError | None:
    """The domain error to report: `error`, or the first of a group of domain errors only; else None."""
    if isinstance(error, GpudockError):
        return error
    if isinstance(error, ExceptionGroup):
        known, rest = error.split(GpudockError)
        if known is not None and rest is None:
            return _domain_error(known.exceptions[0])
    return None


def _unexpected(error: BaseException) -> status_pb2.Status:
    error_id = new_error_id()
    _log.error("unexpected error", error_id=error_id, exc_info=error)
    return internal_status(error_id)
