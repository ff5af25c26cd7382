"""Limits of a container: processes, memory, capabilities."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from gpudock.v1 import container_pb2

from tests.calls import Caller, failure, progress_of, update_request
from tests.engine.drift import docker_inspect, docker_update, expect_drift, list_drift, wait_for_passes
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until
from tests.rig import GLIBC, Rig

__all__ = ["daemons"]

MIB = 1 << 20
# Starts a number of child processes; the shell reports on stderr those that it cannot start.
START_CHILDREN = "n=0; while [ $n -lt {0} ]; do sleep 30 & n=$((n+1)); done; echo started"


def host_config(rig: Rig, container: container_pb2.Container) -> dict[str, object]:
    """The host config of the engine container of a container."""
    config: dict[str, object] = docker_inspect(rig, container.status.engine_id)["HostConfig"]
    return config


async def test_a_container_without_limits_has_the_defaults_of_the_node(caller: Caller, rig: Rig) -> None:
    container = await caller.create("plain", image=GLIBC)
    host = host_config(rig, container)
    assert (host["PidsLimit"], host["CapDrop"]) == (4096, ["MKNOD", "NET_RAW"])
    assert not host["SecurityOpt"]
    assert container.spec.pids_limit == 0
    # With a raw socket a container could answer ARP requests for the address of another one.
    script = "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"
    result = await caller.run("plain", "python3", "-c", script)
    assert result.code == 1
    assert b"PermissionError" in result.stderr


@pytest.mark.deep
async def test_a_fork_bomb_stays_in_its_container(caller: Caller, rig: Rig) -> None:
    limited = await caller.create("bomb", pids_limit=32)
    await caller.create("neighbour")
    result = await caller.run("bomb", "sh", "-c", START_CHILDREN.format(500))
    assert b"can't fork" in result.stderr
    processes = rig.engine.call("GET", f"/containers/{limited.status.engine_id}/top")["Processes"]
    assert 16 <= len(processes) <= 32
    assert await caller.shell("neighbour", START_CHILDREN.format(64)) == "started\n"


async def test_the_process_limit_changes_in_place_and_is_kept_by_a_scale(caller: Caller, rig: Rig) -> None:
    first = await caller.create("grows", 1, pids_limit=32)
    after = await caller.update("grows", pids_limit=64)
    assert (after.spec.pids_limit, after.status.engine_id) == (64, first.status.engine_id)
    assert host_config(rig, after)["PidsLimit"] == 64
    assert (after.revision, after.status.start_time) == (2, first.status.start_time)
    plan = await progress_of(
        caller.containers.UpdateContainer(update_request("grows", "pids_limit", validate_only=True))
    )
    assert not plan.snapshots[-1].plan.restarts_process
    assert host_config(rig, await caller.scale("grows", 2))["PidsLimit"] == 64
    default = await caller.update("grows", "pids_limit")
    assert (default.spec.pids_limit, host_config(rig, default)["PidsLimit"]) == (0, 4096)


async def test_limits_above_the_maximum_of_the_node_are_refused(daemons: IsolatedDaemons, rig: Rig) -> None:
    before = await daemons.start("--max-pids-limit", "0", "--default-pids-limit", "0", "--drop-net-raw", "false")
    async with Caller(before.target) as caller:
        limited = await caller.create("limited", memory_bytes=256 * MIB, pids_limit=512)
        unlimited = await caller.create("unlimited")
        host = host_config(rig, unlimited)
        assert (host["PidsLimit"], host["CapDrop"]) == (None, ["MKNOD"])
    await asyncio.to_thread(before.stop)
    flags = ("--max-memory", "128MiB", "--max-pids-limit", "256", "--default-pids-limit", "128")
    daemon = await daemons.start(*flags, "--no-new-privileges", "true", "--reconcile-interval", "0.5", after=before)
    async with Caller(daemon.target) as caller:
        for name, value, maximum in (("memory_bytes", 129 * MIB, 128 * MIB), ("pids_limit", 257, 256)):
            refused = await failure(caller.create("greedy", **{name: value}))
            assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "LIMIT_FORBIDDEN")
            assert (refused.metadata["field"], refused.metadata["maximum"]) == (name, str(maximum))
            assert (await failure(caller.update("unlimited", mask="", **{name: value}))).reason == "LIMIT_FORBIDDEN"
        assert (await failure(caller.scale("unlimited", memory_bytes=1 << 30))).reason == "LIMIT_FORBIDDEN"
        created = host_config(rig, await caller.create("default"))
        assert (created["Memory"], created["PidsLimit"], created["SecurityOpt"]) == (
            128 * MIB,
            128,
            ["no-new-privileges"],
        )
        # Containers that were created with other settings are no drift, keep their limits, and accept other changes.
        await wait_for_passes(caller, 3)
        assert not await list_drift(caller)
        assert host_config(rig, unlimited)["PidsLimit"] is None
        changed = await caller.scale("limited", cpus=0.5)
        assert changed.status.engine_id == limited.status.engine_id
        assert (host_config(rig, changed)["Memory"], host_config(rig, changed)["PidsLimit"]) == (256 * MIB, 512)
        assert host_config(rig, await caller.scale("unlimited", cpus=0.5))["PidsLimit"] is None
        # A new engine container has the current defaults.
        replaced = host_config(rig, await caller.scale("unlimited", shm_size_bytes=MIB))
        assert (replaced["Memory"], replaced["PidsLimit"]) == (128 * MIB, 128)
        # Limits that docker update changed become those of the spec again.
        expected = expect_drift(caller, "LIMITS_CHANGED")
        docker_update(rig, changed.status.engine_id, PidsLimit=1000)

        async def is_restored() -> bool:
            return host_config(rig, changed)["PidsLimit"] == 512

        await until(is_restored)
        drift = await expected
        assert (drift.container, drift.actual) == ("limited", f"cpus=0.5 memory_bytes={256 * MIB} pids_limit=1000")
        await caller.delete_all()
