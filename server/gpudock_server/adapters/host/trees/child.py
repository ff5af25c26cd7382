"""The child process that works on trees: one job after the other, each a line of JSON on the standard input.

It answers with lines of JSON: {"progress": [bytes, total]} any number of times, then {"result": {...}} or
{"error": {"kind": ..., ...}}. It ends when its input does, and is killed when its parent dies.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

from gpudock_server.adapters.host.trees.jobs import JobRefusedError, Jobs
from gpudock_server.adapters.host.trees.limits import TreeTooLargeError

_PR_SET_PDEATHSIG = 1
# The kernel takes the child before the daemon, and before most of what else runs.
_OOM_SCORE = "500"


def main() -> None:
    """Serve jobs until the input ends. Arguments: the parent's process id, and the most bytes of address space."""
    parent, memory_bytes = int(sys.argv[1]), int(sys.argv[2])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123 - pathlib takes long to load
        file.write(_OOM_SCORE)
    jobs = Jobs(lambda current, total: _answer({"progress": [current, total]}))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": jobs.run(request["job"], request["arguments"])}
        except MemoryError:
            jobs = Jobs(jobs.send)
            answer = {"error": {"kind": "memory", "text": f"{memory_bytes >> 20} MiB"}}
        except Exception as error:  # noqa: BLE001 - every failure is the parent's to judge
            answer = {"error": _described(error)}
        _answer(answer)


def _described(error: Exception) -> dict[str, Any]:
    match error:
        case TreeTooLargeError():
            return {"kind": "too_large", "text": str(error)}
        case JobRefusedError():
            return {"kind": "refused", "text": str(error)}
        case OSError(errno=int(code)):
            return {"kind": "os", "errno": code, "text": error.strerror, "file": str(error.filename or "")[:300]}
        case _:
            return {"kind": "fault", "text": f"{type(error).__name__}: {error}"}


def _answer(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()
