"""Programs of the host, run to their end within a time, and never longer than the daemon lives."""

from __future__ import annotations

import asyncio
import os
import shutil
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from gpudock_server.adapters.host.stalls import DEFAULT_STALL_SECONDS, StalledError, fail_if_stalled
from gpudock_server.adapters.host.trees.worker import kill_and_wait

_SECONDS: Final = 60.0
_COMPLAINT_CHARACTERS: Final = 500
# Where Debian and its kin keep them; a service's PATH has them, a user's shell may not.
_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_NO_SPACE_MESSAGES: Final = ("No space left on device", "Disk quota exceeded")
# The shell's $0 is the process id of the daemon.
_EXEC_IF_PARENT_ALIVE: Final = '[ "$PPID" = "$0" ] && exec "$@"'
_FILESYSTEMS: Final = Path("/proc/filesystems")
# Program -> why it is not used.
_UNUSABLE: Final[dict[str, str]] = {}


class ProgramFailed(Exception):
    """A program said no. The text is its name and what it said on stderr."""

    @property
    def no_space(self) -> bool:
        """Whether it failed because nothing more could be stored."""
        return any(phrase in str(self) for phrase in _NO_SPACE_MESSAGES)


def environment() -> dict[str, str]:
    """What every program is given: messages that can be read, and a PATH with the system's programs."""
    return {"LC_ALL": "C", "PATH": f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}"}


def missing_programs(*names: str) -> str:
    """Which of these programs the host lacks, or has in a version that is too old, in words; empty for none."""
    absent = [name for name in names if shutil.which(name, path=environment()["PATH"]) is None]
    if absent:
        return f"there is no {' and no '.join(absent)} on the PATH"
    return "; ".join(_UNUSABLE[name] for name in names if name in _UNUSABLE)


def mark_unusable(name: str, reason: str) -> None:
    """Have a program count as missing until the process ends; see `program_versions`."""
    _UNUSABLE[name] = reason


def with_parent_death_signal(command: Sequence[str]) -> list[str]:
    """The command, killed when the daemon dies: a program must not go on changing what the next daemon looks at.

    Of a daemon that died before the program had asked to be killed with it, nobody would tell the program. So it looks
    at its parent after that, and does not begin if that is another one.
    """
    if missing_programs("setpriv"):
        return list(command)
    return ["setpriv", "--pdeathsig", "KILL", "--", "/bin/sh", "-c", _EXEC_IF_PARENT_ALIVE, str(os.getpid()), *command]


async def run(*command: str, seconds: float = _SECONDS, include_stderr: bool = False) -> str:
    """Run a program and return what it printed. Raises ProgramFailed. Cancelling kills it and waits for its end.

    It is killed after `seconds`, and when it makes no progress for DEFAULT_STALL_SECONDS. `include_stderr`: what it
    printed on stderr follows what it printed on stdout.
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
            talking = process.communicate()
            printed, complaint = await fail_if_stalled(talking, process.pid, command[0], DEFAULT_STALL_SECONDS)
    except TimeoutError as error:
        raise ProgramFailed(f"{command[0]} had not ended after {seconds:.0f} s") from error
    except StalledError as error:
        raise ProgramFailed(str(error)) from error
    finally:
        await kill_and_wait(process)
    if process.returncode != 0:
        raise ProgramFailed(f"{command[0]}: {_shortened(complaint) or f'exit code {process.returncode}'}")
    return (printed + complaint if include_stderr else printed).decode(errors="replace")


async def kernel_lacks(filesystem: str) -> str:
    """Why the kernel cannot mount a filesystem; empty when it can, perhaps by loading a module first."""
    if filesystem in await asyncio.to_thread(_FILESYSTEMS.read_text, encoding="ascii"):
        return ""
    if not missing_programs("modprobe"):
        with suppress(ProgramFailed):
            await run("modprobe", "--dry-run", "--quiet", filesystem)
            return ""
    return f"the kernel has no {filesystem}"


def _shortened(complaint: bytes) -> str:
    lines = complaint.decode(errors="replace").split("\n")
    return "; ".join(line.strip() for line in lines if line.strip())[:_COMPLAINT_CHARACTERS]
