"""Fixtures of tests of the use cases on a model node."""

from __future__ import annotations

import pytest
from gpudock_server.core.operations import journal
from gpudock_server.core.volumes.commands import Create

from tests.unit.model_node import ModelNode
from tests.unit.scenario_setups import MIB


@pytest.fixture
async def model() -> ModelNode:
    """A node with container `a`."""
    node = ModelNode()
    await node.create_container()
    return node


@pytest.fixture
async def model_with_volume() -> ModelNode:
    """A node with volume `data` of 64 MiB."""
    node = ModelNode()
    await node.run_ok(Create("data", size_bytes=64 * MIB, owner="o", labels={"k": "v"}))
    return node


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry steps without a pause."""
    monkeypatch.setattr(journal, "_BACKOFF_SECONDS", (0.0,))
