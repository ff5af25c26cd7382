"""Random messages, to every RPC, through a real channel to a real daemon: never INTERNAL, never UNKNOWN.

`GPUDOCK_FUZZ_EXAMPLES=100000 make test PYTEST_ARGS=tests/engine/test_fuzz.py` is the acceptance run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.calls import Caller
from tests.conftest import FAST, own_state
from tests.rig import Daemon, Rig
from tests.rpc.fuzz_requests import CALLS, EXAMPLES, Call, damaged, outcome, requests

_EACH = max(1, EXAMPLES // len(CALLS))
_SECONDS = 10.0
_NEVER = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)


@pytest.fixture(scope="module")
def victim(rig: Rig) -> Iterator[Daemon]:
    daemon = rig.daemon(*FAST, *own_state())
    yield daemon
    assert daemon.running, daemon.log_text
    _, _, trace = daemon.log_text.partition("Traceback")
    assert not trace, trace[:4000]
    daemon.stop()
    rig.engine.remove_all()


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.path.rpartition("/")[2])
def test_any_message(victim: Daemon, loop: asyncio.AbstractEventLoop, call: Call) -> None:
    channel = loop.run_until_complete(_open(victim.target))
    message = requests(call.request) | damaged(call.request)
    many = st.lists(message, min_size=1, max_size=3 if call.client_streaming else 1)

    @settings(
        max_examples=_EACH,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(many)
    def fuzz(messages: list[Message]) -> None:
        code = loop.run_until_complete(outcome(channel, call, messages, _SECONDS))
        assert code not in _NEVER

    try:
        fuzz()
    finally:
        loop.run_until_complete(channel.close(None))
        loop.run_until_complete(_empty(victim.target))


async def _open(target: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(target)


async def _empty(target: str) -> None:
    async with Caller(target) as caller:
        await caller.delete_all()
