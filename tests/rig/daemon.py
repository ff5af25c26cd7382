"""A gpudockd (or a test's own entry point around it) that runs in the rig."""

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

    What blocks (`wait`, `stop`, `kill9`, `await_serving`) belongs in a thread if what the daemon talks to, such as an
    engine proxy, lives in the caller's event loop.
    """

    def __init__(self, process: Process, socket_path: Path, state_dir: Path) -> None:
        self.process = process
        self.socket = socket_path
        self.state_dir = state_dir

    @property
    def target(self) -> str:
        """What grpc.aio.insecure_channel takes."""
        return f"unix:{self.socket}"

    @property
    def pid(self) -> int:
        """The daemon's own pid."""
        return self.process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, minus the signal that killed it, or None while it runs."""
        return self.process.returncode

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.running

    @property
    def log_text(self) -> str:
        """Its stdout and stderr so far."""
        return self.process.log_text

    def serving(self) -> bool:
        """Whether its health service says SERVING."""
        return serving(self.socket)

    def await_serving(self, timeout_s: float = 30.0) -> None:
        """Waits for SERVING; raises RigError, with the end of the log, if the daemon ends or time runs out."""
        self.process.wait_until(self.serving, timeout_s)

    def signal(self, number: int) -> None:
        """Sends a signal."""
        self.process.signal(number)

    def terminate(self) -> None:
        """Sends SIGTERM and does not wait."""
        self.process.terminate()

    def kill9(self) -> int:
        """SIGKILL, and waits for the end."""
        return self.process.kill9()

    def wait(self, timeout_s: float = 30.0) -> int:
        """Waits for the end; returns the exit code."""
        return self.process.wait(timeout_s)

    def stop(self, grace_s: float = 30.0) -> int:
        """SIGTERM, and SIGKILL after `grace_s` seconds; returns the exit code."""
        return self.process.stop(grace_s)
