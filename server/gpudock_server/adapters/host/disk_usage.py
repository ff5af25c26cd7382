"""Measure a file tree with du."""

from __future__ import annotations

import asyncio
import shutil
from asyncio.subprocess import DEVNULL, PIPE

from gpudock_server.adapters.host.subprocesses import kill_and_wait


def du_unavailable_reason() -> str:
    """Why trees cannot be measured on this host; empty if they can."""
    return "" if shutil.which("du") else "du not found on PATH"


async def tree_bytes(tree: str, *, apparent: bool, timeout_seconds: float) -> int:
    """Return the allocated bytes of a tree, or with `apparent` the bytes of its contents; hard links count once.

    Raises TimeoutError, ValueError.
    """
    kind = ("--block-size=1", *(("--apparent-size",) if apparent else ()))
    return await _du(tree, *kind, timeout_seconds=timeout_seconds)


async def tree_entries(tree: str, *, timeout_seconds: float) -> int:
    """Return the number of files and folders in a tree; hard links count once. Raises TimeoutError, ValueError."""
    return await _du(tree, "--inodes", timeout_seconds=timeout_seconds)


async def _du(tree: str, *options: str, timeout_seconds: float) -> int:
    """Return what du counts. A child process, so that a million files do not block the event loop.

    Files that a running container removes meanwhile are not counted. Raises TimeoutError, and ValueError if du prints
    no number.
    """
    process = await asyncio.create_subprocess_exec(
        "du", "--summarize", "--one-file-system", *options,
        "--", tree, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout_seconds):
            output, _ = await process.communicate()
    finally:
        await kill_and_wait(process)
    size = output.split(b"\t", 1)[0]
    if not size.isdigit():
        raise ValueError(f"du printed no size for {tree}")
    return int(size)
