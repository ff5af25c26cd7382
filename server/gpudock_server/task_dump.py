"""Dump the stacks of all threads and tasks on SIGUSR1, to diagnose a daemon that hangs.

The interpreter writes the threads first, so they appear even if the event loop is blocked; the tasks of the loop follow
in the log, one line each. The daemon continues to run.
"""

from __future__ import annotations

import asyncio
import faulthandler
import signal
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, GeneratorType

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def dump_on_sigusr1() -> None:
    """Install the handler of SIGUSR1; it stays until the running event loop is closed."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _log_tasks)
    # Registered after the handler of the loop: the last one is called first, and `chain` calls the one before.
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)


def _log_tasks() -> None:
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        log.info("task stack", task=task.get_name(), at=await_stack(task.get_coro()))
    log.info("task dump complete")


def await_stack(awaited: object) -> list[str]:
    """Return the suspended frames of a coroutine, outermost first; `Task.get_stack` returns only the outermost."""
    frames: list[str] = []
    while True:
        match awaited:
            case CoroutineType():
                frame, inner = awaited.cr_frame, awaited.cr_await
            case GeneratorType():
                frame, inner = awaited.gi_frame, awaited.gi_yieldfrom
            case AsyncGeneratorType():
                frame, inner = awaited.ag_frame, awaited.ag_await
            case _:
                # None or a future, which does not know what will set it.
                return frames
        if frame is not None:
            frames.append(_format_frame(frame))
        awaited = inner


def _format_frame(frame: FrameType) -> str:
    code: CodeType = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}"
