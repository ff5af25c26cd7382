"""Changes of containers and claims outside gpudock are noticed, and repaired where the repair is certain."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from gpudock.v1 import container_pb2
from gpudock_server.model.claims import GpuKey, Holder
from gpudock_server.model.store_changes import Claim
from gpudock_server.settings.definitions import default_host_id

from tests.calls import IMAGE, Caller, failure
from tests.engine.drift import (
    docker_inspect,
    engine_action,
    engine_container_names,
    state_of,
    wait_for_drift_log,
    wait_for_passes,
)
from tests.engine.isolated_daemons import (
    FREQUENT_RECONCILE,
    IsolatedDaemons,
    daemons,
    quick_caller,
    quick_daemon,
    until,
    until_state,
)
from tests.rig import Daemon, EngineProxy, Rig
from tests.rig.patience import in_time

__all__ = ["daemons", "quick_caller", "quick_daemon"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
PAUSED = container_pb2.CONTAINER_STATE_PAUSED
EXITED = container_pb2.CONTAINER_STATE_EXITED
FAILED = container_pb2.CONTAINER_STATE_FAILED


async def test_the_state_follows_docker_commands_and_the_claims_stay(caller: Caller, rig: Rig) -> None:
    created = await caller.create("handled", 2)
    for verb, state in (
        ("stop?t=1", EXITED),
        ("start", RUNNING),
        ("pause", PAUSED),
        ("unpause", RUNNING),
        ("kill", EXITED),
        ("start", RUNNING),
        ("restart?t=1", RUNNING),
    ):
        await asyncio.to_thread(engine_action, rig, created.status.engine_id, verb)
        await until_state(caller, "handled", state)
        current = await caller.get("handled")
        assert current.status.gpu_uuids == created.status.gpu_uuids, f"the claims changed after {verb}"
        assert current.status.holds_resources
        assert current.spec == created.spec
        if verb == "kill":
            assert current.status.exit_code == 137
            assert current.status.HasField("finish_time")
    assert await caller.shell("handled", "echo here") == "here\n"


async def test_a_container_that_exceeds_its_memory_is_exited_and_oom_killed(caller: Caller, rig: Rig) -> None:
    command = ("sh", "-c", "exec tail -c 200000000 /dev/zero")
    async with in_time("the engine reported no memory kill"):
        for number in itertools.count():
            name = f"hungry-{number}"
            await caller.create(name, 1, command=command, memory_bytes=16 << 20)
            await until_state(caller, name, EXITED)
            status = (await caller.get(name)).status
            assert status.exit_code == 137
            assert status.holds_resources
            oom_killed = docker_inspect(rig, status.engine_id)["State"]["OOMKilled"]
            assert status.oom_killed == oom_killed
            if oom_killed:
                return
            # With control groups v1 the engine can get the event of the kill after that of the exit, and ignores it.
            await caller.delete(name)


async def test_a_container_whose_engine_container_was_removed_is_failed_and_holds_nothing(
    caller: Caller, rig: Rig
) -> None:
    created = await caller.create("gone", 3, ports=[container_pb2.PortRequest(container_port=80)])
    rig.engine.call("DELETE", f"/containers/{created.status.engine_id}", query={"force": "1"})
    await until_state(caller, "gone", FAILED)
    status = (await caller.get("gone")).status
    assert "outside gpudock" in status.message
    assert not status.holds_resources
    assert not status.gpu_uuids
    assert not status.ports
    assert await caller.free_gpus() == 8
    assert (await failure(caller.start("gone"))).reason == "CONTAINER_GONE"
    assert (await failure(caller.scale("gone", 1))).reason == "CONTAINER_GONE"
    await caller.delete("gone", force=False)
    assert (await caller.create("gone", 3)).status.state == RUNNING


async def test_changes_while_no_daemon_runs_are_noticed_at_its_start(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller:
        exits, vanishes, starts = [await caller.create(name, 1) for name in ("exits", "vanishes", "starts")]
        await caller.stop("starts")
    await asyncio.to_thread(daemon.stop)
    await asyncio.to_thread(engine_action, rig, exits.status.engine_id, "kill")
    await asyncio.to_thread(engine_action, rig, starts.status.engine_id, "start")
    rig.engine.call("DELETE", f"/containers/{vanishes.status.engine_id}", query={"force": "1"})
    daemon = await daemons.start(after=daemon)
    async with Caller(daemon.target) as caller:
        assert (await caller.get("exits")).status.state == EXITED
        assert (await caller.get("vanishes")).status.state == FAILED
        assert (await caller.get("starts")).status.state == RUNNING
        assert list((await caller.holders()).values()).count("exits") == 1
        assert "vanishes" not in (await caller.holders()).values()


def _create_and_start(rig: Rig, name: str, labels: dict[str, str], image: str = IMAGE) -> None:
    config: dict[str, Any] = {"Image": image, "Cmd": ["sleep", "600"], "Labels": labels}
    created = rig.engine.call("POST", "/containers/create", query={"name": name}, send=config)
    rig.engine.call("POST", f"/containers/{created['Id']}/start")


async def test_unknown_containers_of_this_node_are_removed_and_all_others_kept(
    quick_caller: Caller, daemons: IsolatedDaemons, rig: Rig
) -> None:
    owner_container = await quick_caller.create("known", 1)
    labels = {
        "gpudock.uid": "00000000-0000-4000-8000-000000000000",
        "gpudock.name": "lost",
        "gpudock.node": daemons.node,
        "gpudock.revision": "1",
        "gpudock.operation": "12345678-0000-4000-8000-000012345678",
    }
    _create_and_start(rig, "gpudock-lost-12345678", labels)
    _create_and_start(
        rig, "gpudock-elsewhere-12345678", {**labels, "gpudock.name": "elsewhere", "gpudock.node": "another"}
    )
    _create_and_start(rig, "foreign", {})
    # This image has the labels of the container that was committed.
    created = rig.engine.call(
        "POST", "/commit", query={"container": owner_container.status.engine_id, "repo": "theirs", "tag": "test"}
    )
    _create_and_start(rig, "theirs", {}, image=created["Id"])

    async def removed() -> bool:
        return "gpudock-lost-12345678" not in engine_container_names(rig)

    await until(removed)
    await quick_caller.create("later")
    kept = {"gpudock-elsewhere-12345678", "foreign", "theirs"}
    engine_name = rig.engine.call("GET", f"/containers/{owner_container.status.engine_id}/json")["Name"].removeprefix(
        "/"
    )
    assert kept | {engine_name} <= engine_container_names(rig)
    await quick_caller.delete("known")

    async def deleted() -> bool:
        return engine_name not in engine_container_names(rig)

    await until(deleted)
    assert kept <= engine_container_names(rig), (
        "a container of an image that was committed from the deleted one was removed"
    )
    rig.engine.remove_all()
    rig.engine.call("DELETE", "/images/theirs:test")


async def test_an_unknown_container_is_kept_during_the_orphan_grace(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--orphan-grace", "600", "--reconcile-interval", "0.1")
    labels = {"gpudock.uid": "u", "gpudock.name": "x", "gpudock.node": daemons.node, "gpudock.operation": "12345678"}
    _create_and_start(rig, "gpudock-x-12345678", labels)
    async with Caller(daemon.target) as caller:
        await wait_for_passes(caller)
    assert "gpudock-x-12345678" in engine_container_names(rig)


async def test_a_claim_whose_holder_is_gone_is_released(
    quick_daemon: Daemon, quick_caller: Caller, daemons: IsolatedDaemons, rig: Rig
) -> None:
    await quick_caller.create("holds", 7)
    holder = Holder(container="unknown", uid="unknown-uid", node=daemons.node)
    async with state_of(daemons, rig) as state:
        await state.store.apply([Claim(default_host_id(), GpuKey(rig.gpus.uuids[7]), holder)])
    await wait_for_drift_log(quick_daemon, "CLAIM_STALE", "unknown")
    holders = list((await quick_caller.holders()).values())
    assert "unknown" not in holders
    assert holders.count("holds") == 7


@pytest.mark.deep
async def test_an_engine_that_does_not_answer_changes_nothing(
    daemons: IsolatedDaemons, engine_proxy: EngineProxy
) -> None:
    # On a busy machine a start can take a second without any fault.
    daemon = await daemons.start(*FREQUENT_RECONCILE, "--engine-timeout", "2.5", docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        before = await caller.create("steady", 2, ports=[container_pb2.PortRequest(container_port=80)])
        faults = engine_proxy.faults
        for fault in (faults.hang, faults.drop, faults.fail):
            aborted_passes = daemon.log_text.count("reconcile pass aborted")
            fault(".*", "/containers/.*|/events", times=None)

            async def pass_is_aborted(aborted_passes: int = aborted_passes) -> bool:
                return daemon.log_text.count("reconcile pass aborted") > aborted_passes

            await until(pass_is_aborted)
            assert await caller.get("steady") == before
            assert await caller.free_gpus() == 6
            faults.clear()
        assert await caller.get("steady") == before
        assert (await caller.scale("steady", 3)).status.state == RUNNING
