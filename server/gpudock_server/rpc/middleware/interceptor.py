"""Base class of interceptors: a context manager around each call, for all four kinds of RPC."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import grpc.aio
from typing_extensions import override

if TYPE_CHECKING:
    _ServerInterceptor = grpc.aio.ServerInterceptor[Any, Any]
else:
    # Generic in its stubs only.
    _ServerInterceptor = grpc.aio.ServerInterceptor

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(slots=True)
class Call:
    """One call. `method` is its full name, `/package.Service/Method`.

    `request` is the message, or an iterator of messages if the caller streams. An interceptor may replace it, for
    example with an iterator that inspects the messages.
    """

    method: str
    request: Any
    context: Context
    request_streaming: bool


CallContext: TypeAlias = Callable[[Call], AbstractAsyncContextManager[None]]


def wrap(method: str, handler: Handler, around: CallContext) -> Handler:
    """Return a handler of the same kind whose behaviour runs inside `around(call)`.

    Exceptions of the behaviour pass through the context manager, also in the middle of a stream. Everything runs in the
    task of the call: the behaviour sees context variables that the context manager has set.
    """
    if handler.response_streaming:
        behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
    else:
        behaviour = handler.stream_unary if handler.request_streaming else handler.unary_unary

    async def answer(request: Any, context: Context) -> Any:  # noqa: ANN401 - messages of any type pass here
        call = Call(method, request, context, handler.request_streaming)
        async with around(call):
            return await _call(behaviour, call)

    async def stream(request: Any, context: Context) -> None:  # noqa: ANN401 - messages of any type pass here
        # A coroutine that writes, not a generator: a call that is cancelled while it sends would leave a generator
        # suspended at its yield, and the garbage collector would close it later, in another task.
        call = Call(method, request, context, handler.request_streaming)
        async with around(call):
            responses = _call(behaviour, call)
            if not inspect.isasyncgen(responses):
                await responses
                return
            async with aclosing(responses):
                async for response in responses:
                    await context.write(response)

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    wrapped: Handler = make(
        stream if handler.response_streaming else answer,
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
    return wrapped


def _call(behaviour: Any, call: Call) -> Any:  # noqa: ANN401 - the four kinds have no common type
    result = behaviour(call.request, call.context)
    if not (inspect.isawaitable(result) or inspect.isasyncgen(result)):
        # grpc.aio would run a plain function in a thread pool, outside of the context managers.
        raise TypeError(f"{call.method}: {behaviour!r} must return an awaitable or an async generator")
    return result


class Interceptor(_ServerInterceptor, ABC):
    """A server interceptor that is a context manager around every call."""

    @abstractmethod
    def around(self, call: Call) -> AbstractAsyncContextManager[None]:
        """The context manager that the behaviour of `call` runs in."""

    @override
    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler: Handler | None = await continuation(handler_call_details)
        if handler is None:
            # No service has this method; grpc answers UNIMPLEMENTED.
            return handler  # type: ignore[return-value] # the stubs do not know this case
        return wrap(handler_call_details.method, handler, self.around)
