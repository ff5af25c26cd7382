"""Fixtures of tests that kill daemons."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.faults.container_scenarios import COMMITTED
from tests.faults.daemon_killer import SEED, DaemonKiller
from tests.rig import Rig
from tests.run_report import MOMENTS


@pytest_asyncio.fixture
async def daemon_killer(clean_engine: Rig, request: pytest.FixtureRequest) -> AsyncIterator[DaemonKiller]:
    """Kills daemons that only the test uses; the moments are reported with the test."""
    print(f"GPUDOCK_MOMENTS_SEED={SEED}")  # noqa: T201 - pytest shows it with a failure
    daemon_killer = DaemonKiller(clean_engine, f"{SEED}/{request.node.name}")
    request.node.user_properties.append((MOMENTS, daemon_killer.report))
    yield daemon_killer
    await daemon_killer.end()
    clean_engine.engine.remove_all()
    if COMMITTED in clean_engine.engine.image_ids():
        clean_engine.engine.call("DELETE", f"/images/{COMMITTED}")
