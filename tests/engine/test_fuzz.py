"""Random messages to every RPC of a real daemon: no call ends in INTERNAL or UNKNOWN.

Every second request is valid and refers to a pool of containers, volumes and operations (tests/engine/fuzz_pool.py);
validation must not refuse it. Most of the others differ from a valid request in one field; the rest are random. The
summary of the run counts the statuses, which shows how many requests passed validation.

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

# An example has two requests.
_READ_EXAMPLES = max(1, EXAMPLES // len(CALLS) // 2)
# A request that changes something is slow, and the pool has to be restored after it.
_CHANGE_EXAMPLES = max(8, _READ_EXAMPLES // 8)
_READING = ("Get", "List", "Watch")
_SECONDS = 10.0
_FORBIDDEN = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
_REFUSED = (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)


@pytest.fixture(scope="module")
def fuzzed_daemon(rig: Rig, run_problems: list[str]) -> Iterator[Daemon]:
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
def test_no_message_causes_an_internal_error(
    rig: Rig,
    fuzzed_daemon: Daemon,
    loop: asyncio.AbstractEventLoop,
    call: Call,
    request: pytest.FixtureRequest,
) -> None:
    caller = loop.run_until_complete(_open(fuzzed_daemon.target))
    pool, reads = Pool(caller, rig), _method(call).startswith(_READING)
    valid = itertools.cycle(VALID_REQUESTS[_method(call)])
    references = loop.run_until_complete(pool.restore())
    random_messages = st.lists(
        requests(call.request) | corrupted(call.request), min_size=1, max_size=3 if call.client_streaming else 1
    )
    examples = changes(call.request) | changes(call.request) | random_messages
    outcomes: Counter[str] = Counter()

    def send(messages: list[Message]) -> grpc.StatusCode:
        nonlocal references
        code = loop.run_until_complete(outcome(caller.channel, call, messages, _SECONDS))
        outcomes[code.name] += 1
        if not reads:
            references = loop.run_until_complete(pool.restore())
        assert code not in _FORBIDDEN
        return code

    # Hypothesis keeps a failing example in its database and prints it as a blob, so that it can be repeated.
    @settings(
        max_examples=_READ_EXAMPLES if reads else _CHANGE_EXAMPLES,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(examples)
    def fuzz(example: list[Message] | Callable[[Message], None]) -> None:
        assert send([next(valid)(references)]) not in _REFUSED
        if isinstance(example, list):
            send(example)
        else:
            changed = next(valid)(references)
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
