"""Programs that run in a rig: in its control group, with their output in a file."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from .errors import RigError
from .patience import limit

_POLL_S = 0.005
_LOG_TAIL = 4000
_FREEZE_S = 10.0
# The shell adds itself to the control group, so that no child is outside, and then executes the program: the process id
# stays the same.
_PRELUDE = 'echo $$ > "$1"; cd "$2"; shift 2; exec "$@"'


def freeze(pid: int) -> None:
    """Send SIGSTOP and wait until each thread of the process has stopped, since it may answer until then.

    Raises RigError if a thread does not stop in time.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + limit(_FREEZE_S)
    while not all(state == "T" for state in _thread_states(pid)):
        if time.monotonic() > deadline:
            raise RigError(f"process {pid} was sent SIGSTOP and has not stopped within {_FREEZE_S:g} s")
        time.sleep(_POLL_S)


def _thread_states(pid: int) -> Iterator[str]:
    """The state of each thread as a letter of proc(5); threads that have ended are left out."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # The name, in parentheses, can contain any character.
            yield (thread / "stat").read_text().rpartition(")")[2].split()[0]


class ProcessGroup:
    """The programs of one rig, which run in one control group."""

    def __init__(self, folder: Path) -> None:
        """Make the control group `folder`."""
        folder.mkdir(parents=True)
        self._procs = folder / "cgroup.procs"
        self._started: list[Process] = []

    def start(
        self,
        argv: Sequence[str | Path],
        *,
        log: Path,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
        inside: Sequence[str] = (),
    ) -> "Process":
        """Start a program.

        Args:
            argv: the command line.
            log: the file that stdout and stderr are appended to.
            cwd: the working folder, by default that of the log.
            environment: the whole environment, by default this process's.
            inside: a command prefix that enters namespaces (`Namespaces.enter`).
        """
        prelude = ["/bin/sh", "-euc", _PRELUDE, "sh", str(self._procs), str(cwd or log.parent)]
        with log.open("ab") as output:
            # A session of its own, so that Ctrl-C reaches only the owner, which then ends its programs.
            popen = subprocess.Popen(
                [*inside, *prelude, *argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=None if environment is None else dict(environment),
                start_new_session=True,
            )
        return self.adopt(Process(str(argv[0]), popen, log))

    def adopt(self, process: "Process") -> "Process":
        """Add a process that a program of the group has started, and that is in the control group therefore."""
        self._started.append(process)
        return process

    def reap(self) -> None:
        """Wait for all programs, which have been killed, so that none stays as a zombie."""
        for process in self._started:
            process.wait()


class ProcessHandle(Protocol):
    """The part of subprocess.Popen that `Process` uses."""

    @property
    def pid(self) -> int:
        """The process id."""

    def poll(self) -> int | None:
        """The exit code; None while the process runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; returns the exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""


class Process:
    """A started program. `signal` and `terminate` do not wait; `pause`, `wait`, `stop` and `kill9` block the thread."""

    def __init__(self, name: str, popen: ProcessHandle, log: Path) -> None:
        """`log` is the file with the output of the process."""
        self.name = name
        self.log = log
        self._popen = popen

    @property
    def pid(self) -> int:
        """The process id, also after the end."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; negative: the signal that killed the program; None while it runs."""
        return self._popen.poll()

    @property
    def running(self) -> bool:
        """Whether the program has not ended."""
        return self.returncode is None

    @property
    def log_text(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def signal(self, number: int) -> None:
        """Send a signal; does nothing if the program has ended."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.signal(signal.SIGTERM)

    def kill9(self) -> int:
        """Send SIGKILL and wait for the end; returns the exit code, -9 unless the program had ended before."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def pause(self) -> None:
        """Send SIGSTOP and wait until all threads have stopped: connections stay open, and nothing answers."""
        if self.running:
            freeze(self.pid)

    def resume(self) -> None:
        """Undo `pause`."""
        self.signal(signal.SIGCONT)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for the end; returns the exit code. Raises RigError after `timeout_s` seconds."""
        try:
            return self._popen.wait(limit(timeout_s))
        except subprocess.TimeoutExpired:
            raise RigError(f"{self.name} has not ended after {timeout_s} s\n{self.log_text[-_LOG_TAIL:]}") from None

    def stop(self, grace_s: float = 30.0) -> int:
        """Send SIGTERM, and SIGKILL after `grace_s` seconds; returns the exit code."""
        self.terminate()
        try:
            return self.wait(grace_s)
        except RigError:
            return self.kill9()

    def wait_until(self, ready: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Poll `ready` until it returns true.

        Raises:
            RigError: the program ended, or is not ready after `timeout_s` seconds; the message has the end of the log.
        """
        deadline = time.monotonic() + limit(timeout_s)
        while not ready():
            if not self.running or time.monotonic() > deadline:
                state = "is not ready" if self.running else f"ended with {self.returncode}"
                raise RigError(f"{self.name} {state}\n{self.log_text[-_LOG_TAIL:]}")
            time.sleep(_POLL_S)
