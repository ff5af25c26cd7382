"""A gRPC server of the contract on a unix socket, whose answers a test defines."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, descriptor, duration_pb2, message_factory
from google.rpc import error_details_pb2, status_pb2
from gpudock.v1 import container_service_pb2, node_service_pb2, operation_service_pb2, volume_service_pb2

_SERVICES: tuple[descriptor.ServiceDescriptor, ...] = tuple(
    file.DESCRIPTOR.services_by_name[name]
    for file, name in (
        (container_service_pb2, "ContainerService"),
        (volume_service_pb2, "VolumeService"),
        (node_service_pb2, "NodeService"),
        (operation_service_pb2, "OperationService"),
    )
)

Context = grpc.aio.ServicerContext[Any, Any]
Answer = Callable[[Any, Context], Any]


class ScriptedServer:
    """Answers each RPC as a test has defined, and records the requests."""

    def __init__(self, socket: Path) -> None:
        self.address = f"unix:{socket}"
        self.requests: dict[str, list[Any]] = defaultdict(list)
        self.metadata: list[dict[str, str | bytes]] = []
        self._answers: dict[str, list[Answer]] = defaultdict(list)
        self._server: grpc.aio.Server | None = None

    def on(self, rpc: str, *answers: Answer) -> None:
        """Define the answers to the calls of `rpc` in order; the last one answers all later calls.

        An answer is a coroutine function for a unary RPC and an async generator function for a stream.
        """
        self._answers[rpc] = list(answers)

    async def start(self) -> None:
        """Start to listen."""
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers([self._handler(service) for service in _SERVICES])
        self._server.add_insecure_port(self.address)
        await self._server.start()

    async def stop(self) -> None:
        """End all calls and stop listening. The server can be started again."""
        if self._server is not None:
            await self._server.stop(0)

    def _handler(self, service: descriptor.ServiceDescriptor) -> grpc.GenericRpcHandler[Any, Any]:
        handlers = {method.name: self._method_handler(method) for method in service.methods}
        return grpc.method_handlers_generic_handler(service.full_name, handlers)

    def _method_handler(self, method: Any) -> grpc.RpcMethodHandler[Any, Any]:
        async def unary(request: Any, context: Context) -> Any:
            return await self._take(method.name, request, context)(request, context)

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async for message in self._take(method.name, request, context)(request, context):
                yield message

        make, behaviour = grpc.unary_unary_rpc_method_handler, unary
        if method.server_streaming:
            make = (
                grpc.stream_stream_rpc_method_handler
                if method.client_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            behaviour = stream  # type: ignore[assignment]  # a unary or a streaming handler
        request_class = message_factory.GetMessageClass(method.input_type)
        return make(behaviour, request_class.FromString, lambda message: message.SerializeToString())

    def _take(self, rpc: str, request: Any, context: Context) -> Answer:
        self.requests[rpc].append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        answers = self._answers[rpc]
        return answers.pop(0) if len(answers) > 1 else answers[0]


async def abort(
    context: Context,
    code: grpc.StatusCode,
    reason: str,
    message: str = "no",
    *,
    metadata: dict[str, str] | None = None,
    violations: Iterable[tuple[str, str]] = (),
    retry_after: float | None = None,
) -> None:
    """End the call with an error as gpudockd does."""
    status = status_pb2.Status(code=code.value[0], message=message)
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=reason, domain="gpudock", metadata=metadata or {})]
    if violations:
        bad = error_details_pb2.BadRequest()
        for field, description in violations:
            bad.field_violations.add(field=field, description=description)
        details.append(bad)
    if retry_after is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    await context.abort(code, message, (("grpc-status-details-bin", status.SerializeToString()),))


def error_reply(code: grpc.StatusCode, reason: str, message: str = "no", **details: Any) -> Answer:
    """Return a unary answer with this error."""

    async def answer(_: Any, context: Context) -> None:
        await abort(context, code, reason, message, **details)

    return answer


def reply_with(message: Any) -> Answer:
    """Return a unary answer with this message."""

    async def answer(_: Any, __: Context) -> Any:
        return message

    return answer


async def drop_connection(context: Context) -> None:
    """End the call as a lost connection does: UNAVAILABLE, without details of gpudockd."""
    await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")


async def drop_stream(_: Any, context: Context) -> AsyncIterator[Any]:
    """Drop the connection before the first message of a stream."""
    await drop_connection(context)
    yield


def unreadable_details() -> bytes:
    """Return bytes that are not a google.rpc.Status."""
    return base64.b64decode("//////8=")
