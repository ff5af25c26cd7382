"""A fork server: a process that has imported gpudockd's code and forks daemons, which start in milliseconds.

Starting an interpreter and importing the code takes most of a second of a core, and a test run starts a thousand
daemons. Nothing else is shared: a forked process has its own session, environment, arguments and output, runs its
module as `python -m` does, and ends as an interpreter ends. The fork server has one thread and opens only its socket,
so forking is safe. It runs in the control group and the namespaces of the rig; the forked processes stay there, and end
with the rig.

This file uses the standard library alone and imports nothing of the package: it is run as a script, `fork_server.py
SOCKET`, and a forked process must find exactly those modules loaded that gpudockd imports. Each connection to the
socket requests one process, and receives its process id and later its wait status.
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

# These import all modules of a daemon; the instrumented daemons of tests import few others.
_IMPORTS = ("gpudock_server.settings.sources", "gpudock_server.app")
_MOST_BYTES = 1 << 17


class Child:
    """A forked process, with those methods of subprocess.Popen that `Process` uses; for any thread."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        """`connection` receives the wait status of the process."""
        self.pid = pid
        self._connection = connection
        self._lock = threading.Lock()
        self._returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code; negative: the signal that killed the process; None while it runs."""
        return self._receive_exit(within=0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; returns the exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        # Short waits, because each holds the lock and other threads may poll meanwhile.
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
                    # The fork server ends by being killed, together with all processes that it has forked.
                    self._returncode = os.waitstatus_to_exitcode(int(status)) if status else -signal.SIGKILL
                    self._connection.close()
            return self._returncode


def fork(path: Path, argv: Sequence[str], *, environment: Mapping[str, str], output: int) -> Child:
    """Fork a process that does the same as `python -m argv…`; the descriptor `output` becomes its stdout and stderr."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.connect(str(path))
        socket.send_fds(connection, [json.dumps([list(argv), dict(environment)]).encode()], [output])
        pid = connection.recv(64)  # empty if the fork server has ended; its log says why
        return Child(int(pid), connection)
    except BaseException:
        connection.close()
        raise


class _ForkServer:
    """Forks processes, and reports their wait statuses."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self) -> list[str]:
        """Serve forever; returns only in a forked process: its module and arguments."""
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
        with contextlib.suppress(OSError), connection:  # the client may have disconnected
            connection.send(str(status).encode())

    def _close(self) -> None:
        """Close the descriptors of the fork server in a forked process."""
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
    """Serve until killed; in a forked process, run the requested module."""
    path = Path(sys.argv[1])
    sys.path[0] = str(Path.cwd())  # as `python -m` has it
    for name in _IMPORTS:
        importlib.import_module(name)
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise RuntimeError("an import has started threads, which do not exist in a forked process")
    # The imported objects are never freed. Without garbage collection of them, their memory pages remain shared.
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
