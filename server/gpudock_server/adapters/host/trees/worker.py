"""The parent's side of the child process that works on trees (see `child`)."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import gpudock_server
from gpudock_server.adapters.host.stalls import DEFAULT_STALL_SECONDS, fail_if_stalled
from gpudock_server.adapters.host.trees.jobs import JobRefusedError
from gpudock_server.adapters.host.trees.limits import TreeTooLargeError

_LIBRARY: Final = str(Path(gpudock_server.__file__).parent.parent)
# Nothing of the site's packages and no variable of the environment has a say in what the child loads.
_BOOTSTRAP: Final = f"""
import sys
sys.path.insert(0, {_LIBRARY!r})
from gpudock_server.adapters.host.trees.child import main
main()
"""
_LINE_BYTES: Final = 1 << 20
_COMPLAINT_CHARACTERS: Final = 500


class TreeWorker:
    """One child process. It is started by its first job, and ended by `close`, or by a job that fails.

    Jobs come one after the other. What a job leaves in the child's memory serves the next one.
    """

    def __init__(self, memory_bytes: int, stall_seconds: float = DEFAULT_STALL_SECONDS) -> None:
        self._memory_bytes = memory_bytes
        self._stall_seconds = stall_seconds
        self._process: Process | None = None
        self.busy = False

    async def call(self, job: str, progress: Callable[[int, int], None] | None = None, /, **arguments: Any) -> Any:  # noqa: ANN401 - JSON
        """Run one job and return its result.

        Raises TreeTooLargeError, JobRefusedError, StalledError and OSError. Whatever it raises, also when the caller is
        cancelled, the child has ended by then and changes nothing any more.
        """
        self.busy = True
        try:
            process = self._process = self._process or await self._start()
            line = json.dumps({"job": job, "arguments": arguments}).encode() + b"\n"
            answered = self._answer(process, line, progress)
            answer = await fail_if_stalled(answered, process.pid, f"the job {job!r} on a tree", self._stall_seconds)
            return _result(answer)
        except BaseException:
            await self.close()
            raise
        finally:
            self.busy = False

    async def close(self) -> None:
        """Kill the child and wait for its end, also while being cancelled again."""
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
        assert stdin is not None  # noqa: S101 - asked for above
        assert stdout is not None  # noqa: S101 - likewise
        with suppress(ConnectionError):  # it died: what follows says how
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
    """Run one job in a child of its own. See `TreeWorker.call`."""
    worker = TreeWorker(memory_bytes, stall_seconds)
    try:
        return await worker.call(job, progress, **arguments)
    finally:
        await worker.close()


async def kill_and_wait(process: Process) -> None:
    """Kill the process and its group if it still runs, and wait for it, also while being cancelled again."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    waiting = asyncio.ensure_future(process.wait())
    while not waiting.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(waiting)


async def _describe_exit(process: Process) -> str:
    """How a child ended that did not answer."""
    complaint = await process.stderr.read() if process.stderr is not None else b""
    code = await process.wait()
    how = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
    said = complaint.decode(errors="replace").strip()[-_COMPLAINT_CHARACTERS:]
    return f"the child process that works on the files {how}{': ' if said else ''}{said}"


def _result(answer: dict[str, Any]) -> Any:  # noqa: ANN401 - JSON
    """The result in an answer. Raises the error in it."""
    error = answer.get("error")
    if error is None:
        return answer["result"]
    match error["kind"]:
        case "too_large":
            raise TreeTooLargeError(error["text"])
        case "memory":
            raise TreeTooLargeError(f"its index takes more than {error['text']} of memory")
        case "os":
            raise OSError(error["errno"], error["text"], error["file"])
        case _:
            raise JobRefusedError(error["text"])
