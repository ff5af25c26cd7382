"""Daemons that start in milliseconds: one process has imported gpudockd's code, and forks whatever is asked for.

To start an interpreter and to import takes most of a second of a core, which a suite that starts a thousand daemons
cannot spare. Nothing else is shared: what is forked has its own session, environment, arguments and output, runs its
module as `python -m` does, and ends as an interpreter ends. The nursery has one thread and opens nothing but its
socket, so there is nothing that a fork could harm. It runs in the rig's control group and namespaces; what it forks
stays there, and is ended with the rest of the rig.

This file uses the standard library alone and imports nothing of the package: it is run as a script, `nursery.py
SOCKET`, and what it forks must find loaded what gpudockd imports and no more. Each connection to the socket asks for
one process and is told its pid, then its wait status.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

# All that a daemon imports; what tests put around it has little more.
_IMPORTS = ("gpudock_server.settings.sources", "gpudock_server.app")
_MOST_BYTES = 1 << 17


class Child:
    """A process that the nursery forked, with as much of subprocess.Popen as `Process` uses; for any thread."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        """Takes the connection by which its end is told."""
        self.pid = pid
        self._connection = connection
        self._lock = threading.Lock()
        self._returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, minus the signal that killed it, or None while it runs."""
        return self._receive_exit(within=0)

    def wait(self, timeout: float | None = None) -> int:
        """Waits for its end. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        # In short turns: others may poll meanwhile.
        while (code := self._receive_exit(within=0.02)) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        return code

    def _receive_exit(self, within: float) -> int | None:
        with self._lock:
            if self._returncode is None:
                self._connection.settimeout(within)
                with contextlib.suppress(BlockingIOError, TimeoutError):
                    status = self._connection.recv(64)
                    # A nursery ends by being killed, together with all that it has forked.
                    self._returncode = os.waitstatus_to_exitcode(int(status)) if status else -signal.SIGKILL
                    self._connection.close()
            return self._returncode


def fork(path: Path, argv: Sequence[str], *, environment: Mapping[str, str], output: int) -> Child:
    """Has a process made that does what `python -m argv…` does, stdout and stderr going to the descriptor `output`."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(str(path))
        socket.send_fds(connection, [json.dumps([list(argv), dict(environment)]).encode()], [output])
        pid = connection.recv(64)  # nothing, if the nursery has ended, which its log explains
        return Child(int(pid), connection)
    except BaseException:
        connection.close()
        raise


class _ForkServer:
    """Forks, and tells who asked what became of it."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self) -> list[str]:
        """Returns only in what was forked: what that is to run."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is not self._listener:
                    self._report_exit(key.fd, *key.data)
                elif argv := self._fork():
                    return argv

    def _fork(self) -> list[str]:
        connection, _ = self._listener.accept()
        message, (output,), _, _ = socket.recv_fds(connection, _MOST_BYTES, 1)
        argv, environment = json.loads(message)
        pid = os.fork()
        if not pid:
            connection.close()
            self._close()
            _set_up_child(environment, output)
            return list(argv)
        os.close(output)
        connection.send(str(pid).encode())
        self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
        return []

    def _report_exit(self, descriptor: int, pid: int, connection: socket.socket) -> None:
        self._selector.unregister(descriptor)
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(OSError), connection:  # whoever asked may be gone
            connection.send(str(status).encode())

    def _close(self) -> None:
        """Keep no descriptor of the nursery's."""
        for key in list(self._selector.get_map().values()):
            if key.fileobj is not self._listener:
                os.close(key.fd)
                key.data[1].close()
        self._selector.close()
        self._listener.close()


def _set_up_child(environment: Mapping[str, str], output: int) -> None:
    os.setsid()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)


def main() -> None:
    """Serves until it is killed; in what it forks, runs what was asked for."""
    path = Path(sys.argv[1])
    sys.path[0] = str(Path.cwd())  # as `python -m` has it
    for name in _IMPORTS:
        importlib.import_module(name)
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise RuntimeError("what was imported has started threads, which a fork would not take along")
    # What stays for ever need not be looked at again, and is shared for as long as nobody touches it.
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    partial = path.with_suffix(".partial")
    listener.bind(str(partial))
    listener.listen(64)
    partial.rename(path)
    module, *sys.argv[1:] = _ForkServer(listener).serve()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
