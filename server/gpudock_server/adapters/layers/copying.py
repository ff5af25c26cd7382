"""Making one tree equal to another with GNU cp, as a child process that never outlives what it was started for."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gpudock_server.adapters.layers.threads import Interrupt
from gpudock_server.ports import Progress

_PROGRESS_SECONDS = 0.25
_BLOCK_BYTES = 4096
_STDERR_BYTES = 16384
_LOCK_SECONDS = 10.0
_NO_ROOM = ("No space left on device", "Disk quota exceeded")


@dataclass(frozen=True, slots=True)
class CopyEnded:
    """How cp ended; `complaint` is the beginning of what it said on stderr."""

    exit_code: int
    complaint: str

    @property
    def out_of_room(self) -> bool:
        """Whether it failed because nothing more could be stored."""
        return self.exit_code != 0 and any(phrase in self.complaint for phrase in _NO_ROOM)


class StillCopyingError(Exception):
    """A cp that an earlier daemon left behind writes to the same tree."""


def missing_program() -> str:
    """Why a copy cannot begin on this host; empty when it can."""
    return "" if shutil.which("cp") and shutil.which("du") else "there is no cp or du on the PATH"


@asynccontextmanager
async def sole_writer(tree: str) -> AsyncIterator[int]:
    """Hold the lock on a tree that cp is going to fill; the descriptor is for `copy_tree`, which lets cp inherit it.

    The lock lives until its last holder is gone, so a cp that outlived a killed daemon keeps the next one out.
    """
    descriptor = os.open(tree, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        try:
            async with asyncio.timeout(_LOCK_SECONDS):
                while not _locked(descriptor):  # noqa: ASYNC110 - the kernel has no event for a lock's end
                    await asyncio.sleep(_PROGRESS_SECONDS)
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


def empty_tree(tree: str, interrupt: Interrupt) -> None:
    """Remove everything below `tree`, and its own extended attributes; cp adds some but takes none away."""
    root = os.fsencode(tree)
    folders = [root]
    for folder in folders:  # grows while it is walked: parents come before their children
        with os.scandir(folder) as entries:
            for entry in entries:
                interrupt.check()
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    os.unlink(entry.path)  # noqa: PTH108 - names are bytes here: not every one is text
    for folder in reversed(folders[1:]):
        os.rmdir(folder)  # noqa: PTH106 - likewise
    for name in os.listxattr(root):
        if name.startswith(("user.", "trusted.")):
            os.removexattr(root, name)


async def copy_tree(source: str, target: str, lock: int, total: int, progress: Progress) -> CopyEnded:
    """Run cp from one root to the other, with the roots' own attributes.

    `progress` is called about 4 times a second with about the bytes of disk that cp has filled, never more than
    `total`. Cancelling kills cp and waits for its end.
    """
    # -a alone is silent about extended attributes that it could not set; naming them makes it fail.
    command = ["cp", "-a", "--preserve=mode,ownership,timestamps,links,xattr", "--reflink=auto", "--sparse=auto"]
    # A daemon that is killed takes cp along.
    guard = ["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []
    process = await asyncio.create_subprocess_exec(
        *guard, *command, "--", f"{source}/.", f"{target}/",
        stdin=DEVNULL, stdout=DEVNULL, stderr=PIPE, start_new_session=True, pass_fds=(lock,),
        env={"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)},
    )  # fmt: skip
    try:
        return await _watched(process, total, progress)
    finally:
        await _ended(process)


async def _watched(process: Process, total: int, progress: Progress) -> CopyEnded:
    ending = asyncio.ensure_future(_complaint_until_end(process))
    try:
        while True:
            done, _ = await asyncio.wait([ending], timeout=_PROGRESS_SECONDS)
            if done:
                return CopyEnded(exit_code=await process.wait(), complaint=ending.result())
            progress(min(_bytes_allocated(process.pid), total), total)
    finally:
        ending.cancel()


async def _complaint_until_end(process: Process) -> str:
    """The first few KiB of stderr; the rest is read and dropped, so that cp never waits for a reader."""
    stderr = process.stderr
    kept = bytearray()
    while stderr is not None and (chunk := await stderr.read(_STDERR_BYTES)):
        kept += chunk[: _STDERR_BYTES - len(kept)]
    await process.wait()
    return kept.decode(errors="replace").strip()


def _bytes_allocated(pid: int) -> int:
    """About how many bytes of disk a process's writes have taken so far (proc(5), /proc/pid/io).

    Every write counts for a block more than it wrote: a layer is mostly small files, each of which takes a whole one.
    copy_file_range counts as a write, a reflink does not.
    """
    with suppress(OSError, ValueError):
        lines = Path(f"/proc/{pid}/io").read_text(encoding="ascii").splitlines()
        counts = {name: int(value) for name, _, value in (line.partition(":") for line in lines)}
        return counts["wchar"] + counts["syscw"] * _BLOCK_BYTES
    return 0


async def _ended(process: Process) -> None:
    """Kill the process and its group if it still runs, and wait for it, also while being cancelled again."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    waiting = asyncio.ensure_future(process.wait())
    while not waiting.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(waiting)


async def tree_bytes(tree: str, *, apparent: bool, timeout_seconds: float) -> int:
    """The bytes of a tree, hard links counted once: what is allocated, or with `apparent` what reading it gives.

    Done by du in a child process, so that a million files do not hold up the event loop; what vanishes meanwhile, in
    a container that still runs, is not counted. Raises TimeoutError, ValueError when du shows no number.
    """
    process = await asyncio.create_subprocess_exec(
        "du", "--summarize", "--one-file-system", "--block-size=1", *(["--apparent-size"] if apparent else []),
        "--", tree, stdin=DEVNULL, stdout=PIPE, stderr=DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout_seconds):
            output, _ = await process.communicate()
    finally:
        await _ended(process)
    size = output.split(b"\t", 1)[0]
    if not size.isdigit():
        raise ValueError(f"du shows no size for {tree}")
    return int(size)
