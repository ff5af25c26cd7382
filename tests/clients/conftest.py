"""A scripted server for each test, and a client of it."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gpudock import Client

from tests.clients.scripted_server import ScriptedServer
from tests.rig.patience import limit


@pytest.fixture
async def server() -> AsyncIterator[ScriptedServer]:
    # The paths of tmp_path are too long for a unix socket.
    with tempfile.TemporaryDirectory(prefix="gpudock-") as folder:
        scripted = ScriptedServer(Path(folder) / "s")
        await scripted.start()
        yield scripted
        await scripted.stop()


@pytest.fixture
async def client(server: ScriptedServer) -> AsyncIterator[Client]:
    async with Client(server.address, retry_for=limit(5.0), reattach_for=limit(5.0)) as connected:
        yield connected
