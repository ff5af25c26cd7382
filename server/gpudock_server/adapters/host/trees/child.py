"""The child process that works on trees: it reads one job after the other, each a line of JSON, from stdin.

It answers with lines of JSON on stdout: {"progress": [bytes, total]} any number of times, then {"result": {...}} or
{"error": {"kind": ..., ...}}. It ends at the end of its input, and is killed when its parent dies.
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
# The out-of-memory killer ends the child before the daemon and most other processes.
_OOM_SCORE = "500"


def main() -> None:
    """Run jobs until the input ends. Arguments: the pid of the parent, and the limit of the address space in bytes."""
    parent, memory_bytes = int(sys.argv[1]), int(sys.argv[2])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before prctl
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123 - importing pathlib takes too long
        file.write(_OOM_SCORE)
    jobs = Jobs(lambda current, total: _answer({"progress": [current, total]}))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": jobs.run(request["job"], request["arguments"])}
        except MemoryError:
            jobs = Jobs(jobs.send)
            answer = {"error": {"kind": "memory", "text": f"{memory_bytes >> 20} MiB"}}
        except Exception as error:  # noqa: BLE001 - the parent handles all errors
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
