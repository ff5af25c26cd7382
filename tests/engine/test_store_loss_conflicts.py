"""The store lost in the middle of a replacement: what is only reported keeps its cards, its ports and its name."""

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

# The second engine container of a scale has been created, and the first one still runs.
CREATED = "5"
PORT = container_pb2.PortRequest(container_port=80)


def engine_containers(rig: Rig, name: str) -> list[dict[str, Any]]:
    """Every engine container of a container of ours."""
    listed: list[dict[str, Any]] = rig.engine.call("GET", "/containers/json?all=1")
    return [one for one in listed if one["Labels"].get("gpudock.name") == name]


async def held(caller: Caller) -> tuple[set[str], set[int]]:
    """The cards and the ports that are claimed for `victim`."""
    ports = (await caller.nodes.ListPorts(node_service_pb2.ListPortsRequest())).ports
    return (
        {uuid for uuid, name in (await caller.holders()).items() if name == "victim"},
        {one.host_port for one in ports if one.container == "victim"},
    )


async def half_replaced(store_daemon: EmbeddedStoreDaemon) -> container_pb2.Container:
    """Lose the store while `victim` has two engine containers, one of which runs; `victim` as it was before."""
    async with Caller(store_daemon.daemon.target) as caller:
        victim = await caller.create("victim", 1, ports=[PORT])
    await store_daemon.kill()
    await store_daemon.start(module="tests.faults.instrumented_daemon", environment={KIND: "SCALE", DIE_AT: CREATED})
    async with Caller(store_daemon.daemon.target) as caller:
        with pytest.raises(grpc.aio.AioRpcError):
            await caller.scale("victim", 2)
    assert await asyncio.to_thread(store_daemon.daemon.wait) == -9, store_daemon.daemon.log_text
    await store_daemon.wait_for_etcd_exit()
    store_daemon.delete_store()
    await store_daemon.start()
    return victim


async def test_what_is_reported_and_runs_keeps_its_cards_and_ports(store_daemon: EmbeddedStoreDaemon, rig: Rig) -> None:
    victim = await half_replaced(store_daemon)
    both = engine_containers(rig, "victim")
    assert sorted(one["State"] for one in both) == ["created", "running"]
    cards, ports = set(victim.status.gpu_uuids), {one.host_port for one in victim.status.ports}
    assert cards
    assert ports
    async with Caller(store_daemon.daemon.target) as caller:
        assert (await wait_for_drift(caller, "CONTAINER_UNKNOWN", REPORTED, "victim")).container_uid == victim.uid
        assert await held(caller) == (cards, ports)
        # No other container gets what it has, by count or by name.
        free = await caller.free_gpus()
        other = await caller.create("other", free, ports=[PORT])
        assert not cards & set(other.status.gpu_uuids)
        assert (await failure(caller.create("one-more", 1))).reason == "GPU_EXHAUSTED"
        pinned = container_pb2.PortRequest(container_port=80, host_port=min(ports))
        refused = await failure(caller.create("one-more", ports=[pinned]))
        assert refused.reason == "PORT_IN_USE"
        assert "victim" in refused.message
        # Its name is not given away either, and nothing is made of the attempt.
        for attempt in (caller.create("victim"), caller.clone("other", "victim")):
            refused = await failure(attempt)
            assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "CONTAINER_EXISTS"), refused
            assert "no record" in refused.message
            assert "gpudock drift" in refused.message
        assert {one["Id"] for one in engine_containers(rig, "victim")} == {one["Id"] for one in both}
        # Full comparisons release nothing while it runs, frozen or not.
        engine_action(rig, victim.status.engine_id, "pause")
        await wait_for_passes(caller)
        assert await held(caller) == (cards, ports)
        engine_action(rig, victim.status.engine_id, "unpause")
        # What has stopped holds nothing. Started again by somebody, it holds what nobody else has been given since.
        engine_action(rig, victim.status.engine_id, "stop?t=0")
        await _until_held(caller, (set(), set()))
        taker = await caller.create("taker", 1)
        assert set(taker.status.gpu_uuids) == cards
        engine_action(rig, victim.status.engine_id, "start")
        conflict = await wait_for_drift(caller, "CLAIM_CONFLICT", REPORTED, "victim")
        assert (conflict.claim, conflict.other_container) == (min(cards), "taker")
        await _until_held(caller, (set(), ports))
        await caller.delete("taker")
        await _until_held(caller, (cards, ports))
        # One of the two removed, the other has its record again, with what it holds.
        (created,) = (one for one in both if one["State"] == "created")
        rig.engine.call("DELETE", f"/containers/{created['Id']}?force=1")
        await wait_for_drift(caller, "RECORD_LOST", container="victim")
        assert set((await caller.get("victim")).status.gpu_uuids) == cards
        await wait_for_passes(caller)
        assert await held(caller) == (cards, ports)
        assert not await list_drift(caller)
        await caller.delete("victim")
        assert await held(caller) == (set(), set())


async def test_what_is_reported_and_removed_holds_nothing(store_daemon: EmbeddedStoreDaemon, rig: Rig) -> None:
    await half_replaced(store_daemon)
    async with Caller(store_daemon.daemon.target) as caller:
        assert (await held(caller))[0]
    # While no daemon is there: one that saw a single engine container left would write its record again.
    await store_daemon.kill()
    for one in engine_containers(rig, "victim"):
        rig.engine.call("DELETE", f"/containers/{one['Id']}?force=1")
    await store_daemon.start()
    async with Caller(store_daemon.daemon.target) as caller:
        assert await held(caller) == (set(), set())
        # What is left of it is its history, which has the name until it is deleted.
        await caller.delete("victim")
        await caller.create("victim", 1)


async def _until_held(caller: Caller, what: tuple[set[str], set[int]]) -> None:
    async def so() -> bool:
        return await held(caller) == what

    await until(so)
