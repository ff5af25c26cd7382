"""Random messages, to every RPC, through a real channel to a real daemon: never INTERNAL, never UNKNOWN.

Every second request is valid and refers to a pool of containers, volumes and operations (tests/engine/fuzz_pool.py);
validation must not refuse it. Of the others, most differ from a valid one in one field, and the rest are anything. The
run's summary shows how they ended: requests that never reach a container prove nothing of it.

`GPUDOCK_FUZZ_EXAMPLES=100000 make test-deep PYTEST_ARGS=tests/engine/test_fuzz.py` is the acceptance run.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Iterator

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.calls import Caller
from tests.conftest import FAST_FLAGS, own_state_flags, problems_at_end
from tests.engine.fuzz_pool import FOREIGN_VOLUME, VALID_REQUESTS, Pool
from tests.rig import Daemon, Rig
from tests.rpc.fuzz_requests import CALLS, EXAMPLES, Call, changes, corrupted, outcome, requests
from tests.run_report import OUTCOMES

pytestmark = pytest.mark.deep

# Each example is two requests.
_EACH = max(1, EXAMPLES // len(CALLS) // 2)
# A request that changes something costs as much as what it changes, and the pool has to be restored after it.
_EACH_MUTATION = max(8, _EACH // 8)
_READING = ("Get", "List", "Watch")
_SECONDS = 10.0
_NEVER = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
_AT_THE_DOOR = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@pytest.fixture(scope="module")
def victim(rig: Rig, run_problems: list[str]) -> Iterator[Daemon]:
    daemon = rig.daemon(*FAST_FLAGS, *own_state_flags())
    yield daemon
    run_problems += problems_at_end(daemon)
    rig.engine.remove_all()


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_there_are_valid_requests_for_every_rpc() -> None:
    assert {_method(call) for call in CALLS} == VALID_REQUESTS.keys()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.path.rpartition("/")[2])
def test_any_message(
    rig: Rig,
    victim: Daemon,
    loop: asyncio.AbstractEventLoop,
    call: Call,
    request: pytest.FixtureRequest,
) -> None:
    caller = loop.run_until_complete(_open(victim.target))
    pool, reads = Pool(caller, rig), _method(call).startswith(_READING)
    valid = itertools.cycle(VALID_REQUESTS[_method(call)])
    known = loop.run_until_complete(pool.restore())
    anything = st.lists(
        requests(call.request) | corrupted(call.request), min_size=1, max_size=3 if call.client_streaming else 1
    )
    drawn = changes(call.request) | changes(call.request) | anything
    outcomes: Counter[str] = Counter()

    def send(messages: list[Message]) -> grpc.StatusCode:
        nonlocal known
        code = loop.run_until_complete(outcome(caller.channel, call, messages, _SECONDS))
        outcomes[code.name] += 1
        if not reads:
            known = loop.run_until_complete(pool.restore())
        assert code not in _NEVER
        return code

    # A failing example is kept in the database and printed as a blob, so that it can be repeated.
    @settings(
        max_examples=_EACH if reads else _EACH_MUTATION,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(drawn)
    def fuzz(example: list[Message] | Callable[[Message], None]) -> None:
        assert send([next(valid)(known)]) not in _AT_THE_DOOR
        if isinstance(example, list):
            send(example)
        else:
            changed = next(valid)(known)
            example(changed)
            send([changed])

    try:
        fuzz()
    finally:
        request.node.user_properties.append((OUTCOMES, dict(outcomes)))
        loop.run_until_complete(caller.delete_all())
        rig.engine.call("DELETE", f"/volumes/{FOREIGN_VOLUME}")
        loop.run_until_complete(caller.channel.close(None))


def _method(call: Call) -> str:
    return call.path.rpartition("/")[2]


async def _open(target: str) -> Caller:
    return Caller(target)
