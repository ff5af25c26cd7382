"""Loss of the store in the middle of a scale: a container that is only reported keeps its GPUs, ports and name."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from gpudock.v1 import container_pb2, node_service_pb2

from tests.calls import Caller, failure
from tests.engine.drift import REPORTED, engine_action, list_drift, wait_for_drift, wait_for_passes
from tests.engine.isolated_daemons import daemons, until
from tests.engine.store_loss import EmbeddedStoreDaemon, store_daemon
from tests.faults.instrumented_daemon import DIE_AT, KIND
from tests.rig import Rig

__all__ = ["daemons", "store_daemon"]

pytestmark = pytest.mark.deep

# The moment of a scale at which the new engine container has been created and the old one still runs.
SUCCESSOR_CREATED = "5"
PORT = container_pb2.PortRequest(container_port=80)


def engine_containers(rig: Rig, name: str) -> list[dict[str, Any]]:
    """The engine containers of a container."""
    listed: list[dict[str, Any]] = rig.engine.call("GET", "/containers/json?all=1")
    return [container for container in listed if container["Labels"].get("gpudock.name") == name]


async def claims_of_victim(caller: Caller) -> tuple[set[str], set[int]]:
    """The GPUs and the host ports that are claimed for `victim`."""
    ports = (await caller.nodes.ListPorts(node_service_pb2.ListPortsRequest())).ports
    return (
        {uuid for uuid, name in (await caller.holders()).items() if name == "victim"},
        {port.host_port for port in ports if port.container == "victim"},
    )


async def lose_store_during_scale(store_daemon: EmbeddedStoreDaemon) -> container_pb2.Container:
    """Lose the store while `victim` has two engine containers, one of which runs; returns `victim` before the scale."""
    async with Caller(store_daemon.daemon.target) as caller:
        victim = await caller.create("victim", 1, ports=[PORT])
    await store_daemon.kill()
    await store_daemon.start(
        module="tests.faults.instrumented_daemon", environment={KIND: "SCALE", DIE_AT: SUCCESSOR_CREATED}
    )
    async with Caller(store_daemon.daemon.target) as caller:
        with pytest.raises(grpc.aio.AioRpcError):
            await caller.scale("victim", 2)
    assert await asyncio.to_thread(store_daemon.daemon.wait) == -9, store_daemon.daemon.log_text
    await store_daemon.wait_for_etcd_exit()
    store_daemon.delete_store()
    await store_daemon.start()
    return victim


async def test_a_reported_container_that_runs_keeps_its_gpus_and_ports(
    store_daemon: EmbeddedStoreDaemon, rig: Rig
) -> None:
    victim = await lose_store_during_scale(store_daemon)
    victim_containers = engine_containers(rig, "victim")
    assert sorted(container["State"] for container in victim_containers) == ["created", "running"]
    gpus, ports = set(victim.status.gpu_uuids), {port.host_port for port in victim.status.ports}
    assert gpus
    assert ports
    async with Caller(store_daemon.daemon.target) as caller:
        assert (await wait_for_drift(caller, "CONTAINER_UNKNOWN", REPORTED, "victim")).container_uid == victim.uid
        assert await claims_of_victim(caller) == (gpus, ports)
        # No other container gets its GPUs or its port, by count or by number.
        free = await caller.free_gpus()
        other = await caller.create("other", free, ports=[PORT])
        assert not gpus & set(other.status.gpu_uuids)
        assert (await failure(caller.create("one-more", 1))).reason == "GPU_EXHAUSTED"
        pinned = container_pb2.PortRequest(container_port=80, host_port=min(ports))
        refused = await failure(caller.create("one-more", ports=[pinned]))
        assert refused.reason == "PORT_IN_USE"
        assert "victim" in refused.message
        # No other container gets its name, and a refused attempt creates no engine container.
        for attempt in (caller.create("victim"), caller.clone("other", "victim")):
            refused = await failure(attempt)
            assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "CONTAINER_EXISTS"), refused
            assert "no record" in refused.message
            assert "gpudock drift" in refused.message
        assert {container["Id"] for container in engine_containers(rig, "victim")} == {
            container["Id"] for container in victim_containers
        }
        # Full comparisons release no claim while the container runs or is paused.
        engine_action(rig, victim.status.engine_id, "pause")
        await wait_for_passes(caller)
        assert await claims_of_victim(caller) == (gpus, ports)
        engine_action(rig, victim.status.engine_id, "unpause")
        # A stopped container holds nothing. When it is started by hand, it gets back what no other container holds now.
        engine_action(rig, victim.status.engine_id, "stop?t=0")
        await _wait_for_claims(caller, (set(), set()))
        taker = await caller.create("taker", 1)
        assert set(taker.status.gpu_uuids) == gpus
        engine_action(rig, victim.status.engine_id, "start")
        conflict = await wait_for_drift(caller, "CLAIM_CONFLICT", REPORTED, "victim")
        assert (conflict.claim, conflict.other_container) == (min(gpus), "taker")
        await _wait_for_claims(caller, (set(), ports))
        await caller.delete("taker")
        await _wait_for_claims(caller, (gpus, ports))
        # When one of the two engine containers is removed, the record is restored from the other, with its claims.
        (created,) = (container for container in victim_containers if container["State"] == "created")
        rig.engine.call("DELETE", f"/containers/{created['Id']}?force=1")
        await wait_for_drift(caller, "RECORD_LOST", container="victim")
        assert set((await caller.get("victim")).status.gpu_uuids) == gpus
        await wait_for_passes(caller)
        assert await claims_of_victim(caller) == (gpus, ports)
        assert not await list_drift(caller)
        await caller.delete("victim")
        assert await claims_of_victim(caller) == (set(), set())


async def test_a_reported_container_that_is_removed_holds_nothing(store_daemon: EmbeddedStoreDaemon, rig: Rig) -> None:
    await lose_store_during_scale(store_daemon)
    async with Caller(store_daemon.daemon.target) as caller:
        assert (await claims_of_victim(caller))[0]
    # No daemon runs meanwhile: a daemon that finds exactly one engine container restores the record from it.
    await store_daemon.kill()
    for container in engine_containers(rig, "victim"):
        rig.engine.call("DELETE", f"/containers/{container['Id']}?force=1")
    await store_daemon.start()
    async with Caller(store_daemon.daemon.target) as caller:
        assert await claims_of_victim(caller) == (set(), set())
        # Its history is left, and keeps the name until the container is deleted.
        await caller.delete("victim")
        await caller.create("victim", 1)


async def _wait_for_claims(caller: Caller, expected: tuple[set[str], set[int]]) -> None:
    async def claims_are_as_expected() -> bool:
        return await claims_of_victim(caller) == expected

    await until(claims_are_as_expected)
