"""Connections of DockerEngine to the rig's engine, and scripts in containers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest_asyncio
from gpudock_server.adapters.docker import DockerEngine

from tests.rig import Rig
from tests.rig.patience import limit


@pytest_asyncio.fixture
async def engine(clean_engine: Rig) -> AsyncIterator[DockerEngine]:
    """A connection to the rig's engine, with a timeout that no call reaches."""
    async with connect_engine(clean_engine.engine.url, timeout=limit(60)) as engine:
        yield engine


@pytest_asyncio.fixture
async def direct_engine(engine: DockerEngine) -> DockerEngine:
    """The engine without a proxy, for calls that must succeed while a test uses `engine_proxy`."""
    return engine


@asynccontextmanager
async def connect_engine(url: str, *, timeout: float, tls: Path | None = None) -> AsyncIterator[DockerEngine]:
    """A connected engine; asserts at the end that no connection is in use."""
    engine = await DockerEngine.connect(url, tls=tls, timeout=timeout)
    try:
        yield engine
        assert connections_in_use(engine) == 0, "a connection has leaked"
    finally:
        await engine.close()


def labels_without_spec(labels: dict[str, str]) -> dict[str, str]:
    """The labels of an engine container except its spec, which must be there."""
    assert "gpudock.spec" in labels
    return {key: value for key, value in labels.items() if key != "gpudock.spec"}


def connections_in_use(engine: DockerEngine) -> int:
    """The number of an engine's HTTP connections in use."""
    return sum(len(connector._acquired) for connector in engine._connection._connectors)


async def run_shell(rig: Rig, name: str, script: str) -> str:
    """The combined output of a script inside a container, without DockerExecSession."""
    return await asyncio.to_thread(_run_shell, rig, name, script)


def _run_shell(rig: Rig, name: str, script: str) -> str:
    command = ["sh", "-c", f"({script}) > /dev/shm/output 2>&1; echo > /dev/shm/done"]
    created = rig.engine.call("POST", f"/containers/{name}/exec", send={"Cmd": command})
    rig.engine.call("POST", f"/exec/{created['Id']}/start", send={"Detach": True})
    memory = Path(f"/proc/{rig.engine.call('GET', f'/containers/{name}/json')['State']['Pid']}/root/dev/shm")
    deadline = time.monotonic() + limit(30)
    while not (memory / "done").exists():
        assert time.monotonic() < deadline, f"{script!r} does not end in {name}"
        time.sleep(0.005)
    (memory / "done").unlink()
    return (memory / "output").read_text()
