"""How much goes on in one connection, and how long one lasts."""

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
_CALLS_AT_ONCE = 1024


@asynccontextmanager
async def probing(tmp_path: Path, probe: Probe, **seconds: float) -> AsyncIterator[str]:
    """A server with the daemon's options for connections; its TCP address."""
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


def connection(address: str) -> grpc.aio.Channel:
    """A channel with a connection of its own."""
    return grpc.aio.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))


async def test_a_connection_has_a_limit_of_calls_at_once(tmp_path: Path) -> None:
    begun: set[int] = set()
    release = asyncio.Event()

    async def wait(context: Context) -> None:
        metadata = dict(context.invocation_metadata() or ())
        if "number" in metadata:
            begun.add(int(metadata["number"]))
            await release.wait()

    async with probing(tmp_path, Probe(wait)) as address, connection(address) as one, connection(address) as other:
        # By the first call a client learns the limit, and waits from then on; before, the server refuses the surplus.
        await call(one, "OneToOne", metadata=BEARER)
        calls = [
            _one(one, timeout=limit(120), metadata=(*BEARER, ("number", str(number))))
            for number in range(_CALLS_AT_ONCE + 50)
        ]
        async with asyncio.timeout(limit(60)):
            while len(begun) < _CALLS_AT_ONCE:
                await asyncio.sleep(0.01)
        # A call of another connection is answered, one of this connection is not even begun.
        await call(other, "OneToOne", metadata=BEARER)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await _one(one, timeout=2, metadata=BEARER)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert len(begun) == _CALLS_AT_ONCE
        # A client does not begin its calls in the order in which they were made.
        first = sorted(begun)
        release.set()
        # Of the surplus some may be refused, where all begin in the moment that the others end.
        ended = await asyncio.gather(*calls, return_exceptions=True)
        assert [ended[number] for number in first] == [Message(name="train")] * _CALLS_AT_ONCE


def _one(channel: grpc.aio.Channel, timeout: float, metadata: Any) -> Any:
    method: Any = channel.unary_unary(
        f"/{SERVICE}/OneToOne",
        request_serializer=Message.SerializeToString,
        response_deserializer=Message.FromString,
    )
    return method(Message(name="train"), timeout=timeout, metadata=metadata)


async def test_an_old_connection_is_replaced_and_what_runs_in_it_goes_on(tmp_path: Path) -> None:
    peers: list[str] = []
    release = asyncio.Event()

    async def note(context: Context) -> None:
        peers.append(context.peer())
        if ("slow", "yes") in (context.invocation_metadata() or ()):
            await release.wait()

    async with probing(tmp_path, Probe(note), age_seconds=0.3) as address, connection(address) as channel:
        slow = begin(channel, "OneToMany", metadata=(*BEARER, ("slow", "yes")))
        assert await slow.read() == Message(name="train")
        async with asyncio.timeout(limit(15)):
            # Another port of the caller is another connection.
            while len(set(peers)) < 3:
                await call(channel, "OneToOne", metadata=BEARER)
                await asyncio.sleep(0.02)
        release.set()
        assert await slow.read() == Message(name="train")
        assert await slow.code() is grpc.StatusCode.OK


async def test_a_connection_without_a_call_is_closed(tmp_path: Path) -> None:
    async with probing(tmp_path, Probe(), idle_seconds=0.3) as address, connection(address) as channel:
        await call(channel, "OneToOne", metadata=BEARER)
        async with asyncio.timeout(limit(15)):
            while (state := channel.get_state()) is grpc.ChannelConnectivity.READY:
                await channel.wait_for_state_change(state)
        # And made again by the next call.
        await call(channel, "OneToOne", metadata=BEARER)
