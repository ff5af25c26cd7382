"""What every test can ask for. The rig is one for the session; daemons and what is made in them go with their test."""

from __future__ import annotations

import signal
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.calls import Caller
from tests.rig import Daemon, Rig

pytest_plugins = ["tests.rig.fixtures"]

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell gives that to what it runs in the background, and all that tests start would inherit it: Ctrl-C, which
    # some of them press, would do nothing.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--steps`: how long the random sequences are in all."""
    parser.addoption("--steps", type=int, default=2000, help="steps of the random sequences (tests/stateful)")


@pytest.fixture(scope="session")
def shared_daemon(rig: Rig) -> Iterator[Daemon]:
    """One daemon for all tests that do not hurt it, started as an operator starts it."""
    daemon = rig.daemon(*FAST, fresh=True)
    yield daemon
    assert daemon.running, daemon.log_text
    assert daemon.stop() == 0, daemon.log_text


@pytest_asyncio.fixture
async def caller(shared_daemon: Daemon) -> AsyncIterator[Caller]:
    """Calls the shared daemon; deletes every container it made."""
    async with Caller(shared_daemon.target) as caller:
        yield caller
        await caller.delete_all()


# Ends quickly what a test leaves running, and what replaces something is trusted soon.
FAST = ("--stop-timeout", "1", "--settle-period", "0.2", "--exec-hangup-grace", "1", "--log-format", "console")


def own_state() -> tuple[str, ...]:
    """Flags that give a daemon, and its successors, a state and containers of their own in the rig."""
    own = f"test-{uuid.uuid4()}"
    return ("--etcd-prefix", f"/{own}/", "--node-name", own)
