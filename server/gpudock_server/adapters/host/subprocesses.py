"""Run programs of the host with a time limit; they end with the daemon."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from gpudock_server.adapters.host.stalls import DEFAULT_STALL_SECONDS, StalledError, fail_if_stalled

_SECONDS: Final = 60.0
_MAX_STDERR_CHARACTERS: Final = 500
# Folders of system programs on Debian and its derivatives; the PATH of a user's shell may not contain them.
_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_NO_SPACE_MESSAGES: Final = ("No space left on device", "Disk quota exceeded")
# The shell's $0 is the process id of the daemon.
_EXEC_IF_PARENT_ALIVE: Final = '[ "$PPID" = "$0" ] && exec "$@"'
_FILESYSTEMS: Final = Path("/proc/filesystems")
# Program -> why it must not be used.
_UNUSABLE: Final[dict[str, str]] = {}


class ProgramFailed(Exception):
    """A program failed; the message is its name and its stderr."""

    @property
    def no_space(self) -> bool:
        """Whether it failed because the disk or a quota is full."""
        return any(phrase in str(self) for phrase in _NO_SPACE_MESSAGES)


def environment() -> dict[str, str]:
    """Return the environment of all programs: English messages, and a PATH with the system programs."""
    return {"LC_ALL": "C", "PATH": f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"}


def missing_programs(*names: str) -> str:
    """Return a message about the programs that are missing or too old; empty if all can be used."""
    absent = [name for name in names if shutil.which(name, path=environment()["PATH"]) is None]
    if absent:
        return f"not found on PATH: {', '.join(absent)}"
    return "; ".join(_UNUSABLE[name] for name in names if name in _UNUSABLE)


def mark_unusable(name: str, reason: str) -> None:
    """Treat a program as missing until this process ends; see `program_versions`."""
    _UNUSABLE[name] = reason


def with_parent_death_signal(command: Sequence[str]) -> list[str]:
    """Return the command with a wrapper that kills it when the daemon dies.

    A program must not change files while the next daemon works with them. The kernel does not signal a parent that died
    before the wrapper requested the signal; so the wrapper then checks that its parent is still the daemon.
    """
    if missing_programs("setpriv"):
        return list(command)
    return ["setpriv", "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _EXEC_IF_PARENT_ALIVE, str(os.getpid()), *command]


async def run(*command: str, seconds: float = _SECONDS, include_stderr: bool = False) -> str:
    """Run a program and return its stdout. Raises ProgramFailed. Cancelling kills it and waits for its end.

    It is killed after `seconds`, or if it makes no progress for DEFAULT_STALL_SECONDS. `include_stderr`: append its
    stderr to the result.
    """
    process = await asyncio.create_subprocess_exec(
        *with_parent_death_signal(command),
        stdin=DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        start_new_session=True,
        env=environment(),
    )
    try:
        async with asyncio.timeout(seconds):
            output = process.communicate()
            stdout, stderr = await fail_if_stalled(output, process.pid, command[0], DEFAULT_STALL_SECONDS)
    except TimeoutError as error:
        raise ProgramFailed(f"{command[0]} timed out after {seconds:.0f} s") from error
    except StalledError as error:
        raise ProgramFailed(str(error)) from error
    finally:
        await kill_and_wait(process)
    if process.returncode != 0:
        raise ProgramFailed(f"{command[0]}: {_shortened(stderr) or f'exit code {process.returncode}'}")
    return (stdout + stderr if include_stderr else stdout).decode(errors="replace")


async def kill_and_wait(process: Process) -> None:
    """Kill a process and its process group if it still runs, and wait for its end, even if cancelled meanwhile."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    waiting = asyncio.ensure_future(process.wait())
    while not waiting.done():
        with suppress(asyncio.CancelledError):
            await asyncio.shield(waiting)


async def kernel_lacks(filesystem: str) -> str:
    """Why the kernel cannot mount a filesystem; empty if it can, possibly after loading a module."""
    if filesystem in await asyncio.to_thread(_FILESYSTEMS.read_text, encoding="ascii"):
        return ""
    if not missing_programs("modprobe"):
        with suppress(ProgramFailed):
            await run("modprobe", "--dry-run", "--quiet", filesystem)
            return ""
    return f"the kernel does not support {filesystem}"


def _shortened(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").split("\n")
    return "; ".join(line.strip() for line in lines if line.strip())[:_MAX_STDERR_CHARACTERS]
