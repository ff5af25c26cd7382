"""The server as a whole: what no caller can do to it, and the services that every server has."""

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

from tests.rpc.fuzz_requests import CALLS, EXAMPLES, Call, damaged, outcome, requests
from tests.rpc.serving import SOON, Served, create_request, made, reason_of, serve, to_the_end


@pytest.mark.parametrize("call", CALLS, ids=[call.path for call in CALLS])
async def test_bytes_that_are_no_message_are_the_callers_fault(served: Served, call: Call) -> None:
    kind = f"{'stream' if call.client_streaming else 'unary'}_{'stream' if call.server_streaming else 'unary'}"
    stub = getattr(served.channel, kind)(call.path)
    answer = stub(iter([b"\xff\xff"])) if call.client_streaming else stub(b"\xff\xff")
    if call.server_streaming:
        _, error = await to_the_end(answer)
    else:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer
        error = caught.value
    assert error is not None
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def end_every_process(served: Served) -> None:
    """Processes that say something and end."""
    while True:
        session = await served.engine.sessions.get()
        session.say(b"x")
        session.end(0)


FORESEEN = {code for code in grpc.StatusCode if code not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)}


@pytest.mark.parametrize("call", CALLS, ids=[call.path for call in CALLS])
def test_any_request_has_a_foreseen_end(tmp_path: Path, call: Call) -> None:
    with asyncio.Runner() as runner:
        serving = serve(tmp_path)
        served = runner.run(serving.__aenter__())
        runner.run(made(served))
        ending = runner.get_loop().create_task(end_every_process(served))

        @settings(
            max_examples=max(10, EXAMPLES // 10 // len(CALLS)),
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(st.lists(requests(call.request) | damaged(call.request), min_size=1, max_size=3))
        def check(messages: list[Message]) -> None:
            assert runner.run(outcome(served.channel, call, messages, 0.5)) in FORESEEN

        try:
            check()
        finally:
            ending.cancel()
            runner.run(serving.__aexit__(None, None, None))


async def test_health_of_each_service(served: Served) -> None:
    health = health_pb2_grpc.HealthStub(served.channel)
    await served.server.set_serving(True)
    for service in ("", *GPUDOCK_SERVICES):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest(service=GPUDOCK_SERVICES[0]))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    await served.server.set_serving(False)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()


async def test_reflection_describes_everything(served: Served) -> None:
    reflection = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    asked = [
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
    answers = [answer async for answer in reflection.ServerReflectionInfo(iter(asked))]
    names = {service.name for service in answers[0].list_services_response.service}
    assert names >= {*GPUDOCK_SERVICES, "grpc.health.v1.Health", "grpc.channelz.v1.Channelz"}
    assert all(answer.HasField("file_descriptor_response") for answer in answers[1:])


async def test_channelz_answers(served: Served) -> None:
    channelz = channelz_pb2_grpc.ChannelzStub(served.channel)
    answer = await channelz.GetServers(channelz_pb2.GetServersRequest())
    assert answer.server


async def test_shutting_down_ends_streams_with_a_clear_status(served: Served) -> None:
    gate = served.engine.gates["create"] = asyncio.Event()
    call = served.containers.CreateContainer(create_request())
    stream = aiter(call)
    await anext(stream)
    draining = asyncio.create_task(served.operations.drain(SOON))
    await asyncio.sleep(0)
    gate.set()
    await draining
    _, error = await to_the_end(stream)
    assert reason_of(error) == "SHUTTING_DOWN"
