"""Pytest fixtures: each implementation of the store port, by the name that stands in a test's id."""

from __future__ import annotations

from datetime import timedelta

import pytest
from aetcd import rpc
from gpudock_server.adapters.etcd import EtcdConnection, EtcdStore, messages
from gpudock_server.ports import Store

from tests.contracts.store_examples import Forget
from tests.rig.patience import limit
from tests.rpc.memory_store import MemoryStore

pytest_plugins = ["tests.engine.etcd_fixtures"]

# Long enough that no watch of a test becomes idle.
QUIET = timedelta(seconds=60)


@pytest.fixture
async def etcd_store(connection: EtcdConnection, prefix: str) -> EtcdStore:
    """On the rig's etcd, below a prefix of its own."""
    store = EtcdStore(connection, prefix=prefix, idle=QUIET)
    await store.open()
    return store


@pytest.fixture
def memory_store() -> MemoryStore:
    """The fake of unit and RPC tests."""
    return MemoryStore()


@pytest.fixture(params=["memory", "etcd"])
def any_store(request: pytest.FixtureRequest) -> Store:
    """Each implementation in turn."""
    store: Store = request.getfixturevalue(f"{request.param}_store")
    return store


@pytest.fixture
def forget(any_store: Store, request: pytest.FixtureRequest) -> Forget:
    """Makes a store forget its past: all tokens given out before have expired."""
    if isinstance(any_store, MemoryStore):
        return any_store.forget
    connection: EtcdConnection = request.getfixturevalue("connection")

    async def compact() -> None:
        # What a watch or a page still needs is of a revision before the last one.
        await connection.txn(success=[messages.put(b"/forget", b"")])
        revision = (await connection.txn(success=[messages.put(b"/forget", b"")])).revision
        await connection._client.kvstub.Compact(
            rpc.CompactionRequest(revision=revision, physical=True), timeout=limit(20)
        )

    return compact
