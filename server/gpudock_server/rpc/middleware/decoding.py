"""Reports undecodable requests as INVALID_ARGUMENT, and reads unary requests only after authentication.

grpc decodes a request before it calls an interceptor, and reports the text of a failure to the caller. Here an
undecodable request passes the other interceptors as `_Malformed` and then ends the call with InvalidArgument. A
response that is already bytes is sent as it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from typing_extensions import override

from gpudock_server.errors import FieldViolation, InvalidArgument
from gpudock_server.rpc.middleware.identity import HEALTH_METHOD_PREFIX
from gpudock_server.rpc.middleware.interceptor import Call, Context, Handler, Interceptor

if TYPE_CHECKING:
    _MethodHandler = grpc.RpcMethodHandler[Any, Any]
else:
    # Generic in its stubs only.
    _MethodHandler = grpc.RpcMethodHandler


# A health request only names a service. Callers need no authentication, so longer requests are not decoded.
_MAX_HEALTH_REQUEST_BYTES = 1024


class _Malformed:
    """Stands for a request that could not be decoded."""


class DecodingInterceptor(Interceptor):
    """Raises InvalidArgument for undecodable requests."""

    @override
    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        async def lenient_continuation(details: grpc.HandlerCallDetails) -> Handler:
            handler: Handler | None = await continuation(details)
            if handler is None:
                return handler  # type: ignore[return-value]  # UNIMPLEMENTED
            return _LenientHandler(
                handler, _MAX_HEALTH_REQUEST_BYTES if details.method.startswith(HEALTH_METHOD_PREFIX) else sys.maxsize
            )

        return await super().intercept_service(lenient_continuation, handler_call_details)

    @override
    @asynccontextmanager
    async def around(self, call: Call) -> AsyncIterator[None]:
        if call.request_streaming:
            call.request = _check_each(call.request)
        else:
            _check(call.request)
        yield


class _LenientHandler(_MethodHandler):
    """A handler whose deserializer does not raise, and that reads the request of a unary call itself.

    grpc reads the request of a unary call before it calls an interceptor: megabytes from a caller who is then refused.
    It reads a stream only on demand. For the caller a unary call and a stream of one request are the same.
    """

    def __init__(self, handler: Handler, limit: int) -> None:
        self.request_streaming = True
        self.response_streaming = handler.response_streaming
        self.unary_unary = self.unary_stream = None
        self.stream_unary = handler.stream_unary
        self.stream_stream = handler.stream_stream
        if handler.unary_unary is not None:
            self.stream_unary = _unary_as_stream(handler.unary_unary)
        elif handler.unary_stream is not None:
            self.stream_stream = _unary_stream_as_stream(handler.unary_stream)
        self.response_serializer = _bytes_or(handler.response_serializer)
        self.request_deserializer = _lenient_deserializer(handler.request_deserializer, limit)


def _unary_as_stream(behaviour: Any) -> Any:  # noqa: ANN401 - grpc's behaviours have no common type
    async def answer(requests: AsyncIterator[Any], context: Context) -> Any:  # noqa: ANN401 - a message of any type
        return await _await_result(behaviour, behaviour(await _single_request(requests), context))

    return answer


def _unary_stream_as_stream(behaviour: Any) -> Any:  # noqa: ANN401 - grpc's behaviours have no common type
    async def stream(requests: AsyncIterator[Any], context: Context) -> None:
        responses = behaviour(await _single_request(requests), context)
        if not inspect.isasyncgen(responses):
            await _await_result(behaviour, responses)
            return
        async with aclosing(responses):
            async for response in responses:
                await context.write(response)

    return stream


async def _await_result(behaviour: object, result: Any) -> Any:  # noqa: ANN401 - a message of any type
    if not inspect.isawaitable(result):
        # grpc.aio would run a plain function in a thread pool, outside of the context managers.
        raise TypeError(f"{behaviour!r} must return an awaitable or an async generator")
    return await result


async def _single_request(requests: AsyncIterator[Any]) -> Any:  # noqa: ANN401 - a message of any type
    async for request in requests:
        return request
    raise InvalidArgument((FieldViolation("request", "is required"),))


def _lenient_deserializer(deserialize: Callable[[bytes], Any] | None, limit: int) -> Callable[[bytes], Any] | None:
    if deserialize is None:
        return None

    def read(raw: bytes) -> Any:  # noqa: ANN401 - a message of any type
        if len(raw) > limit:
            return _Malformed()
        try:
            return deserialize(raw)
        except DecodeError:
            return _Malformed()

    return read


def _bytes_or(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    if serialize is None:
        return None

    def write(message: Any) -> bytes:  # noqa: ANN401 - a message of any type, or its bytes
        return message if isinstance(message, bytes) else serialize(message)

    return write


async def _check_each(requests: Any) -> AsyncIterator[Any]:  # noqa: ANN401 - an iterator of any message
    async for request in requests:
        _check(request)
        yield request


def _check(request: object) -> None:
    if isinstance(request, _Malformed):
        raise InvalidArgument((FieldViolation("request", "cannot be decoded as the request message of this RPC"),))
