"""The whole server: any request has an expected outcome, and health, reflection and channelz are served."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc.aio
import pytest
from google.protobuf.message import Message
from gpudock_server.rpc.server import GPUDOCK_SERVICES
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.rpc.fuzz_requests import CALLS, EXAMPLES, Call, corrupted, outcome, requests
from tests.rpc.in_memory_server import (
    TIMEOUT_SECONDS,
    InMemoryServer,
    create_container,
    create_request,
    read_to_end,
    reason_of,
    serve,
)


@pytest.mark.parametrize("call", CALLS, ids=[call.path for call in CALLS])
async def test_bytes_that_are_not_a_message_are_an_invalid_argument(server: InMemoryServer, call: Call) -> None:
    kind = f"{'stream' if call.client_streaming else 'unary'}_{'stream' if call.server_streaming else 'unary'}"
    stub = getattr(server.channel, kind)(call.path)
    answer = stub(iter([b"\xff\xff"])) if call.client_streaming else stub(b"\xff\xff")
    if call.server_streaming:
        _, error = await read_to_end(answer)
    else:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer
        error = caught.value
    assert error is not None
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def exit_every_process(server: InMemoryServer) -> None:
    """Let every process write output and exit."""
    while True:
        session = await server.engine.sessions.get()
        session.write_output(b"x")
        session.exit(0)


EXPECTED_CODES = {code for code in grpc.StatusCode if code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)}


@pytest.mark.parametrize("call", CALLS, ids=[call.path for call in CALLS])
def test_any_request_has_an_expected_outcome(tmp_path: Path, call: Call) -> None:
    with asyncio.Runner() as runner:
        context = serve(tmp_path)
        server = runner.run(context.__aenter__())
        runner.run(create_container(server))
        exits = runner.get_loop().create_task(exit_every_process(server))

        @settings(
            max_examples=max(10, EXAMPLES // 10 // len(CALLS)),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(requests(call.request) | corrupted(call.request), min_size=1, max_size=3))
        def check(messages: list[Message]) -> None:
            assert runner.run(outcome(server.channel, call, messages, 0.5)) in EXPECTED_CODES

        try:
            check()
        finally:
            exits.cancel()
            runner.run(context.__aexit__(None, None, None))


async def test_the_health_of_each_service_is_served(server: InMemoryServer) -> None:
    health = health_pb2_grpc.HealthStub(server.channel)
    await server.rpc_server.set_serving(True)
    for service in ("", *GPUDOCK_SERVICES):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest(service=GPUDOCK_SERVICES[0]))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    await server.rpc_server.set_serving(False)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()


async def test_reflection_describes_all_services(server: InMemoryServer) -> None:
    reflection = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    queries = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        *(
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)
            for symbol in (
                *GPUDOCK_SERVICES,
                "gpudock.v1.ErrorReason",
                "grpc.health.v1.Health",
                "grpc.channelz.v1.Channelz",
            )
        ),
    ]
    answers = [answer async for answer in reflection.ServerReflectionInfo(iter(queries))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert names >= {*GPUDOCK_SERVICES, "grpc.health.v1.Health", "grpc.channelz.v1.Channelz"}
    assert all(answer.HasField("file_descriptor_response") for answer in answers[1:])


async def test_channelz_is_served(server: InMemoryServer) -> None:
    channelz = channelz_pb2_grpc.ChannelzStub(server.channel)
    answer = await channelz.GetServers(channelz_pb2.GetServersRequest())
    assert answer.server


async def test_a_shutdown_ends_streams_with_shutting_down(server: InMemoryServer) -> None:
    gate = server.engine.gates["create"] = asyncio.Event()
    call = server.containers.CreateContainer(create_request())
    stream = aiter(call)
    await anext(stream)
    draining = asyncio.create_task(server.operations.drain(TIMEOUT_SECONDS))
    await asyncio.sleep(0)
    gate.set()
    await draining
    _, error = await read_to_end(stream)
    assert reason_of(error) == "SHUTTING_DOWN"
