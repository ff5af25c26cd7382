"""Pytest fixtures: a store with its own prefix in the rig's etcd, and an embedded etcd for one test."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from gpudock_server.adapters.etcd import EmbeddedEtcd, EtcdConnection, EtcdStore

from tests.engine.etcd_examples import open_connection
from tests.rig import Rig


@pytest.fixture
def prefix() -> str:
    return f"/test-{uuid.uuid4().hex}/"


@pytest_asyncio.fixture
async def connection(rig: Rig) -> AsyncIterator[EtcdConnection]:
    async with open_connection(rig.etcd.endpoint) as connection:
        yield connection


@pytest_asyncio.fixture
async def store(connection: EtcdConnection, prefix: str) -> EtcdStore:
    store = EtcdStore(connection, prefix=prefix)
    await store.open()
    return store


@pytest_asyncio.fixture
async def own_etcd(tmp_path: Path) -> AsyncIterator[EmbeddedEtcd]:
    """An embedded etcd that a test may freeze and kill."""
    etcd = EmbeddedEtcd(tmp_path, allow_inconsistent=True)
    await etcd.start()
    yield etcd
    await etcd.close()
