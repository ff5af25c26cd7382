"""NodeLease: registration of a node by a running daemon, after a killed one, and by two daemons at the same time."""

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

from tests.engine.etcd_examples import EXAMPLE_TIME
from tests.engine.isolated_daemons import until
from tests.rig.patience import limit

pytest_plugins = ["tests.engine.etcd_fixtures"]


def _node_record(process: ProcessIdentity) -> NodeRecord:
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


def _own_node_record() -> NodeRecord:
    return _node_record(this_process())


def _lease(connection: EtcdConnection, prefix: str, record: NodeRecord, ttl: float = 10) -> NodeLease:
    """A lease of `limit(ttl)` seconds; the test fails if the node is lost."""

    def fail_test(taken: NodeTaken) -> None:
        pytest.fail(str(taken))

    return NodeLease(connection, record, on_lost=fail_test, ttl=timedelta(seconds=limit(ttl)), prefix=prefix)


async def test_a_node_is_registered_while_its_daemon_runs(
    store: EtcdStore, connection: EtcdConnection, prefix: str
) -> None:
    lease = _lease(connection, prefix, _own_node_record(), ttl=2)
    await lease.register()
    # Twice as long as the lease lasts without renewal.
    for _ in range(8):
        await asyncio.sleep(limit(2) / 4)
        assert await store.nodes() == (_own_node_record(),)
    # The node is registered again after an operator has deleted the key, and after the lease has expired in an outage.
    for harm in (connection.txn(success=[messages.delete(Keys(prefix).node("n1"))]), connection.revoke(lease._lease)):
        await harm
        await until(store.nodes, 10)
    await lease.close()
    assert await store.nodes() == ()


async def test_the_node_of_a_dead_process_is_taken_over_before_the_lease_expires(
    store: EtcdStore, connection: EtcdConnection, prefix: str
) -> None:
    child = await asyncio.create_subprocess_exec("/bin/sleep", "60")
    killed = _lease(connection, prefix, _node_record(identify(child.pid)))
    await killed.register()
    child.kill()
    lease = _lease(connection, prefix, _own_node_record())
    # Much sooner than the lease expires, also while the dead process is a zombie.
    async with asyncio.timeout(limit(3)):
        await lease.register()
    assert await store.nodes() == (_own_node_record(),)
    await child.wait()
    # A node is also taken over from a process whose pid another process has now.
    own_process = this_process()
    reused = _lease(connection, prefix, _node_record(replace(own_process, start_ticks=own_process.start_ticks - 1)))
    await lease.close()
    await reused.register()
    async with asyncio.timeout(limit(3)):
        await lease.register()
    await killed.close()
    await reused.close()
    assert await store.nodes() == (_own_node_record(),), "closing a lost lease does not delete the key"
    await lease.close()


@pytest.mark.deep
async def test_the_node_of_a_running_or_unknown_process_is_taken_over_after_its_lease(
    connection: EtcdConnection, prefix: str
) -> None:
    # The parent process runs. Whether a process of another boot or host runs is unknown.
    parent = identify(os.getppid())
    elsewhere = replace(parent, boot_id="another boot")
    await asyncio.gather(
        _check_takeover(connection, f"{prefix}here/", parent),
        _check_takeover(connection, f"{prefix}elsewhere/", elsewhere),
    )


async def _check_takeover(connection: EtcdConnection, prefix: str, process: ProcessIdentity) -> None:
    other = _lease(connection, prefix, _node_record(process), ttl=2)
    await other.register()
    begin = asyncio.get_running_loop().time()
    with pytest.raises(NodeTaken, match=f"node 'n1' is in use by gpudockd on 'h1'.*pid {process.pid}") as taken:
        await _lease(connection, prefix, _own_node_record(), ttl=2).register()
    assert asyncio.get_running_loop().time() - begin > 2
    assert taken.value.record.pid == process.pid
    # The lease of a daemon that does not renew it expires, and the node is free.
    assert other._heartbeat is not None
    other._heartbeat.cancel()
    lease = _lease(connection, prefix, _own_node_record(), ttl=2)
    await lease.register()
    await lease.close()
    await other.close()


async def test_a_daemon_that_lost_its_node_in_an_outage_is_notified(connection: EtcdConnection, prefix: str) -> None:
    losses: asyncio.Queue[NodeTaken] = asyncio.Queue()
    ttl = timedelta(seconds=limit(2))
    lease = NodeLease(connection, _own_node_record(), on_lost=losses.put_nowait, ttl=ttl, prefix=prefix)
    await lease.register()
    other = _node_record(ProcessIdentity("another boot", pid=1, start_ticks=1))
    await connection.txn(success=[messages.put(Keys(prefix).node("n1"), encode(other))])
    async with asyncio.timeout(limit(10)):
        assert (await losses.get()).record == other
    await lease.close()
