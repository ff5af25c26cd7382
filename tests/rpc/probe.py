"""A service with a method of each of the four kinds, which a test controls, behind the interceptors of the daemon."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from gpudock_server.rpc.listeners import SERVER_OPTIONS, listen
from gpudock_server.rpc.middleware.bearer_tokens import TokenFile
from gpudock_server.rpc.middleware.interceptor import Context
from gpudock_server.rpc.server import interceptors
from gpudock_server.settings.definitions import Settings

from tests.rig.patience import limit

SERVICE = "gpudock.probe.Probe"
KINDS = ("OneToOne", "OneToMany", "ManyToOne", "ManyToMany")


def _message() -> Any:
    """Message { string name = 1; string request_id = 2; string container = 3; Message start = 4; }."""
    file = descriptor_pb2.FileDescriptorProto(name="gpudock/probe.proto", package="gpudock.probe", syntax="proto3")
    message = file.message_type.add(name="Message")
    kinds = descriptor_pb2.FieldDescriptorProto
    for number, name in enumerate(("name", "request_id", "container"), start=1):
        message.field.add(name=name, number=number, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    message.field.add(
        name="start",
        number=4,
        type=kinds.TYPE_MESSAGE,
        type_name=".gpudock.probe.Message",
        label=kinds.LABEL_OPTIONAL,
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("gpudock.probe.Message"))


Message: Any = _message()


async def _do_nothing(_context: Context) -> None:
    pass


@dataclass
class Probe:
    """The methods. `act` runs between the first and the last reply; a unary method has only the last."""

    act: Callable[[Context], Awaitable[None]] = _do_nothing
    ended: list[str] = field(default_factory=list)

    async def one_to_one(self, request: Any, context: Context) -> Any:
        """Return the request."""
        await self.act(context)
        return request

    async def one_to_many(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """Yield the request twice."""
        try:
            yield request
            await self.act(context)
            yield request
        finally:
            self.ended.append("OneToMany")

    async def many_to_one(self, requests: AsyncIterator[Any], context: Context) -> Any:
        """Return the last request."""
        received = [request async for request in requests]
        await self.act(context)
        return received[-1]

    async def many_to_many(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """Yield every request, and the last one twice."""
        async for request in requests:
            yield request
        await self.act(context)
        yield request

    def handlers(self, service: str) -> grpc.GenericRpcHandler[Any, Any]:
        """Return the methods under the name of `service`."""
        coding = {"request_deserializer": Message.FromString, "response_serializer": Message.SerializeToString}
        methods: dict[str, Any] = {
            "OneToOne": grpc.unary_unary_rpc_method_handler(self.one_to_one, **coding),
            "OneToMany": grpc.unary_stream_rpc_method_handler(self.one_to_many, **coding),
            "ManyToOne": grpc.stream_unary_rpc_method_handler(self.many_to_one, **coding),
            "ManyToMany": grpc.stream_stream_rpc_method_handler(self.many_to_many, **coding),
            "GetSomething": grpc.unary_unary_rpc_method_handler(self.one_to_one, **coding),
            "Sync": grpc.unary_unary_rpc_method_handler(lambda request, _context: request, **coding),
        }
        return grpc.method_handlers_generic_handler(service, methods)


@asynccontextmanager
async def serve_probe(probe: Probe, settings: Settings) -> AsyncIterator[tuple[str, ...]]:
    """Serve the probe with the options of the daemon; yield the addresses of the server."""
    tokens = TokenFile(settings.token_file) if settings.token_file else None
    server = grpc.aio.server(interceptors=interceptors(tokens), options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((probe.handlers(SERVICE), probe.handlers("grpc.health.v1.Health")))
    listeners = listen(server, settings)
    await server.start()
    try:
        yield listeners.addresses
    finally:
        await server.stop(0)
        listeners.close()


def begin(
    channel: grpc.aio.Channel,
    kind: str,
    *,
    service: str = SERVICE,
    requests: Sequence[Any] = (Message(name="train"), Message(name="other")),
    metadata: Sequence[tuple[str, str]] = (),
) -> Any:
    """Begin a call of the method of this kind. A client stream sends `requests`; without any it sends nothing."""
    make = {
        "OneToMany": channel.unary_stream,
        "ManyToOne": channel.stream_unary,
        "ManyToMany": channel.stream_stream,
    }.get(kind, channel.unary_unary)
    stub: Any = make(
        f"/{service}/{kind}", request_serializer=Message.SerializeToString, response_deserializer=Message.FromString
    )
    if not kind.startswith("Many"):
        return stub(requests[0] if requests else Message(), metadata=metadata, timeout=limit(20))
    return stub(iter(requests) if requests else None, metadata=metadata, timeout=limit(20))


async def replies_of(call: Any) -> list[Any]:
    """Return all replies of a call. Raises AioRpcError."""
    return [reply async for reply in call] if hasattr(call, "__aiter__") else [await call]


async def call(channel: grpc.aio.Channel, kind: str, **options: Any) -> list[Any]:
    """Make a call; return its replies."""
    return await replies_of(begin(channel, kind, **options))
