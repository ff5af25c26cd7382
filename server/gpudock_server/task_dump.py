"""Where everything stands, on SIGUSR1: for whoever finds a daemon that does not go on.

The threads are written first, by the interpreter itself, so also where the loop is held up; the loop's tasks follow in
the log, a line each. Nothing is stopped by it.
"""

from __future__ import annotations

import asyncio
import faulthandler
import signal
from types import AsyncGeneratorType, CodeType, CoroutineType, FrameType, GeneratorType

import structlog

log: structlog.stdlib.BoundLogger = structlog.get_logger(__name__)


def dump_on_sigusr1() -> None:
    """From now on, until the running loop is closed."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, _log_tasks)
    # After it, since what is registered last is called first and hands on.
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)


def _log_tasks() -> None:
    for task in sorted(asyncio.all_tasks(), key=lambda task: task.get_name()):
        log.info("a task waits", task=task.get_name(), at=await_stack(task.get_coro()))
    log.info("that is every task")


def await_stack(awaited: object) -> list[str]:
    """The suspended frames from the outermost in; `Task.get_stack` gives only the first of them."""
    places: list[str] = []
    while True:
        match awaited:
            case CoroutineType():
                frame, inner = awaited.cr_frame, awaited.cr_await
            case GeneratorType():
                frame, inner = awaited.gi_frame, awaited.gi_yieldfrom
            case AsyncGeneratorType():
                frame, inner = awaited.ag_frame, awaited.ag_await
            case _:
                # Nothing, or a future, which does not say who is to set it.
                return places
        if frame is not None:
            places.append(_format_frame(frame))
        awaited = inner


def _format_frame(frame: FrameType) -> str:
    code: CodeType = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno} in {code.co_qualname}"
