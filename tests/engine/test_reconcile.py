"""What happens to containers and claims behind the daemon's back: it is noticed, repaired where it is certain."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from gpudock.v1 import container_pb2
from gpudock_server.adapters.etcd import EtcdAddress, EtcdConnection, EtcdStore
from gpudock_server.model.claims import GpuKey, Holder
from gpudock_server.model.store_changes import Claim
from gpudock_server.settings.definitions import default_host_id

from tests.calls import IMAGE, Caller, failure
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until, until_state
from tests.rig import EngineProxy, Rig

__all__ = ["daemons"]

RUNNING = container_pb2.CONTAINER_STATE_RUNNING
PAUSED = container_pb2.CONTAINER_STATE_PAUSED
EXITED = container_pb2.CONTAINER_STATE_EXITED
FAILED = container_pb2.CONTAINER_STATE_FAILED

QUICK = ("--orphan-grace", "0", "--reconcile-interval", "1")


@pytest_asyncio.fixture
async def quick(daemons: IsolatedDaemons) -> AsyncIterator[Caller]:
    """Calls a daemon that reconciles every second and removes what nobody knows at once."""
    daemon = await daemons.start(*QUICK)
    async with Caller(daemon.target) as caller:
        yield caller
    assert daemon.running
    assert "Traceback" not in daemon.log_text, daemon.log_text


def act(rig: Rig, container: container_pb2.Container, verb: str) -> None:
    """Ask the engine itself."""
    rig.engine.call("POST", f"/containers/{container.status.engine_id}/{verb}")


async def test_a_container_that_is_stopped_started_killed_and_paused_by_hand(caller: Caller, rig: Rig) -> None:
    made = await caller.create("handled", 2)
    for verb, state in (
        ("stop?t=1", EXITED),
        ("start", RUNNING),
        ("pause", PAUSED),
        ("unpause", RUNNING),
        ("kill", EXITED),
        ("start", RUNNING),
        ("restart?t=1", RUNNING),
    ):
        await asyncio.to_thread(act, rig, made, verb)
        await until_state(caller, "handled", state)
        seen = await caller.get("handled")
        assert seen.status.gpu_uuids == made.status.gpu_uuids, f"after {verb} it holds what it held"
        assert seen.status.holds_resources
        assert seen.spec == made.spec
        if verb == "kill":
            assert seen.status.exit_code == 137
            assert seen.status.HasField("finish_time")
    assert await caller.shell("handled", "echo here") == "here\n"


async def test_a_container_that_ran_out_of_memory(caller: Caller, rig: Rig) -> None:
    hungry = ("sh", "-c", "exec tail -c 200000000 /dev/zero")
    for number in range(8):
        name = f"hungry-{number}"
        await caller.create(name, 1, command=hungry, memory_bytes=16 << 20)
        await until_state(caller, name, EXITED)
        status = (await caller.get(name)).status
        assert status.exit_code == 137
        assert status.holds_resources
        told = rig.engine.call("GET", f"/containers/{status.engine_id}/json")["State"]["OOMKilled"]
        assert status.oom_killed == told
        if told:
            return
        # With control groups v1 the engine hears of it beside the end of the process, on a busy host after it.
    raise AssertionError("the engine never noticed")


async def test_a_container_that_was_removed_by_hand(caller: Caller, rig: Rig) -> None:
    made = await caller.create("gone", 3, ports=[container_pb2.PortRequest(container_port=80)])
    rig.engine.call("DELETE", f"/containers/{made.status.engine_id}", query={"force": "1"})
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


async def test_what_happened_while_no_daemon_ran(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller:
        exits, vanishes, starts = [await caller.create(name, 1) for name in ("exits", "vanishes", "starts")]
        await caller.stop("starts")
    await asyncio.to_thread(daemon.stop)
    await asyncio.to_thread(act, rig, exits, "kill")
    await asyncio.to_thread(act, rig, starts, "start")
    rig.engine.call("DELETE", f"/containers/{vanishes.status.engine_id}", query={"force": "1"})
    daemon = await daemons.start(after=daemon)
    async with Caller(daemon.target) as caller:
        assert (await caller.get("exits")).status.state == EXITED
        assert (await caller.get("vanishes")).status.state == FAILED
        assert (await caller.get("starts")).status.state == RUNNING
        assert list((await caller.holders()).values()).count("exits") == 1
        assert "vanishes" not in (await caller.holders()).values()


def _names(rig: Rig) -> set[str]:
    listed = rig.engine.call("GET", "/containers/json?all=1")
    return {name.removeprefix("/") for one in listed for name in one["Names"]}


def _make(rig: Rig, name: str, labels: dict[str, str], image: str = IMAGE) -> None:
    config: dict[str, Any] = {"Image": image, "Cmd": ["sleep", "600"], "Labels": labels}
    made = rig.engine.call("POST", "/containers/create", query={"name": name}, send=config)
    rig.engine.call("POST", f"/containers/{made['Id']}/start")


async def test_what_nobody_knows_is_removed_and_what_is_not_ours_never(
    quick: Caller, daemons: IsolatedDaemons, rig: Rig
) -> None:
    known = await quick.create("known", 1)
    labels = {
        "gpudock.uid": "00000000-0000-4000-8000-000000000000",
        "gpudock.name": "lost",
        "gpudock.node": daemons.node,
        "gpudock.revision": "1",
        "gpudock.operation": "12345678-0000-4000-8000-000012345678",
    }
    _make(rig, "gpudock-lost-12345678", labels)
    _make(rig, "gpudock-elsewhere-12345678", {**labels, "gpudock.name": "elsewhere", "gpudock.node": "another"})
    _make(rig, "foreign", {})
    # It has the labels of the container that it was made from.
    made = rig.engine.call(
        "POST", "/commit", query={"container": known.status.engine_id, "repo": "theirs", "tag": "test"}
    )
    _make(rig, "theirs", {}, image=made["Id"])

    async def removed() -> bool:
        return "gpudock-lost-12345678" not in _names(rig)

    await until(removed)
    await quick.create("later")
    kept = {"gpudock-elsewhere-12345678", "foreign", "theirs"}
    engine_name = rig.engine.call("GET", f"/containers/{known.status.engine_id}/json")["Name"].removeprefix("/")
    assert kept | {engine_name} <= _names(rig)
    await quick.delete("known")
    await until_gone(rig, engine_name)
    assert kept <= _names(rig), "what was made from it is not it"
    rig.engine.remove_all()
    rig.engine.call("DELETE", "/images/theirs:test")


async def until_gone(rig: Rig, name: str) -> None:
    """Wait until the engine has no container of a name."""

    async def gone() -> bool:
        return name not in _names(rig)

    await until(gone)


async def test_what_nobody_knows_is_left_for_the_grace(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--orphan-grace", "600", "--reconcile-interval", "0.1")
    labels = {"gpudock.uid": "u", "gpudock.name": "x", "gpudock.node": daemons.node, "gpudock.operation": "12345678"}
    _make(rig, "gpudock-x-12345678", labels)
    async with Caller(daemon.target) as caller:
        # An ownerless claim is released by the same passes: they have been.
        await _claim(daemons, rig, 0)

        async def free() -> bool:
            return await caller.free_gpus() == 8

        await until(free)
    assert "gpudock-x-12345678" in _names(rig)


async def _claim(daemons: IsolatedDaemons, rig: Rig, card: int, uid: str = "nobody") -> None:
    connection = EtcdConnection(EtcdAddress((rig.etcd.endpoint,)))
    await connection.open()
    store = EtcdStore(connection, prefix=daemons.prefix)
    holder = Holder(container="ghost", uid=uid, node=daemons.node)
    await store.apply([Claim(default_host_id(), GpuKey(rig.gpus.uuids[card]), holder)])
    await connection.close()


async def test_a_claim_whose_holder_is_gone_is_released(quick: Caller, daemons: IsolatedDaemons, rig: Rig) -> None:
    await quick.create("holds", 7)
    await _claim(daemons, rig, 7)
    assert "ghost" in (await quick.holders()).values()

    async def released() -> bool:
        return "ghost" not in (await quick.holders()).values()

    await until(released)
    assert list((await quick.holders()).values()).count("holds") == 7


@pytest.mark.deep
async def test_an_engine_that_does_not_answer_changes_nothing(
    daemons: IsolatedDaemons, engine_proxy: EngineProxy
) -> None:
    # A busy machine may need a second for a start that nothing hinders.
    daemon = await daemons.start(*QUICK, "--engine-timeout", "2.5", docker_host=engine_proxy.url)
    async with Caller(daemon.target) as caller:
        before = await caller.create("steady", 2, ports=[container_pb2.PortRequest(container_port=80)])
        faults = engine_proxy.faults
        for harm in (faults.hang, faults.drop, faults.fail):
            passes = daemon.log_text.count("reconcile pass aborted")
            harm(".*", "/containers/.*|/events", times=None)

            async def tried(passes: int = passes) -> bool:
                return daemon.log_text.count("reconcile pass aborted") > passes

            await until(tried)
            assert await caller.get("steady") == before
            assert await caller.free_gpus() == 6
            faults.clear()
        assert await caller.get("steady") == before
        assert (await caller.scale("steady", 3)).status.state == RUNNING
