"""Callers without an identity use little memory and do not affect other callers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from gpudock_server.rpc.health import MAX_ANONYMOUS_WATCHES, HealthService
from gpudock_server.rpc.listeners import listen
from gpudock_server.rpc.middleware import identity
from gpudock_server.rpc.middleware.bearer_tokens import TokenFile
from gpudock_server.rpc.server import interceptors
from gpudock_server.settings.definitions import Settings
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.calls import failure_of
from tests.rig.patience import limit
from tests.rpc.probe import Message, Probe, serve_probe

TOKEN = "0123456789abcdef0123456789abcdef"  # noqa: S105 - an example
BEARER = (("authorization", f"Bearer {TOKEN}"),)
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    tokens = tmp_path / "tokens"
    tokens.write_text(f"ci:{TOKEN}\n")
    tokens.chmod(0o600)
    return Settings(socket=tmp_path / "socket", listen=("127.0.0.1:0",), token_file=tokens)


@asynccontextmanager
async def health_at(settings: Settings, health: HealthService) -> AsyncIterator[tuple[str, ...]]:
    """Serve `health` behind the interceptors of the daemon; yield its addresses, the unix socket first."""
    assert settings.token_file is not None
    server = grpc.aio.server(interceptors=interceptors(TokenFile(settings.token_file)))
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    listeners = listen(server, settings)
    await server.start()
    try:
        yield listeners.addresses
    finally:
        await server.stop(0)
        listeners.close()


async def first_answer(watch: Any) -> str:
    """Return the first status of a watch, or the reason of its error."""
    try:
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name((await watch.read()).status))
    except grpc.aio.AioRpcError as error:
        return failure_of(error).reason


async def test_watches_without_an_identity_are_limited_and_others_are_not(settings: Settings) -> None:
    async with (
        health_at(settings, HealthService()) as (unix, tcp),
        grpc.aio.insecure_channel(tcp) as channel,
        grpc.aio.insecure_channel(unix) as local,
    ):
        anonymous, identified = health_pb2_grpc.HealthStub(channel), health_pb2_grpc.HealthStub(local)
        request = health_pb2.HealthCheckRequest()
        watches = [anonymous.Watch(request) for _ in range(500)]
        ends = Counter(await asyncio.gather(*map(first_answer, watches)))
        assert ends == {"SERVING": MAX_ANONYMOUS_WATCHES, "HEALTH_WATCH_LIMIT": 500 - MAX_ANONYMOUS_WATCHES}
        # Other callers are served.
        assert (await anonymous.Check(request)).status == SERVING
        assert await first_answer(anonymous.Watch(request, metadata=BEARER)) == "SERVING"
        assert await first_answer(identified.Watch(request)) == "SERVING"
        for watch in watches:
            watch.cancel()
        while await first_answer(anonymous.Watch(request)) != "SERVING":
            await asyncio.sleep(0.02)


async def test_the_name_of_a_watched_service_is_limited_in_length(settings: Settings) -> None:
    async with health_at(settings, HealthService()) as (_unix, tcp), grpc.aio.insecure_channel(tcp) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert await first_answer(stub.Watch(health_pb2.HealthCheckRequest(service="x" * 256))) == "SERVICE_UNKNOWN"
        for length in (257, 1 << 20):
            assert (
                await first_answer(stub.Watch(health_pb2.HealthCheckRequest(service="x" * length)))
                == "INVALID_ARGUMENT"
            )


async def test_a_watch_whose_caller_does_not_read_does_not_delay_others() -> None:
    class BlockedContext:
        async def write(self, _answer: object) -> None:
            await asyncio.Event().wait()

    class RecordingContext:
        def __init__(self) -> None:
            self.statuses: asyncio.Queue[int] = asyncio.Queue()

        async def write(self, answer: Any) -> None:
            await self.statuses.put(answer.status)

    health, recording = HealthService(), RecordingContext()
    request = health_pb2.HealthCheckRequest()
    watches = [asyncio.create_task(health.Watch(request, context)) for context in (BlockedContext(), recording)]  # type: ignore[arg-type]  # the only method that Watch uses
    assert await recording.statuses.get() == SERVING
    health.set("", NOT_SERVING)
    assert await asyncio.wait_for(recording.statuses.get(), limit(10)) == NOT_SERVING
    for watch in watches:
        watch.cancel()
    await asyncio.gather(*watches, return_exceptions=True)


@pytest.mark.parametrize(("kind", "make"), [("OneToOne", "stream_unary"), ("OneToMany", "stream_stream")])
async def test_a_call_is_refused_before_its_request_is_read(settings: Settings, kind: str, make: str) -> None:
    async with serve_probe(Probe(), settings) as (_unix, tcp), grpc.aio.insecure_channel(tcp) as channel:
        # As a client stream, which can send headers without a request.
        method = getattr(channel, make)(
            f"/gpudock.probe.Probe/{kind}",
            request_serializer=Message.SerializeToString,
            response_deserializer=Message.FromString,
        )
        call = method(timeout=limit(20))
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_server_does_not_wait_for_requests_of_anonymous_callers(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_ANONYMOUS_READ_SECONDS", 0.2)
    async with health_at(settings, HealthService()) as (_unix, tcp), grpc.aio.insecure_channel(tcp) as channel:
        check: Any = channel.stream_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=health_pb2.HealthCheckResponse.FromString,
        )
        silent = [check(timeout=limit(20)) for _ in range(identity._ANONYMOUS_READS + 1)]
        assert {await call.code() for call in silent} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        # The server ended them, and not the deadlines of these calls.
        assert {await call.details() for call in silent} == {"no request received within 0.2 s"}
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=limit(20))
        assert answer.status == SERVING
