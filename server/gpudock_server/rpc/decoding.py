"""Bytes that are not the message they should be are the caller's mistake, and said to be one.

grpc decodes a request before it calls anything of ours, and gives the text of the failure away. Here such bytes pass as
a `_Malformed` through whatever is around the call, and end it with InvalidArgument. The other way round, a response
that is bytes already is taken for encoded.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from typing_extensions import override

from gpudock_server.errors import FieldViolation, InvalidArgument
from gpudock_server.rpc.interception import Call, Handler, Interceptor

if TYPE_CHECKING:
    _MethodHandler = grpc.RpcMethodHandler[Any, Any]
else:
    # Generic in its stubs only.
    _MethodHandler = grpc.RpcMethodHandler


class _Malformed:
    """Takes the place of a request that could not be read."""


class DecodingInterceptor(Interceptor):
    """Goes last, next to the services, so that every other interceptor is around what it raises."""

    @override
    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        async def tolerant(details: grpc.HandlerCallDetails) -> Handler:
            handler: Handler | None = await continuation(details)
            return _Tolerant(handler) if handler is not None else handler  # type: ignore[return-value]  # UNIMPLEMENTED

        return await super().intercept_service(tolerant, handler_call_details)

    @override
    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[None]:
        if call.request_streaming:
            call.request = _checked(call.request)
        else:
            _check(call.request)
        yield


class _Tolerant(_MethodHandler):
    """A handler whose deserializer raises nothing."""

    def __init__(self, handler: Handler) -> None:
        self.request_streaming = handler.request_streaming
        self.response_streaming = handler.response_streaming
        self.unary_unary = handler.unary_unary
        self.unary_stream = handler.unary_stream
        self.stream_unary = handler.stream_unary
        self.stream_stream = handler.stream_stream
        self.response_serializer = _unless_encoded(handler.response_serializer)
        self.request_deserializer = _tolerant(handler.request_deserializer)


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def read(raw: bytes) -> Any:  # noqa: ANN401 - a message of any type
        try:
            return deserialize(raw)
        except DecodeError:
            return _Malformed()

    return read


def _unless_encoded(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    if serialize is None:
        return None

    def write(message: Any) -> bytes:  # noqa: ANN401 - a message of any type, or its bytes
        return message if isinstance(message, bytes) else serialize(message)

    return write


async def _checked(requests: Any) -> AsyncIterator[Any]:  # noqa: ANN401 - an iterator of any message
    async for request in requests:
        _check(request)
        yield request


def _check(request: object) -> None:
    if isinstance(request, _Malformed):
        raise InvalidArgument((FieldViolation("request", "is not an encoded message of this RPC's type"),))
