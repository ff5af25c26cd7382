"""A gpudockd, or another entry point with the same flags, that runs in the rig."""

import contextlib
import socket
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from .process import Process

_CHECK_S = 2.0


def serving(path: Path, service: str = "") -> bool:
    """Whether the gRPC server at the unix socket accepts a connection and its health service says SERVING."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CHECK_S)
        probe.connect(str(path))
        with grpc.insecure_channel(f"unix:{path}") as channel, contextlib.suppress(grpc.RpcError):
            stub = health_pb2_grpc.HealthStub(channel)
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=_CHECK_S)
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
    return False


class Daemon:
    """A daemon under test.

    `wait`, `stop`, `kill9` and `await_serving` block. They must be called in a thread if the daemon calls a server in
    the caller's event loop, such as an engine proxy.
    """

    def __init__(self, process: Process, socket_path: Path, state_dir: Path) -> None:
        self.process = process
        self.socket = socket_path
        self.state_dir = state_dir

    @property
    def target(self) -> str:
        """The address for grpc.aio.insecure_channel."""
        return f"unix:{self.socket}"

    @property
    def pid(self) -> int:
        """The process id of the daemon."""
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit code; negative: the signal that killed the daemon; None while it runs."""
        return self.process.returncode

    @property
    def running(self) -> bool:
        """Whether the daemon has not ended."""
        return self.process.running

    @property
    def log_text(self) -> str:
        """The stdout and stderr of the daemon so far."""
        return self.process.log_text

    def serving(self) -> bool:
        """Whether the health service of the daemon says SERVING."""
        return serving(self.socket)

    def await_serving(self, timeout_s: float = 30.0) -> None:
        """Wait for SERVING. Raises RigError, with the end of the log, if the daemon ends or is not serving in time."""
        self.process.wait_until(self.serving, timeout_s)

    def signal(self, number: int) -> None:
        """Send a signal to the daemon."""
        self.process.signal(number)

    def terminate(self) -> None:
        """Send SIGTERM and do not wait."""
        self.process.terminate()

    def kill9(self) -> int:
        """Send SIGKILL and wait for the end; returns the exit code."""
        return self.process.kill9()

    def wait(self, timeout_s: float = 30.0) -> int:
        """Wait for the end; returns the exit code."""
        return self.process.wait(timeout_s)

    def stop(self, grace_s: float = 30.0) -> int:
        """Send SIGTERM, and SIGKILL after `grace_s` seconds; returns the exit code."""
        return self.process.stop(grace_s)
