"""Finds out from the engine's events whether the kernel killed a container's main process for lack of memory.

The engine's OOMKilled only means that some process of the run was killed, perhaps a child or an exec. The events say
more: an `oom` event directly followed by the end of the main process, with no SIGKILL by a caller in between.

Two cases look like that although they are not: within about a second after a child was killed for memory, the main
process is killed from outside the engine, or it exits with code 137 itself (a shell that passes on its child's code).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from gpudock_server.adapters.docker.connection import Connection
from gpudock_server.adapters.docker.events import EVENTS_CALL
from gpudock_server.adapters.docker.failures import engine_errors
from gpudock_server.adapters.docker.translate import NANOS_PER_SECOND
from gpudock_server.errors import EngineRejected, EngineUnavailable
from gpudock_server.model.engine import EngineContainer

# The exit code of shells and of the engine for a process ended by SIGKILL.
_SIGKILL_EXIT_CODE = 137
_SIGKILL = ("9", "KILL", "SIGKILL")
# How long the kernel may take to end the chosen process: it frees the process's memory first.
_KILL_NANOS = NANOS_PER_SECOND
_RECLAIM_BYTES_PER_SECOND = 1 << 30
# The engine reports the end of a process with a delay, which is longer on a busy host.
_EVENT_DELAY_SECONDS = 5.0
# The requested events are in the past, so the response is complete immediately.
_TIMEOUT_SECONDS = 2.0


async def main_process_oom_killed(connection: Connection, container: EngineContainer) -> bool | None:
    """Whether the last run ended that way; None if the engine no longer has the events of that time."""
    if (
        not container.oom_killed
        or container.alive
        or container.exit_code != _SIGKILL_EXIT_CODE
        or container.finish_time is None
    ):
        return False
    finish = container.finish_time.timestamp()
    window = _oom_window_nanos(container.memory_bytes)
    filters = {"type": ["container"], "container": [container.id], "event": ["start", "oom", "kill", "die"]}
    params = {
        "since": f"{finish - window / NANOS_PER_SECOND - 1:.9f}",
        "until": f"{min(time.time(), finish + _EVENT_DELAY_SECONDS):.9f}",
        "filters": json.dumps(filters),
    }
    try:
        async with connection.stream(EVENTS_CALL, "GET", "events", params=params, timeout=_TIMEOUT_SECONDS) as response:
            with engine_errors(EVENTS_CALL):
                async with asyncio.timeout(_TIMEOUT_SECONDS):
                    payload = await response.read()
                events = [json.loads(line) for line in payload.splitlines() if line.strip()]
    except (EngineRejected, EngineUnavailable):
        return None
    return killed_by_oom(events, round(finish * NANOS_PER_SECOND), window)


def _oom_window_nanos(memory_bytes: int) -> int:
    return _KILL_NANOS + memory_bytes * NANOS_PER_SECOND // _RECLAIM_BYTES_PER_SECOND


def killed_by_oom(events: Iterable[Mapping[str, Any]], finish_nanos: int, window_nanos: int) -> bool | None:
    """Whether the end at `finish_nanos` follows an `oom` event by at most `window_nanos`.

    None if `events` have no end at that time. Times are in nanoseconds since the epoch.
    """
    oom: int | None = None
    for event in events:
        time_nanos = int(event.get("timeNano") or 0)
        match event.get("Action"):
            case "oom":
                oom = time_nanos
            case "kill" if (event.get("Actor") or {}).get("Attributes", {}).get("signal") in _SIGKILL:
                oom = None
            case "start":
                oom = None
            # A finish time is cut to microseconds.
            case "die" if time_nanos >= finish_nanos - 1000:
                return oom is not None and finish_nanos - oom <= window_nanos
            case _:
                pass
    return None
