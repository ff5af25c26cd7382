"""Fixtures of all tests. A session has one rig; containers and volumes are deleted after the test that made them."""

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

# The time that an example takes depends on the load of the machine.
settings.register_profile("busy machine", deadline=None)
settings.load_profile("busy machine")

_LONG_SECONDS = 300.0
_LOG_TAIL = 4000

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell lets its background jobs ignore SIGINT, and every process that tests start would inherit that. Some tests
    # send SIGINT, which must not be ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--steps`, the total length of the random sequences."""
    parser.addoption("--steps", type=int, default=2000, help="steps of the random sequences (tests/stateful)")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let several workers begin with the tests that take long."""
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    if workers > 1:
        items[:] = distribute(items, _long_seconds, workers)


@pytest.hookimpl(tryfirst=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> bool:
    """A test's timeout is a time limit like those inside the test: longer on a slower machine."""
    scaled = settings._replace(timeout=limit(settings.timeout))
    return bool(pytest_timeout.pytest_timeout_set_timer(item, scaled))


def _long_seconds(item: pytest.Item) -> float:
    """The timeout of a test, by which it is known to take long; 0 if the timeout is below `_LONG_SECONDS`."""
    marker = item.get_closest_marker("timeout")
    seconds = float(marker.args[0]) if marker else 0.0
    # Each worker that gets a test with `fragile_rig` starts another rig, so that these tests stay together.
    movable = "fragile_rig" not in getattr(item, "fixturenames", ())
    return seconds if movable and seconds >= _LONG_SECONDS else 0.0


@pytest.fixture(scope="session")
def shared_daemon(rig: Rig, run_problems: list[str]) -> Iterator[Daemon]:
    """The daemon of all tests that do not stop or damage it, started as an operator starts it."""
    daemon = rig.daemon(*FAST_FLAGS, fresh=True)
    yield daemon
    run_problems += problems_at_end(daemon)


def problems_at_end(daemon: Daemon) -> list[str]:
    """Stop a daemon that many tests have used; a message for a premature end, a wrong exit code, and a traceback."""
    premature = not daemon.running
    code = daemon.stop()
    log = daemon.log_text
    problems = []
    if premature or code:
        end = "exited during the tests" if premature else "stopped"
        problems.append(f"a shared daemon {end} with exit code {code}:\n{log[-_LOG_TAIL:]}")
    if "Traceback" in log:
        position = log.index("Traceback")
        problems.append(f"a traceback in a shared daemon's log:\n{log[max(0, position - 1000) : position + _LOG_TAIL]}")
    return problems


@pytest_asyncio.fixture
async def caller(shared_daemon: Daemon) -> AsyncIterator[Caller]:
    """A caller of the shared daemon; every container and volume is deleted after the test."""
    async with Caller(shared_daemon.target) as caller:
        yield caller
        await caller.delete_all()


# Short grace periods, so that containers stop and are replaced quickly.
FAST_FLAGS = ("--stop-timeout", "1", "--settle-period", "0.2", "--exec-hangup-grace", "1", "--log-format", "console")


def own_state_flags() -> tuple[str, ...]:
    """Flags that give a daemon, and the daemons after it, their own state and containers in the rig."""
    name = f"test-{uuid.uuid4()}"
    return ("--etcd-prefix", f"/{name}/", "--node-name", name)
