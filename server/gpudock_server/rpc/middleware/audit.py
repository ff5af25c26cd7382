"""Audit log: caller, method, target, outcome and duration of every call that may change something."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import structlog
from google.protobuf.message import Message
from typing_extensions import override

from gpudock_server.logs import truncate
from gpudock_server.rpc.middleware.errors import code_of
from gpudock_server.rpc.middleware.identity import caller
from gpudock_server.rpc.middleware.interceptor import Call, Interceptor

_PACKAGE_PREFIX = "/gpudock."
# Methods of the contract that change nothing start with one of these.
_READ_METHOD_PREFIXES = ("Get", "List", "Watch", "Stream")
# Fields of a request that name its target, the most specific first.
_NAME_FIELDS = ("name", "container", "id", "operation_id")
# The field of the first ExecContainerRequest that holds the target.
_EXEC_START_FIELD = "start"

_log = structlog.stdlib.get_logger("gpudock.audit")


class AuditInterceptor(Interceptor):
    """Logs every call that may change something."""

    @override
    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[None]:
        method = call.method.rpartition("/")[2]
        if not call.method.startswith(_PACKAGE_PREFIX) or method.startswith(_READ_METHOD_PREFIXES):
            yield
            return
        begin = time.monotonic()
        first = _FirstRequest(call)
        outcome = "OK"
        try:
            yield
        except grpc.aio.AbortError:
            outcome = call.context.code().name
            raise
        except BaseException as error:
            outcome = code_of(error).name
            raise
        finally:
            _log.info(
                "call",
                method=method,
                **caller().log_fields(),
                peer=call.context.peer(),
                outcome=outcome,
                duration_seconds=round(time.monotonic() - begin, 3),
                **_target(first.request),
            )


class _FirstRequest:
    """Keeps the request, or the first message of a stream, which names the target."""

    def __init__(self, call: Call) -> None:
        self.request: Any = None
        if call.request_streaming:
            call.request = self._forward(call.request)
        else:
            self.request = call.request

    async def _forward(self, requests: Any) -> AsyncIterator[Any]:  # noqa: ANN401 - messages of any type
        async for request in requests:
            if self.request is None:
                self.request = request
            yield request


def _target(request: object) -> dict[str, str]:
    """The target and the request_id of a request. Other fields may hold secrets and are not logged."""
    if not isinstance(request, Message):
        return {}
    fields = request.DESCRIPTOR.fields_by_name
    if (
        _EXEC_START_FIELD in fields
        and fields[_EXEC_START_FIELD].message_type is not None
        and request.HasField(_EXEC_START_FIELD)
    ):
        return _target(getattr(request, _EXEC_START_FIELD))
    found = {
        field: truncate(str(getattr(request, field))) for field in (*_NAME_FIELDS, "request_id") if field in fields
    }
    target = next((found[field] for field in _NAME_FIELDS if found.get(field)), "")
    return {key: value for key, value in (("target", target), ("request_id", found.get("request_id"))) if value}
