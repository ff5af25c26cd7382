"""The parent's side of the child process that works on trees; see `child`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import gpudock_server
from gpudock_server.adapters.host.stalls import DEFAULT_STALL_SECONDS, fail_if_stalled
from gpudock_server.adapters.host.subprocesses import kill_and_wait
from gpudock_server.adapters.host.trees.jobs import JobRefusedError
from gpudock_server.adapters.host.trees.limits import TreeTooLargeError

_LIBRARY: Final = str(Path(gpudock_server.__file__).parent.parent)
# With -I and -S neither site packages nor environment variables affect what the child loads.
_BOOTSTRAP: Final = f"""
import sys
sys.path.insert(0, {_LIBRARY!r})
from gpudock_server.adapters.host.trees.child import main
main()
"""
_LINE_BYTES: Final = 1 << 20
_MAX_STDERR_CHARACTERS: Final = 500


class TreeWorker:
    """One child process. The first job starts it; `close` or a failed job ends it.

    Jobs run one after the other. A job can use what the previous one left in the memory of the child.
    """

    def __init__(self, memory_bytes: int, stall_seconds: float = DEFAULT_STALL_SECONDS) -> None:
        self._memory_bytes = memory_bytes
        self._stall_seconds = stall_seconds
        self._process: Process | None = None
        self.busy = False

    async def call(self, job: str, progress: Callable[[int, int], None] | None = None, /, **arguments: Any) -> Any:  # noqa: ANN401 - JSON
        """Run one job and return its result.

        Raises TreeTooLargeError, JobRefusedError, StalledError and OSError. After any error, or after the caller was
        cancelled, the child has ended and changes nothing more.
        """
        self.busy = True
        try:
            process = self._process = self._process or await self._start()
            line = json.dumps({"job": job, "arguments": arguments}).encode() + b"\n"
            answering = self._answer(process, line, progress)
            answer = await fail_if_stalled(answering, process.pid, f"job {job!r}", self._stall_seconds)
            return _result(answer)
        except BaseException:
            await self.close()
            raise
        finally:
            self.busy = False

    async def close(self) -> None:
        """Kill the child and wait for its end, even if cancelled meanwhile."""
        process, self._process = self._process, None
        if process is not None:
            await kill_and_wait(process)

    async def _start(self) -> Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-S", "-c", _BOOTSTRAP, str(os.getpid()), str(self._memory_bytes),
            stdin=PIPE, stdout=PIPE, stderr=PIPE, start_new_session=True, limit=_LINE_BYTES, env={"LC_ALL": "C.UTF-8"},
        )  # fmt: skip

    async def _answer(
        self, process: Process, line: bytes, progress: Callable[[int, int], None] | None
    ) -> dict[str, Any]:
        stdin, stdout = process.stdin, process.stdout
        assert stdin is not None  # noqa: S101 - `_start` requests the pipe
        assert stdout is not None  # noqa: S101 - `_start` requests the pipe
        with suppress(ConnectionError):  # the child died; `_describe_exit` says how
            stdin.write(line)
            await stdin.drain()
        while answer := await stdout.readline():
            found: dict[str, Any] = json.loads(answer)
            if moved := found.get("progress"):
                if progress is not None:
                    progress(*moved)
                continue
            return found
        return {"error": {"kind": "fault", "text": await _describe_exit(process)}}


async def run_job(
    job: str,
    progress: Callable[[int, int], None] | None = None,
    /,
    *,
    memory_bytes: int,
    stall_seconds: float = DEFAULT_STALL_SECONDS,
    **arguments: Any,  # noqa: ANN401 - JSON
) -> Any:  # noqa: ANN401 - JSON
    """Run one job in its own child process. See `TreeWorker.call`."""
    worker = TreeWorker(memory_bytes, stall_seconds)
    try:
        return await worker.call(job, progress, **arguments)
    finally:
        await worker.close()


async def _describe_exit(process: Process) -> str:
    """Describe the exit of a child that did not answer."""
    stderr = await process.stderr.read() if process.stderr is not None else b""
    code = await process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
    output = stderr.decode(errors="replace").strip()[-_MAX_STDERR_CHARACTERS:]
    return f"the file tree worker {how}{': ' if output else ''}{output}"


def _result(answer: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
    """Return the result of an answer, or raise its error."""
    error = answer.get("error")
    if error is None:
        return answer["result"]
    match error["kind"]:
        case "too_large":
            raise TreeTooLargeError(error["text"])
        case "memory":
            raise TreeTooLargeError(f"its index needs more than {error['text']} of memory")
        case "os":
            raise OSError(error["errno"], error["text"], error["file"])
        case _:
            raise JobRefusedError(error["text"])
