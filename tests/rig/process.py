"""A program that runs as part of a rig: enrolled in its control group, its output in a file, ended by its pid."""

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
# Enrols itself, so that not even its first child escapes, and becomes the program: the pid stays the same throughout.
_PRELUDE = 'echo $$ > "$1"; cd "$2"; shift 2; exec "$@"'


def freeze(pid: int) -> None:
    """Stops a process (SIGSTOP) and waits until each of its threads has stopped: until then it may still answer."""
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + limit(_FREEZE_S)
    while not all(state == "T" for state in _thread_states(pid)):
        if time.monotonic() > deadline:
            raise RigError(f"process {pid} was sent SIGSTOP and has not stopped within {_FREEZE_S:g} s")
        time.sleep(_POLL_S)


def _thread_states(pid: int) -> Iterator[str]:
    """The state of each thread, as the kernel's letter for it (proc(5)); nothing for threads that have ended."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # The name, in parentheses, may hold anything.
            yield (thread / "stat").read_text().rpartition(")")[2].split()[0]


class ProcessGroup:
    """The programs of one rig, which all live in one control group."""

    def __init__(self, folder: Path) -> None:
        """Makes the control group at `folder`."""
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
        """Starts a program.

        Args:
            argv: its command line.
            log: file that stdout and stderr are appended to.
            cwd: working folder, by default the log's.
            environment: the whole environment, by default this process's.
            inside: a command prefix that enters namespaces (`Namespaces.enter`).
        """
        prelude = ["/bin/sh", "-euc", _PRELUDE, "sh", str(self._procs), str(cwd or log.parent)]
        with log.open("ab") as output:
            # A session of its own: Ctrl-C reaches the owner alone, which then ends its processes in order.
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
        """Takes in what one of them has started, and what runs in the control group therefore."""
        self._started.append(process)
        return process

    def reap(self) -> None:
        """Collects the exit codes of programs that were killed, so that none stays as a zombie."""
        for process in self._started:
            process.wait()


class ProcessHandle(Protocol):
    """What `Process` needs of subprocess.Popen."""

    @property
    def pid(self) -> int:
        """Its process id."""

    def poll(self) -> int | None:
        """The exit code, None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the exit code; raises subprocess.TimeoutExpired."""


class Process:
    """A started program. `signal`, `terminate`, `pause` only send; `wait`, `stop`, `kill9` block the calling thread."""

    def __init__(self, name: str, popen: ProcessHandle, log: Path) -> None:
        """Wraps what was started."""
        self.name = name
        self.log = log
        self._popen = popen

    @property
    def pid(self) -> int:
        """Its process id, also after its end."""
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        """The exit code, minus the signal that killed it, or None while it runs."""
        return self._popen.poll()

    @property
    def running(self) -> bool:
        """Whether it has not ended yet."""
        return self.returncode is None

    @property
    def log_text(self) -> str:
        """All its output so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def signal(self, number: int) -> None:
        """Sends a signal; nothing happens if it has ended."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.signal(signal.SIGTERM)

    def kill9(self) -> int:
        """Sends SIGKILL and waits for the end; returns the exit code, -9."""
        self.signal(signal.SIGKILL)
        return self.wait()

    def pause(self) -> None:
        """Freezes it (SIGSTOP): it keeps its connections and answers nothing."""
        if self.running:
            freeze(self.pid)

    def resume(self) -> None:
        """Undoes `pause`."""
        self.signal(signal.SIGCONT)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Waits for its end; returns the exit code. Raises RigError after `timeout_s` seconds."""
        try:
            return self._popen.wait(limit(timeout_s))
        except subprocess.TimeoutExpired:
            raise RigError(f"{self.name} has not ended after {timeout_s} s\n{self.log_text[-_LOG_TAIL:]}") from None

    def stop(self, grace_s: float = 30.0) -> int:
        """SIGTERM, then SIGKILL after `grace_s` seconds; returns the exit code."""
        self.terminate()
        try:
            return self.wait(grace_s)
        except RigError:
            return self.kill9()

    def wait_until(self, ready: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Polls `ready` until it is true.

        Raises:
            RigError: the program ended, or is not ready after `timeout_s` seconds; its log's end is in the message.
        """
        deadline = time.monotonic() + limit(timeout_s)
        while not ready():
            if not self.running or time.monotonic() > deadline:
                state = "is not ready" if self.running else f"ended with {self.returncode}"
                raise RigError(f"{self.name} {state}\n{self.log_text[-_LOG_TAIL:]}")
            time.sleep(_POLL_S)
