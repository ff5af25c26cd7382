"""Limits of connections: concurrent calls, age and idle time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from gpudock_server.rpc.listeners import listen
from gpudock_server.rpc.middleware.bearer_tokens import TokenFile
from gpudock_server.rpc.middleware.interceptor import Context
from gpudock_server.rpc.server import connection_options, interceptors
from gpudock_server.settings.definitions import Settings

from tests.rig.patience import limit
from tests.rpc.probe import SERVICE, Message, Probe, begin, call

TOKEN = "0123456789abcdef0123456789abcdef"  # noqa: S105 - an example
BEARER = (("authorization", f"Bearer {TOKEN}"),)
_MAX_CALLS = 1024


@asynccontextmanager
async def serve_with_limits(tmp_path: Path, probe: Probe, **seconds: float) -> AsyncIterator[str]:
    """Serve the probe with the connection options of the daemon; yield its TCP address."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"ci:{TOKEN}\n")
    tokens.chmod(0o600)
    settings = Settings(socket=tmp_path / "socket", listen=("127.0.0.1:0",), token_file=tokens)
    server = grpc.aio.server(interceptors=interceptors(TokenFile(tokens)), options=connection_options(**seconds))
    server.add_generic_rpc_handlers((probe.handlers(SERVICE),))
    listeners = listen(server, settings)
    await server.start()
    try:
        yield listeners.addresses[-1]
    finally:
        await server.stop(0)
        listeners.close()


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel with a connection of its own."""
    return grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))


async def test_the_concurrent_calls_of_a_connection_are_limited(tmp_path: Path) -> None:
    started: set[int] = set()
    release = asyncio.Event()

    async def wait(context: Context) -> None:
        metadata = dict(context.invocation_metadata() or ())
        if "number" in metadata:
            started.add(int(metadata["number"]))
            await release.wait()

    async with (
        serve_with_limits(tmp_path, Probe(wait)) as address,
        open_channel(address) as channel,
        open_channel(address) as other,
    ):
        # The first call tells the client the limit, so that it waits; otherwise the server would refuse excess calls.
        await call(channel, "OneToOne", metadata=BEARER)
        calls = [
            _call(channel, timeout=limit(120), metadata=(*BEARER, ("number", str(number))))
            for number in range(_MAX_CALLS + 50)
        ]
        async with asyncio.timeout(limit(60)):
            while len(started) < _MAX_CALLS:
                await asyncio.sleep(0.01)
        # A call on another connection is served; another call on this connection does not begin.
        await call(other, "OneToOne", metadata=BEARER)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await _call(channel, timeout=2, metadata=BEARER)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(started) == _MAX_CALLS
        # A client does not begin its calls in order.
        first = sorted(started)
        release.set()
        # Some of the excess calls can be refused, since all begin when the first ones end.
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [ended[number] for number in first] == [Message(name="train")] * _MAX_CALLS


def _call(channel: grpc.aio.Channel, timeout: float, metadata: Any) -> Any:
    method: Any = channel.unary_unary(
        f"/{SERVICE}/OneToOne",
        request_serializer=Message.SerializeToString,
        response_deserializer=Message.FromString,
    )
    return method(Message(name="train"), timeout=timeout, metadata=metadata)


async def test_an_old_connection_is_replaced_and_its_calls_continue(tmp_path: Path) -> None:
    peers: list[str] = []
    release = asyncio.Event()

    async def record_peer(context: Context) -> None:
        peers.append(context.peer())
        if ("slow", "yes") in (context.invocation_metadata() or ()):
            await release.wait()

    async with (
        serve_with_limits(tmp_path, Probe(record_peer), age_seconds=0.3) as address,
        open_channel(address) as channel,
    ):
        slow = begin(channel, "OneToMany", metadata=(*BEARER, ("slow", "yes")))
        assert await slow.read() == Message(name="train")
        async with asyncio.timeout(limit(15)):
            # Each connection has another port of the client.
            while len(set(peers)) < 3:
                await call(channel, "OneToOne", metadata=BEARER)
                await asyncio.sleep(0.02)
        release.set()
        assert await slow.read() == Message(name="train")
        assert await slow.code() is grpc.StatusCode.OK


async def test_an_idle_connection_is_closed(tmp_path: Path) -> None:
    async with serve_with_limits(tmp_path, Probe(), idle_seconds=0.3) as address, open_channel(address) as channel:
        await call(channel, "OneToOne", metadata=BEARER)
        async with asyncio.timeout(limit(15)):
            while (state := channel.get_state()) is grpc.ChannelConnectivity.READY:
                await channel.wait_for_state_change(state)
        # The next call opens it again.
        await call(channel, "OneToOne", metadata=BEARER)
