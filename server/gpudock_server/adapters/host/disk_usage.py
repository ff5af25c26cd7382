"""How large a tree is, as du counts it."""

from __future__ import annotations

import asyncio
import shutil
from asyncio.subprocess import DEVNULL, PIPE

from gpudock_server.adapters.host.trees.worker import kill_and_wait


def du_unavailable_reason() -> str:
    """Why a copy cannot begin on this host; empty when it can."""
    return "" if shutil.which("du") else "there is no du on the PATH"


async def tree_bytes(tree: str, *, apparent: bool, timeout_seconds: float) -> int:
    """The bytes of a tree, hard links counted once: what is allocated, or with `apparent` what reading it gives.

    See `_du`.
    """
    kind = ("--block-size=1", *(("--apparent-size",) if apparent else ()))
    return await _du(tree, *kind, timeout_seconds=timeout_seconds)


async def tree_entries(tree: str, *, timeout_seconds: float) -> int:
    """How many files and folders a tree has, hard links counted once. See `_du`."""
    return await _du(tree, "--inodes", timeout_seconds=timeout_seconds)


async def _du(tree: str, *options: str, timeout_seconds: float) -> int:
    """What du counts, in a child process: a million files do not hold up the event loop.

    What vanishes meanwhile, in a container that still runs, is not counted. Raises TimeoutError, ValueError when du
    shows no number.
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
        raise ValueError(f"du shows no size for {tree}")
    return int(size)
