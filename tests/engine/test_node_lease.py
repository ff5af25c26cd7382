"""NodeLease: registration of a node by a running daemon, after a killed one, and by two daemons at once."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from datetime import timedelta

import pytest
from gpudock_server.adapters.etcd import (
    EtcdConnection,
    EtcdStore,
    NodeLease,
    NodeTaken,
    messages,
    this_process,
)
from gpudock_server.adapters.etcd.keys import Keys
from gpudock_server.adapters.etcd.values import encode
from gpudock_server.adapters.host.process_identity import ProcessIdentity, identify
from gpudock_server.model.node import NodeRecord

from tests.engine.etcd_examples import EXAMPLE_TIME, until

pytest_plugins = ["tests.engine.etcd_fixtures"]


def _node(process: ProcessIdentity) -> NodeRecord:
    return NodeRecord(
        node="n1",
        host="h1",
        address="unix:///run/gpudock.sock",
        version="1",
        engine_id="E",
        boot_id=process.boot_id,
        pid=process.pid,
        start_ticks=process.start_ticks,
        start_time=EXAMPLE_TIME,
    )


def _this_node() -> NodeRecord:
    return _node(this_process())


def _lease(connection: EtcdConnection, prefix: str, record: NodeRecord, ttl: float = 10) -> NodeLease:
    def lost(taken: NodeTaken) -> None:
        pytest.fail(str(taken))

    return NodeLease(connection, record, on_lost=lost, ttl=timedelta(seconds=ttl), prefix=prefix)


async def test_a_node_is_there_while_its_daemon_lives(
    store: EtcdStore, connection: EtcdConnection, prefix: str
) -> None:
    lease = _lease(connection, prefix, _this_node(), ttl=2)
    await lease.register()
    for _ in range(8):
        await asyncio.sleep(0.5)
        assert await store.nodes() == (_this_node(),)
    # A key deleted by an operator and a lease expired in an outage: both are registered again.
    for spoil in (connection.txn(success=[messages.delete(Keys(prefix).node("n1"))]), connection.revoke(lease._lease)):
        await spoil
        await until(store.nodes, seconds=3)
    await lease.close()
    assert await store.nodes() == ()


async def test_the_node_of_a_dead_process_is_taken_over_at_once(
    store: EtcdStore, connection: EtcdConnection, prefix: str
) -> None:
    child = await asyncio.create_subprocess_exec("/bin/sleep", "60")
    killed = _lease(connection, prefix, _node(identify(child.pid)))
    await killed.register()
    child.kill()
    lease = _lease(connection, prefix, _this_node())
    async with asyncio.timeout(3):  # It may be a zombie still, and is gone all the same.
        await lease.register()
    assert await store.nodes() == (_this_node(),)
    await child.wait()
    # Another process may have the same pid now.
    me = this_process()
    reused = _lease(connection, prefix, _node(replace(me, start_ticks=me.start_ticks - 1)))
    await lease.close()
    await reused.register()
    async with asyncio.timeout(3):
        await lease.register()
    await killed.close()
    await reused.close()
    assert await store.nodes() == (_this_node(),), "who lost the node does not take its key away"
    await lease.close()


@pytest.mark.deep
async def test_the_node_of_a_living_or_unknown_process_is_waited_for(connection: EtcdConnection, prefix: str) -> None:
    # The parent process runs; a process of another boot or host cannot be checked.
    parent = identify(os.getppid())
    elsewhere = replace(parent, boot_id="another boot")
    await asyncio.gather(
        _wait_for(connection, f"{prefix}here/", parent), _wait_for(connection, f"{prefix}elsewhere/", elsewhere)
    )


async def _wait_for(connection: EtcdConnection, prefix: str, process: ProcessIdentity) -> None:
    other = _lease(connection, prefix, _node(process), ttl=2)
    await other.register()
    began = asyncio.get_running_loop().time()
    with pytest.raises(NodeTaken, match=f"node 'n1' is in use by gpudockd on 'h1'.*pid {process.pid}") as taken:
        await _lease(connection, prefix, _this_node(), ttl=2).register()
    assert asyncio.get_running_loop().time() - began > 2
    assert taken.value.record.pid == process.pid
    # Frozen, it does not renew its lease, and its node is free after the lease has expired.
    assert other._heartbeat is not None
    other._heartbeat.cancel()
    lease = _lease(connection, prefix, _this_node(), ttl=2)
    await lease.register()
    await lease.close()
    await other.close()


async def test_a_daemon_that_lost_its_node_in_an_outage_is_told(connection: EtcdConnection, prefix: str) -> None:
    lost: asyncio.Queue[NodeTaken] = asyncio.Queue()
    brief = timedelta(seconds=2)
    lease = NodeLease(connection, _this_node(), on_lost=lost.put_nowait, ttl=brief, prefix=prefix)
    await lease.register()
    other = _node(ProcessIdentity("another boot", pid=1, start_ticks=1))
    await connection.txn(success=[messages.put(Keys(prefix).node("n1"), encode(other))])
    async with asyncio.timeout(3):
        assert (await lost.get()).record == other
    await lease.close()
