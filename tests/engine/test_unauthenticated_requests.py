"""What callers without an identity cost a daemon that runs, over TCP."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.engine.isolated_daemons import IsolatedDaemons, daemons

__all__ = ["daemons"]

pytestmark = pytest.mark.deep

ADDRESS = "127.0.0.1:38054"
MIB = 1 << 20
# When windows grew with the speed of the network, the daemon grew by 190 to 740 MB.
_MOST_GROWTH = 60 * MIB
_SCRIPT = """
import asyncio, sys, grpc, grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.rig.patience import limit

async def ask(channel):
    request = health_pb2.HealthCheckRequest(service="x" * (4 << 20))
    try:
        await health_pb2_grpc.HealthStub(channel).Check(request, timeout=60)
    except grpc.aio.AioRpcError as error:
        return error.code().name

async def main():
    own = (("grpc.use_local_subchannel_pool", 1),)
    channels = [grpc.aio.insecure_channel(sys.argv[1], options=own) for _ in range(200)]
    print(*set(await asyncio.gather(*map(ask, channels))))
    known = await health_pb2_grpc.HealthStub(channels[0]).Check(health_pb2.HealthCheckRequest(), timeout=limit(60))
    assert known.status == health_pb2.HealthCheckResponse.SERVING

asyncio.run(main())
"""


def _status(pid: int, field: str) -> int:
    """Bytes of a field of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


async def test_large_requests_of_many_connections_take_no_memory(daemons: IsolatedDaemons, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text("ci:0123456789abcdef0123456789abcdef\n")
    tokens.chmod(0o600)
    daemon = await daemons.start("--listen", ADDRESS, "--token-file", str(tokens))
    before = _status(daemon.pid, "VmRSS")
    asked = await asyncio.to_thread(daemons.rig.run, sys.executable, "-c", _SCRIPT, ADDRESS, timeout_s=120)
    assert asked.stdout.split() == ["RESOURCE_EXHAUSTED"]
    growth = _status(daemon.pid, "VmHWM") - before
    assert growth < _MOST_GROWTH, growth
