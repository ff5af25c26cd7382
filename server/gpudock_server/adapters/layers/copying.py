"""What every copy of a tree needs, whichever program makes it: being the only one, and knowing the size."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gpudock_server.adapters.trees.worker import ended

_POLL_SECONDS = 0.25
_LOCK_SECONDS = 10.0


class StillCopyingError(Exception):
    """A program that an earlier daemon left behind writes to the same tree."""


def missing_program() -> str:
    """Why a copy cannot begin on this host; empty when it can."""
    return "" if shutil.which("du") else "there is no du on the PATH"


@asynccontextmanager
async def sole_writer(tree: str) -> AsyncIterator[int]:
    """Hold the lock on a tree that a program is going to fill, which inherits the descriptor.

    The lock lives until its last holder is gone, so a program that outlived a killed daemon keeps the next one out.
    """
    descriptor = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            async with asyncio.timeout(_LOCK_SECONDS):
                while not _locked(descriptor):  # noqa: ASYNC110 - the kernel has no event for a lock's end
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError as error:
            raise StillCopyingError(f"another process is still copying to {tree}") from error
        yield descriptor
    finally:
        os.close(descriptor)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
        await ended(process)
    size = output.split(b"\t", 1)[0]
    if not size.isdigit():
        raise ValueError(f"du shows no size for {tree}")
    return int(size)
