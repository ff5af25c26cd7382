"""Containers that are started, renamed or updated with docker commands, outside gpudock."""

from __future__ import annotations

import asyncio

import pytest
from gpudock.v1 import container_pb2, operation_pb2, operation_service_pb2

from tests.calls import Caller
from tests.engine.drift import (
    KIND,
    RETRIED,
    docker_inspect,
    docker_update,
    engine_action,
    expect_drift,
    list_drift,
    wait_for_drift,
    wait_for_passes,
)
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, quick_caller, quick_daemon, until, until_state
from tests.rig import Rig
from tests.selection import deep_except

__all__ = ["daemons", "quick_caller", "quick_daemon"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
STOPPED = container_pb2.CONTAINER_STATE_STOPPED
MIB = 1 << 20


async def test_a_container_that_is_started_by_hand_claims_its_free_gpus_and_ports_again(
    caller: Caller, rig: Rig
) -> None:
    created = await caller.create("returns", 2, ports=[container_pb2.PortRequest(container_port=80)])
    stopped = await caller.stop("returns")
    assert not stopped.status.holds_resources
    await asyncio.to_thread(engine_action, rig, created.status.engine_id, "start")
    await until_state(caller, "returns", RUNNING)
    status = (await caller.get("returns")).status
    assert status.holds_resources
    assert (status.gpu_uuids, status.ports) == (created.status.gpu_uuids, created.status.ports)
    assert list((await caller.holders()).values()).count("returns") == 2
    assert (await wait_for_drift(caller, "CONTAINER_STARTED", container="returns")).claim == ""
    await caller.stop("returns")
    assert await caller.free_gpus() == 8


@pytest.mark.deep
async def test_a_container_that_is_started_by_hand_is_stopped_if_another_holds_its_gpu(
    caller: Caller, rig: Rig
) -> None:
    created = await caller.create("loses", 8)
    await caller.stop("loses")
    winner = await caller.create("winner", 1)
    await asyncio.to_thread(engine_action, rig, created.status.engine_id, "start")

    async def stopped() -> bool:
        return not docker_inspect(rig, created.status.engine_id)["State"]["Running"]

    await until(stopped)
    await until_state(caller, "loses", STOPPED)
    await caller.until_idle()
    status = (await caller.get("loses")).status
    gpu = winner.status.gpu_uuids[0]
    assert status.message == f"stopped by gpudock: started outside gpudock while {gpu} was held by winner"
    assert not status.holds_resources
    assert (await caller.holders())[gpu] == "winner"
    assert await caller.free_gpus() == 7
    finding = await wait_for_drift(caller, "CONTAINER_STARTED", container="loses")
    assert (finding.other_container, finding.claim) == ("winner", gpu)
    request = operation_service_pb2.GetOperationRequest(id=finding.operation_id)
    stop = (await caller.operations.GetOperation(request)).operation
    assert (stop.kind, stop.state) == (
        operation_pb2.OPERATION_KIND_STOP_CONTAINER,
        operation_pb2.OPERATION_STATE_SUCCEEDED,
    )
    # The container can be started again when GPUs are free.
    await caller.delete("winner")
    assert (await caller.start("loses")).status.message == ""
    assert await caller.free_gpus() == 0


@pytest.mark.deep
async def test_a_renamed_container_gets_its_name_back(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--reconcile-interval", "0.5")
    async with Caller(daemon.target) as caller:
        created = await caller.create("known")
        engine_id = created.status.engine_id
        name = docker_inspect(rig, engine_id)["Name"].removeprefix("/")

        async def name_is_restored() -> bool:
            return bool(docker_inspect(rig, engine_id)["Name"] == f"/{name}")

        rig.engine.call("POST", f"/containers/{engine_id}/rename", query={"name": "renamed"})
        await until(name_is_restored)
        # If another container has the name by then, that is reported, and the other container is not removed.
        daemon.process.pause()
        rig.engine.call("POST", f"/containers/{engine_id}/rename", query={"name": "renamed"})
        config = {"Image": created.spec.image, "Cmd": ["true"]}
        other_id = rig.engine.call("POST", "/containers/create", query={"name": name}, send=config)["Id"]
        daemon.process.resume()
        finding = await wait_for_drift(caller, "CONTAINER_RENAMED", RETRIED)
        assert (finding.expected, finding.actual) == (name, "renamed")
        await wait_for_passes(caller)
        assert not docker_inspect(rig, other_id)["State"]["Running"]
        rig.engine.call("DELETE", f"/containers/{other_id}")
        await until(name_is_restored)
        assert (await caller.scale("known", 1)).status.state == RUNNING


@pytest.mark.parametrize("policy_name", deep_except(["no"], ["always", "no"]))
async def test_a_restart_policy_that_docker_update_changed_is_restored(
    quick_caller: Caller, rig: Rig, policy_name: str
) -> None:
    """Of running and stopped containers: the engine would start either with GPUs that other containers hold by then."""
    always = container_pb2.RestartPolicy(policy=container_pb2.RESTART_POLICY_KIND_ALWAYS)
    name = f"kept-{policy_name}"
    running = await quick_caller.create(name, 1, restart_policy=always)
    stopped = await quick_caller.create(f"{name}-stopped", 1)
    await quick_caller.stop(f"{name}-stopped")
    other = "always" if policy_name == "always" else "on-failure"
    drift = expect_drift(quick_caller, "RESTART_POLICY_CHANGED", container=name)
    for container, policy in ((running, policy_name), (stopped, other)):
        docker_update(rig, container.status.engine_id, RestartPolicy={"Name": policy, "MaximumRetryCount": 0})

    async def policies_are_restored() -> bool:
        policies = [
            docker_inspect(rig, container.status.engine_id)["HostConfig"]["RestartPolicy"]["Name"]
            for container in (running, stopped)
        ]
        return policies == ["unless-stopped", "no"]

    await until(policies_are_restored)
    finding = await drift
    assert (finding.expected, finding.actual) == ("unless-stopped", policy_name)
    # A repaired policy is no longer listed two comparisons later.
    await wait_for_passes(quick_caller, 3)
    assert not await list_drift(quick_caller, kinds=[KIND("DRIFT_KIND_RESTART_POLICY_CHANGED")])
    assert (await quick_caller.get(name)).status.state == RUNNING


async def test_limits_that_docker_update_changed_are_restored(quick_caller: Caller, rig: Rig) -> None:
    limited = await quick_caller.create("limited", cpus=0.5, memory_bytes=64 * MIB)
    free = await quick_caller.create("free")

    def limits(container: container_pb2.Container) -> tuple[int, int]:
        host = docker_inspect(rig, container.status.engine_id)["HostConfig"]
        return host["NanoCpus"], host["Memory"]

    drift = expect_drift(quick_caller, "LIMITS_CHANGED")
    docker_update(rig, limited.status.engine_id, NanoCpus=100_000_000, Memory=32 * MIB, MemorySwap=32 * MIB)

    async def limits_are_restored() -> bool:
        return limits(limited) == (500_000_000, 64 * MIB)

    await until(limits_are_restored)
    finding = await drift
    assert (finding.container, finding.actual) == ("limited", f"cpus=0.1 memory_bytes={32 * MIB}")
    docker_update(rig, free.status.engine_id, NanoCpus=100_000_000)

    async def limit_is_raised() -> bool:
        return limits(free)[0] > 500_000_000

    await until(limit_is_raised)
    # The engine cannot remove the CPU limit of a container; a limit of all CPUs is no drift.
    await wait_for_passes(quick_caller, 3)
    assert not [one for one in [await quick_caller.get("free")] if one.status.state != RUNNING]
    scaled = await quick_caller.scale("limited", cpus=1.0)
    await wait_for_passes(quick_caller)
    assert limits(scaled) == (1_000_000_000, 64 * MIB)
