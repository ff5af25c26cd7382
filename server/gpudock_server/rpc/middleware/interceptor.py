"""One way to put something around a call, whichever of the four kinds of RPC it is."""

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

    `request` is the message, or the iterator of them where the caller streams; whoever is around the call may put
    another in its place, for example an iterator that looks at what passes.
    """

    method: str
    request: Any
    context: Context
    request_streaming: bool


CallContext: TypeAlias = Callable[[Call], AbstractAsyncContextManager[None]]


def wrap(method: str, handler: Handler, around: CallContext) -> Handler:
    """Return a handler of the same kind whose behaviour runs inside `around(call)`.

    What the behaviour raises passes through the context manager, also in the midst of a stream. Everything happens in
    the task of the call: a variable set on entering is seen by the behaviour.
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
        # A coroutine that writes, and no generator: a call that is cancelled while it sends leaves a generator
        # suspended at its yield, to be closed by the garbage collector some time later and in another task.
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
        # grpc.aio would run a plain function in a thread pool, outside of everything that is around the call.
        raise TypeError(f"{call.method} is served by {behaviour!r}, which is neither a coroutine nor a generator")
    return result


class Interceptor(_ServerInterceptor, ABC):
    """A server interceptor that is a context manager around every call."""

    @abstractmethod
    def around(self, call: Call) -> AbstractAsyncContextManager[None]:
        """What the behaviour of `call` runs inside of."""

    @override
    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        handler: Handler | None = await continuation(handler_call_details)
        if handler is None:
            # Nobody serves this method; grpc answers UNIMPLEMENTED.
            return handler  # type: ignore[return-value] # the stubs do not know this case
        return wrap(handler_call_details.method, handler, self.around)
