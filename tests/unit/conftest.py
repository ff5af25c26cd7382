"""Fixtures of tests of the use cases on a model node."""

from __future__ import annotations

import pytest
from gpudock_server.core.operations import journal

from tests.unit.model_node import ModelNode


@pytest.fixture
async def model() -> ModelNode:
    """A node with container `a`."""
    node = ModelNode()
    await node.create_container()
    return node


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry steps without a pause."""
    monkeypatch.setattr(journal, "_BACKOFF_SECONDS", (0.0,))
