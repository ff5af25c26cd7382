"""Whether it was a container's own process that the kernel killed for memory, from the engine's events.

The engine's OOMKilled says no more than that some process of the run was killed, perhaps a child or an exec. Its events
say more: an `oom` that the end of the main process follows at once, with no SIGKILL of a caller in between.

What cannot be told apart: a main process that is killed from outside the engine, or ends with exit code 137 of its own
(a shell that hands on its child's), within a second or so after a child was killed for memory.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from gpudock_server.adapters.docker.connection import Connection
from gpudock_server.adapters.docker.failures import engine_errors
from gpudock_server.errors import EngineRejected, EngineUnavailable
from gpudock_server.model.engine import EngineContainer

_CALL = "tell its events"
_NANO = 1_000_000_000
# How a shell, and the engine, show an end by SIGKILL.
_SIGKILL_EXIT_CODE = 137
_SIGKILL = ("9", "KILL", "SIGKILL")
# How long the kernel may take to end a process that it has chosen: it has to take back its memory first.
_KILL_NANOS = _NANO
_RECLAIM_BYTES_PER_SECOND = 1 << 30
# The engine tells of an end a little after it; on a busy host, later.
_EVENT_DELAY_SECONDS = 5.0
# The events that are asked for are past ones, so that the answer is complete at once.
_TIMEOUT_SECONDS = 2.0


async def main_process_oom_killed(connection: Connection, shown: EngineContainer) -> bool | None:
    """Whether the run that ended last ended so; None where the engine no longer has the events of that time."""
    if not shown.oom_killed or shown.alive or shown.exit_code != _SIGKILL_EXIT_CODE or shown.finish_time is None:
        return False
    finish = shown.finish_time.timestamp()
    window = _oom_window_nanos(shown.memory_bytes)
    filters = {"type": ["container"], "container": [shown.id], "event": ["start", "oom", "kill", "die"]}
    params = {
        "since": f"{finish - window / _NANO - 1:.9f}",
        "until": f"{min(time.time(), finish + _EVENT_DELAY_SECONDS):.9f}",
        "filters": json.dumps(filters),
    }
    try:
        async with connection.stream(_CALL, "GET", "events", params=params, timeout=_TIMEOUT_SECONDS) as response:
            with engine_errors(_CALL):
                async with asyncio.timeout(_TIMEOUT_SECONDS):
                    payload = await response.read()
                events = [json.loads(line) for line in payload.splitlines() if line.strip()]
    except (EngineRejected, EngineUnavailable):
        return None
    return killed_by_oom(events, round(finish * _NANO), window)


def _oom_window_nanos(memory_bytes: int) -> int:
    return _KILL_NANOS + memory_bytes * _NANO // _RECLAIM_BYTES_PER_SECOND


def killed_by_oom(events: Iterable[Mapping[str, Any]], finish_nanos: int, window_nanos: int) -> bool | None:
    """Whether the end at `finish_nanos` is an `oom` that began at most `window_nanos` before; None: no such end."""
    oom: int | None = None
    for event in events:
        moment = int(event.get("timeNano") or 0)
        match event.get("Action"):
            case "oom":
                oom = moment
            case "kill" if (event.get("Actor") or {}).get("Attributes", {}).get("signal") in _SIGKILL:
                oom = None
            case "start":
                oom = None
            # Microseconds are lost on the way to a finish time.
            case "die" if moment >= finish_nanos - 1000:
                return oom is not None and finish_nanos - oom <= window_nanos
            case _:
                pass
    return None
