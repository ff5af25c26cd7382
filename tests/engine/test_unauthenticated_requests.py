"""Memory that requests without an identity take in a running daemon, over TCP."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.rig.patience import limit

__all__ = ["daemons"]

pytestmark = pytest.mark.deep

ADDRESS = "127.0.0.1:38054"
MIB = 1 << 20
# Without a limit of the flow control windows, the daemon grew by 190 to 740 MB.
_MAX_GROWTH = 60 * MIB
_SCRIPT = """
import asyncio, sys, grpc, grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT = float(sys.argv[2])

async def check_health(channel):
    request = health_pb2.HealthCheckRequest(service="x" * (4 << 20))
    try:
        await health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT)
    except grpc.aio.AioRpcError as error:
        return error.code().name

async def main():
    options = (("grpc.use_local_subchannel_pool", 1),)
    channels = [grpc.aio.insecure_channel(sys.argv[1], options=options) for _ in range(200)]
    print(*set(await asyncio.gather(*map(check_health, channels))))
    response = await health_pb2_grpc.HealthStub(channels[0]).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT)
    assert response.status == health_pb2.HealthCheckResponse.SERVING

asyncio.run(main())
"""


def _status(pid: int, field: str) -> int:
    """A field of /proc/PID/status, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


async def test_large_requests_of_many_connections_take_no_memory(daemons: IsolatedDaemons, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("ci:0123456789abcdef0123456789abcdef\n")
    tokens.chmod(0o600)
    daemon = await daemons.start("--listen", ADDRESS, "--token-file", str(tokens))
    before = _status(daemon.pid, "VmRSS")
    command = (sys.executable, "-c", _SCRIPT, ADDRESS, str(limit(60)))
    result = await asyncio.to_thread(daemons.rig.run, *command, timeout_s=limit(120))
    assert result.stdout.split() == ["RESOURCE_EXHAUSTED"]
    growth = _status(daemon.pid, "VmHWM") - before
    assert growth < _MAX_GROWTH, growth
