"""A report about a step that hangs: the stacks of test, daemon and engine, and the states of containers' processes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from gpudock_server.task_dump import await_stack

from tests.rig import Daemon, Rig
from tests.rig.patience import limit

_LOG_TAIL = 60_000
_DUMP_SECONDS = 5.0
# The seconds between two reads of the log.
_POLL_S = 0.05


def hang_report(loop: asyncio.AbstractEventLoop, daemon: Daemon, rig: Rig) -> str:
    """The report as text. `loop`, which runs the calls of the test, must run in another thread."""
    parts = {
        "the test": lambda: "\n".join(
            f"{task.get_name()}: {await_stack(task.get_coro())}" for task in asyncio.all_tasks(loop)
        ),
        "the daemon": lambda: _stacks_of(daemon),
        "the engine": rig.engine.stacks,
        "the containers": lambda: "\n".join(_processes(rig)),
    }
    return "\n".join(f"===== {name}\n{_run_part(part)}" for name, part in parts.items())


def _run_part(part: Callable[[], str]) -> str:
    try:
        return part()
    except Exception as error:  # noqa: BLE001 - a part that fails must not hide the others
        return repr(error)


def _stacks_of(daemon: Daemon) -> str:
    before = len(daemon.log_text)
    daemon.signal(signal.SIGUSR1)
    deadline = time.monotonic() + limit(_DUMP_SECONDS)
    while "task dump complete" not in daemon.log_text[before:] and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return daemon.log_text[-_LOG_TAIL:]


def _processes(rig: Rig) -> Iterator[str]:
    """Each control group with its freezer state, and the kernel function in which each process waits."""
    # The names of control groups v1 and v2.
    for group, name in itertools.product(rig.control_groups, ("freezer.state", "cgroup.freeze")):
        if not (group / name).exists():
            continue
        yield f"{group}: {(group / name).read_text().strip()}"
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):  # the process has ended meanwhile
                yield f"  {pid} {_state(Path('/proc', pid))}"


def _state(process: Path) -> str:
    state = process.joinpath("stat").read_text().rpartition(")")[2].split()[0]
    return f"{process.joinpath('comm').read_text().strip()} {state} {process.joinpath('wchan').read_text()}"
