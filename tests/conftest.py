"""What every test can ask for. The rig is one for the session; daemons and what is made in them go with their test."""

from __future__ import annotations

import signal
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
import pytest_timeout
from hypothesis import settings

from tests.calls import Caller
from tests.order import distribute
from tests.rig import Daemon, Rig
from tests.rig.patience import limit

pytest_plugins = ["tests.rig.fixtures", "tests.run_report"]

# How long an example takes is a matter of what else the machine does.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

_LONG_SECONDS = 300.0
_LOG_TAIL = 4000

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell gives that to what it runs in the background, and all that tests start would inherit it: Ctrl-C, which
    # some of them press, would do nothing.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--steps`: how long the random sequences are in all."""
    parser.addoption("--steps", type=int, default=2000, help="steps of the random sequences (tests/stateful)")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several workers begin with what takes long."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        items[:] = distribute(items, _long_seconds, workers)


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool:
    """A test's timeout is a time limit like those inside the test: longer on a slower machine."""
    scaled = settings._replace(timeout=limit(settings.timeout))
    return bool(pytest_timeout.pytest_timeout_set_timer(item, scaled))


def _long_seconds(item: pytest.Item) -> float:
    """The timeout of a test that was given more than most, by which it is known to be long; of others 0."""
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0]) if marker else 0.0
    # A rig of a module's own would have to be started by each worker that gets one of its tests.
    alone = "fragile_rig" not in getattr(item, "fixturenames", ())
    return seconds if alone and seconds >= _LONG_SECONDS else 0.0


@pytest.fixture(scope="session")
def shared_daemon(rig: Rig, run_problems: list[str]) -> Iterator[Daemon]:
    """One daemon for all tests that do not hurt it, started as an operator starts it."""
    daemon = rig.daemon(*FAST_FLAGS, fresh=True)
    yield daemon
    run_problems += problems_at_end(daemon)


def problems_at_end(daemon: Daemon) -> list[str]:
    """Stop a daemon that many tests have used; what is wrong with how it ends, and with what it has logged."""
    died = not daemon.running
    code = daemon.stop()
    log = daemon.log_text
    problems = []
    if died or code:
        problems.append(f"a shared daemon {'died' if died else 'ended'} with exit code {code}:\n{log[-_LOG_TAIL:]}")
    if "Traceback" in log:
        where = log.index("Traceback")
        problems.append(f"a traceback in a shared daemon's log:\n{log[max(0, where - 1000) : where + _LOG_TAIL]}")
    return problems


@pytest_asyncio.fixture
async def caller(shared_daemon: Daemon) -> AsyncIterator[Caller]:
    """Calls the shared daemon; deletes every container it made."""
    async with Caller(shared_daemon.target) as caller:
        yield caller
        await caller.delete_all()


# Ends quickly what a test leaves running, and what replaces something is trusted soon.
FAST_FLAGS = ("--stop-timeout", "1", "--settle-period", "0.2", "--exec-hangup-grace", "1", "--log-format", "console")


def own_state_flags() -> tuple[str, ...]:
    """Flags that give a daemon, and its successors, a state and containers of their own in the rig."""
    own = f"test-{uuid.uuid4()}"
    return ("--etcd-prefix", f"/{own}/", "--node-name", own)
