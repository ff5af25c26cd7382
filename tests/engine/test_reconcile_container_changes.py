"""Containers that are started, renamed and given other limits behind the daemon's back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from gpudock.v1 import container_pb2, operation_pb2, operation_service_pb2

from tests.calls import Caller
from tests.engine.drift import (
    KIND,
    RETRIED,
    docker_inspect,
    docker_update,
    engine_action,
    list_drift,
    wait_for_drift,
    wait_for_passes,
)
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until, until_state
from tests.rig import Rig
from tests.selection import deep_except

__all__ = ["daemons"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
STOPPED = container_pb2.CONTAINER_STATE_STOPPED
MIB = 1 << 20


@pytest_asyncio.fixture
async def quick(daemons: IsolatedDaemons) -> AsyncIterator[Caller]:
    """Calls a daemon that compares everything every half second."""
    daemon = await daemons.start("--orphan-grace", "0", "--reconcile-interval", "0.5")
    async with Caller(daemon.target) as caller:
        yield caller
    assert daemon.running
    assert "Traceback" not in daemon.log_text, daemon.log_text


async def test_started_by_hand_while_what_it_had_is_free(caller: Caller, rig: Rig) -> None:
    made = await caller.create("returns", 2, ports=[container_pb2.PortRequest(container_port=80)])
    stopped = await caller.stop("returns")
    assert not stopped.status.holds_resources
    await asyncio.to_thread(engine_action, rig, made.status.engine_id, "start")
    await until_state(caller, "returns", RUNNING)
    status = (await caller.get("returns")).status
    assert status.holds_resources
    assert (status.gpu_uuids, status.ports) == (made.status.gpu_uuids, made.status.ports)
    assert list((await caller.holders()).values()).count("returns") == 2
    assert (await wait_for_drift(caller, "CONTAINER_STARTED", container="returns")).claim == ""
    await caller.stop("returns")
    assert await caller.free_gpus() == 8


@pytest.mark.deep
async def test_started_by_hand_while_another_has_what_it_had(caller: Caller, rig: Rig) -> None:
    made = await caller.create("loses", 8)
    await caller.stop("loses")
    winner = await caller.create("winner", 1)
    await asyncio.to_thread(engine_action, rig, made.status.engine_id, "start")

    async def stopped() -> bool:
        return not docker_inspect(rig, made.status.engine_id)["State"]["Running"]

    await until(stopped)
    await until_state(caller, "loses", STOPPED)
    await caller.until_idle()
    status = (await caller.get("loses")).status
    taken = winner.status.gpu_uuids[0]
    assert status.message == f"stopped by gpudock: started outside gpudock while {taken} was held by winner"
    assert not status.holds_resources
    assert (await caller.holders())[taken] == "winner"
    assert await caller.free_gpus() == 7
    finding = await wait_for_drift(caller, "CONTAINER_STARTED", container="loses")
    assert (finding.other_container, finding.claim) == ("winner", taken)
    asked = operation_service_pb2.GetOperationRequest(id=finding.operation_id)
    stop = (await caller.operations.GetOperation(asked)).operation
    assert (stop.kind, stop.state) == (
        operation_pb2.OPERATION_KIND_STOP_CONTAINER,
        operation_pb2.OPERATION_STATE_SUCCEEDED,
    )
    # It stays so, and can be started as ever once there is room.
    await caller.delete("winner")
    assert (await caller.start("loses")).status.message == ""
    assert await caller.free_gpus() == 0


@pytest.mark.deep
async def test_renamed(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--reconcile-interval", "0.5")
    async with Caller(daemon.target) as caller:
        made = await caller.create("known")
        engine_id = made.status.engine_id
        name = docker_inspect(rig, engine_id)["Name"].removeprefix("/")

        async def back() -> bool:
            return bool(docker_inspect(rig, engine_id)["Name"] == f"/{name}")

        rig.engine.call("POST", f"/containers/{engine_id}/rename", query={"name": "renamed"})
        await until(back)
        # Where something else has the name by then, that is told, and nothing is removed for it.
        daemon.process.pause()
        rig.engine.call("POST", f"/containers/{engine_id}/rename", query={"name": "renamed"})
        config = {"Image": made.spec.image, "Cmd": ["true"]}
        squatter = rig.engine.call("POST", "/containers/create", query={"name": name}, send=config)["Id"]
        daemon.process.resume()
        finding = await wait_for_drift(caller, "CONTAINER_RENAMED", RETRIED)
        assert (finding.expected, finding.actual) == (name, "renamed")
        await wait_for_passes(caller)
        assert not docker_inspect(rig, squatter)["State"]["Running"]
        rig.engine.call("DELETE", f"/containers/{squatter}")
        await until(back)
        assert (await caller.scale("known", 1)).status.state == RUNNING


@pytest.mark.parametrize("to", deep_except(["no"], ["always", "no"]))
async def test_a_restart_policy_that_docker_update_changed(quick: Caller, rig: Rig, to: str) -> None:
    """Of one that runs, and of one that does not: the engine would bring back either with cards that others have."""
    kept = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ALWAYS)
    name = f"kept-{to}"
    runs = await quick.create(name, 1, restart_policy=kept)
    stops = await quick.create(f"{name}-stopped", 1)
    await quick.stop(f"{name}-stopped")
    other = "always" if to == "always" else "on-failure"
    for container, policy in ((runs, to), (stops, other)):
        docker_update(rig, container.status.engine_id, RestartPolicy={"Name": policy, "MaximumRetryCount": 0})

    async def set_back() -> bool:
        policies = [
            docker_inspect(rig, container.status.engine_id)["HostConfig"]["RestartPolicy"]["Name"]
            for container in (runs, stops)
        ]
        return policies == ["unless-stopped", "no"]

    await until(set_back)
    finding = await wait_for_drift(quick, "RESTART_POLICY_CHANGED", container=name)
    assert (finding.expected, finding.actual) == ("unless-stopped", to)
    # What was put right is no drift at the comparison after the next.
    await wait_for_passes(quick, 3)
    assert not await list_drift(quick, kinds=[KIND("DRIFT_KIND_RESTART_POLICY_CHANGED")])
    assert (await quick.get(name)).status.state == RUNNING


async def test_limits_that_docker_update_changed(quick: Caller, rig: Rig) -> None:
    limited = await quick.create("limited", cpus=0.5, memory_bytes=64 * MIB)
    free = await quick.create("free")

    def limits(container: container_pb2.Container) -> tuple[int, int]:
        host = docker_inspect(rig, container.status.engine_id)["HostConfig"]
        return host["NanoCpus"], host["Memory"]

    docker_update(rig, limited.status.engine_id, NanoCpus=100_000_000, Memory=32 * MIB, MemorySwap=32 * MIB)

    async def set_back() -> bool:
        return limits(limited) == (500_000_000, 64 * MIB)

    await until(set_back)
    finding = await wait_for_drift(quick, "LIMITS_CHANGED")
    assert (finding.container, finding.actual) == ("limited", f"cpus=0.1 memory_bytes={32 * MIB}")
    docker_update(rig, free.status.engine_id, NanoCpus=100_000_000)

    async def as_much_as_there_is() -> bool:
        return limits(free)[0] > 500_000_000

    await until(as_much_as_there_is)
    # What a container cannot be freed of is no drift.
    await wait_for_passes(quick, 3)
    assert not [one for one in [await quick.get("free")] if one.status.state != RUNNING]
    scaled = await quick.scale("limited", cpus=1.0)
    await wait_for_passes(quick)
    assert limits(scaled) == (1_000_000_000, 64 * MIB)
