"""A server with fakes for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.rpc.in_memory_server import InMemoryServer, serve


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[InMemoryServer]:
    """A server with fakes."""
    async with serve(tmp_path) as running:
        yield running
