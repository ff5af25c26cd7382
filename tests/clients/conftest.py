"""The scripted server, for each test its own."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gpudock import Client

from tests.clients.scripted import ScriptedServer


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    # pytest's own folders have names that are too long for a socket.
    with tempfile.TemporaryDirectory(prefix="gpudock-") as folder:
        scripted = ScriptedServer(Path(folder) / "s")
        await scripted.start()
        yield scripted
        await scripted.stop()


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[Client]:
    async with Client(server.address, retry_for=5.0, reattach_for=5.0) as connected:
        yield connected
