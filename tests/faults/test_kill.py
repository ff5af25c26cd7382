"""`kill -9` of the daemon at every moment of an operation: the next one leaves no doubt, no orphan and no lost file."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from gpudock.v1 import container_pb2, container_service_pb2, operation_pb2, operation_service_pb2

from tests.calls import IMAGE, Caller
from tests.conftest import FAST, own_state
from tests.faults.invariants import (
    LOOK,
    PLANT,
    absent,
    bound_host_paths,
    engine_containers,
    layer_images,
    sound,
)
from tests.faults.mortal import DIE_AT, KIND
from tests.rig import GLIBC, Daemon, Rig

# More moments than any operation has: a saga that never ends must fail the test and not hang it.
_MOST_MOMENTS = 200
_PORT = container_pb2.PortRequest(container_port=80)

Act = Callable[[Caller], Awaitable[object]]
Check = Callable[[Caller], Awaitable[None]]


async def at_every_moment(rig: Rig, kind: str, act: Act, check: Check, *flags: str) -> int:
    """Kill the daemon at the first moment of `act`, then at the second …, until it survives; how many there were."""
    flags = (*flags, *own_state())
    daemon = await _start(rig, None, kind, 1, *flags)
    try:
        for die_at in range(1, _MOST_MOMENTS):
            async with Caller(daemon.target) as caller:
                survived = await _survives(daemon, act(caller))
            # The successor is armed for the next moment, and must first put right what this one left.
            daemon = await _start(rig, daemon, kind, die_at + 1, *flags)
            async with Caller(daemon.target) as caller:
                await caller.settled()
                await check(caller)
            if survived:
                return die_at - 1
        raise AssertionError("the operation never ends")
    finally:
        await asyncio.to_thread(daemon.stop)


async def _start(rig: Rig, before: Daemon | None, kind: str, die_at: int, *flags: str) -> Daemon:
    if before is not None and before.running:
        await asyncio.to_thread(before.stop)
    return await rig.start_daemon(
        *FAST,
        *flags,
        module="tests.faults.mortal",
        environment={KIND: kind, DIE_AT: str(die_at)},
        state_dir=before.state_dir if before else None,
        socket=before.socket if before else None,
    )


async def _survives(daemon: Daemon, act: Awaitable[object]) -> bool:
    try:
        await act
    except grpc.aio.AioRpcError as error:
        assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017 (any other code is the failure)
        assert await asyncio.to_thread(daemon.wait) == -9, daemon.log_text
        return False
    return True


@pytest.mark.timeout(600)
async def test_create(clean_engine: Rig, tmp_path: Path) -> None:
    rig = clean_engine
    left = bound_host_paths(rig)  # by daemons of other tests
    mount = container_pb2.Mount(host_path=str(tmp_path), target="/host")

    async def create(caller: Caller) -> None:
        await caller.create("phoenix", 2, ports=[_PORT], mounts=[mount])

    async def check(caller: Caller) -> None:
        try:
            await caller.get("phoenix")
        except grpc.aio.AioRpcError:
            await absent(caller, rig, "phoenix")
            assert await caller.free_gpus() == 8
            assert bound_host_paths(rig) == left
            return
        await sound(caller, rig, "phoenix")
        assert len(bound_host_paths(rig)) == len(left) + 1
        await caller.delete("phoenix")
        assert bound_host_paths(rig) == left

    assert await at_every_moment(rig, "CREATE", create, check, "--allowed-host-paths", str(tmp_path)) >= 7


@pytest.mark.timeout(600)
@pytest.mark.parametrize("carry", ["exchange", "copy", "commit"])
async def test_scale(clean_engine: Rig, tmp_path: Path, carry: str) -> None:
    rig = clean_engine
    files, left = "", bound_host_paths(rig)
    mounts = [container_pb2.Mount(host_path=str(tmp_path), target="/host")] if carry == "exchange" else []

    async def scale(caller: Caller) -> None:
        nonlocal files
        if not files:
            await caller.create("phoenix", 2, ports=[_PORT], mounts=mounts)
            await caller.shell("phoenix", PLANT)
            files = await caller.shell("phoenix", LOOK + " || true")
        now = (await caller.get("phoenix")).spec.gpus.count
        await caller.scale("phoenix", 3 if now == 2 else 2)

    async def check(caller: Caller) -> None:
        await sound(caller, rig, "phoenix", files)
        assert len(bound_host_paths(rig)) == len(left) + len(mounts)

    flags = ("--layer-carry", carry, "--allowed-host-paths", str(tmp_path))
    assert await at_every_moment(rig, "SCALE", scale, check, *flags) >= 10


@pytest.mark.timeout(600)
async def test_rollback(clean_engine: Rig) -> None:
    """Back and forth between two revisions whose files differ; older ones are pruned meanwhile."""
    rig = clean_engine
    files: dict[int, str] = {}

    async def rollback(caller: Caller) -> None:
        if not files:
            await caller.create("phoenix", 2, ports=[_PORT])
            await caller.shell("phoenix", PLANT)
            files[2] = await caller.shell("phoenix", LOOK + " || true")
            await caller.scale("phoenix", 3)
            await caller.shell("phoenix", "echo other > /work/file; rm /work/deep/data; touch /work/deep/data")
            files[3] = await caller.shell("phoenix", LOOK + " || true")
        now = (await caller.get("phoenix")).spec.gpus.count
        other = [one for one in await caller.revisions("phoenix") if one.spec.gpus.count != now]
        await caller.rollback("phoenix", max(one.revision for one in other if one.HasField("snapshot")))

    async def check(caller: Caller) -> None:
        count = (await caller.get("phoenix")).spec.gpus.count
        await sound(caller, rig, "phoenix", files[count])
        history = await caller.revisions("phoenix")
        assert len(history) <= 4
        assert all(one.HasField("snapshot") != one.current for one in history)

    assert await at_every_moment(rig, "ROLLBACK", rollback, check, "--keep-revisions", "4") >= 13


@pytest.mark.timeout(600)
@pytest.mark.parametrize("carry", ["copy", "commit"])
async def test_clone(clean_engine: Rig, carry: str) -> None:
    """Of what a running source has now; it is frozen meanwhile, and must never stay so."""
    rig = clean_engine
    others = layer_images(rig)
    files = ""

    async def clone(caller: Caller) -> None:
        nonlocal files
        if not files:
            await caller.create("source", 2, ports=[_PORT])
            await caller.shell("source", PLANT)
            files = await caller.shell("source", LOOK + " || true")
        await caller.clone("source", "phoenix")

    async def check(caller: Caller) -> None:
        await sound(caller, rig, "source", files)
        try:
            await caller.get("phoenix")
        except grpc.aio.AioRpcError:
            await absent(caller, rig, "phoenix")
            assert await caller.free_gpus() == 6
        else:
            await sound(caller, rig, "phoenix", files)
            await caller.delete("phoenix")
        assert layer_images(rig) == others

    assert await at_every_moment(rig, "CLONE", clone, check, "--layer-carry", carry) >= 8


@pytest.mark.timeout(600)
@pytest.mark.parametrize("carry", ["copy", "commit"])
async def test_clone_of_a_revision(clean_engine: Rig, carry: str) -> None:
    """Of what was kept as a tree, and as an image, which each gives a name of its own."""
    rig = clean_engine
    others = layer_images(rig)
    files = ""

    async def clone(caller: Caller) -> None:
        nonlocal files
        if not files:
            await caller.create("source", 1, ports=[_PORT])
            await caller.shell("source", PLANT)
            files = await caller.shell("source", LOOK + " || true")
            await caller.scale("source", 2)
            await caller.shell("source", "rm -r /work")
        await caller.clone("source", "phoenix", revision=1)

    async def check(caller: Caller) -> None:
        assert (await caller.get("source")).revision == 2
        await sound(caller, rig, "source")
        try:
            await caller.get("phoenix")
        except grpc.aio.AioRpcError:
            await absent(caller, rig, "phoenix")
            assert await caller.free_gpus() == 6
        else:
            await sound(caller, rig, "phoenix", files)
            await caller.delete("phoenix")
        assert len(layer_images(rig) - others) == (1 if carry == "commit" else 0)

    assert await at_every_moment(rig, "CLONE", clone, check, "--layer-carry", carry) >= 5


@pytest.mark.timeout(600)
@pytest.mark.parametrize("field", ["env", "labels", "image"])
async def test_update(clean_engine: Rig, field: str) -> None:
    """By a successor, in place, where it is frozen for a moment, and on another image."""
    rig = clean_engine
    files = ""
    values: dict[str, tuple[Any, Any]] = {
        "env": ({}, {"a": "b"}),
        "labels": ({}, {"a": "b"}),
        "image": (IMAGE, GLIBC),
    }

    async def update(caller: Caller) -> None:
        nonlocal files
        if not files:
            await caller.create("phoenix", 1, ports=[_PORT])
            await caller.shell("phoenix", PLANT)
            files = await caller.shell("phoenix", LOOK + " || true")
        now = getattr((await caller.get("phoenix")).spec, field)
        one, other = values[field]
        value = other if now == one else one
        await caller.update("phoenix", field, **{field: value}, files=container_service_pb2.FILES_POLICY_CARRY_COMMIT)

    async def check(caller: Caller) -> None:
        await sound(caller, rig, "phoenix", files)

    assert await at_every_moment(rig, "UPDATE", update, check) >= 8


@pytest.mark.timeout(600)
async def test_stop_of_what_is_frozen(clean_engine: Rig) -> None:
    """It is thawed first, and by the next daemon perhaps when it has ended already."""
    rig = clean_engine
    frozen, stopped = container_pb2.CONTAINER_STATE_PAUSED, container_pb2.CONTAINER_STATE_STOPPED
    made = False

    async def stop(caller: Caller) -> None:
        nonlocal made
        if not made:
            await caller.create("phoenix", 2, ports=[_PORT])
            made = True
        if (await caller.get("phoenix")).status.state == stopped:
            await caller.start("phoenix")
        if (await caller.get("phoenix")).status.state != frozen:
            await caller.containers.PauseContainer(container_service_pb2.PauseContainerRequest(name="phoenix"))
        await caller.stop("phoenix", keep_resources=True)

    async def check(caller: Caller) -> None:
        container = await caller.get("phoenix")
        assert container.status.state in (frozen, stopped), container.status
        (engine,) = engine_containers(rig)
        assert engine["State"]["Paused"] == (container.status.state == frozen)
        assert engine["State"]["Running"] == (container.status.state == frozen)
        assert await caller.free_gpus() == 6

    assert await at_every_moment(rig, "STOP", stop, check) >= 3


@pytest.mark.timeout(1200)
async def test_commit(clean_engine: Rig) -> None:
    """The name is with the old image or the new one, as the operation says; nothing else is left, and it runs."""
    rig = clean_engine
    named = ""

    async def commit(caller: Caller) -> None:
        nonlocal named
        if not named:
            await caller.create("phoenix", 2, ports=[_PORT])
            await caller.shell("phoenix", "echo kept > /kept")
            named = "nothing"
        await caller.commit("phoenix", "gpudock/phoenix", tag="test")

    async def check(caller: Caller) -> None:
        nonlocal named
        await sound(caller, rig, "phoenix")
        request = operation_service_pb2.ListOperationsRequest(page_size=1)
        (last,) = (await caller.operations.ListOperations(request)).operations
        images = {
            tag: image["Id"] for image in rig.engine.call("GET", "/images/json") for tag in image["RepoTags"] or ()
        }
        assert not [tag for tag in images if tag.startswith(("gpudock/raw:", "gpudock/commit:"))]
        if last.kind != operation_pb2.OPERATION_KIND_COMMIT_CONTAINER:
            return
        # What was begun is finished by the next daemon.
        assert last.state == operation_pb2.OPERATION_STATE_SUCCEEDED, last
        watch = operation_service_pb2.WatchOperationRequest(id=last.id)
        answers = [answer async for answer in caller.operations.WatchOperation(watch)]
        assert images["gpudock/phoenix:test"] == answers[-1].result.image.id
        if named != answers[-1].result.image.id:
            named = answers[-1].result.image.id
            config = rig.engine.call("GET", f"/images/{named}/json")["Config"]
            assert not [key for key in config["Labels"] or () if key.startswith("gpudock.")]

    assert await at_every_moment(rig, "COMMIT", commit, check) >= 10
    rig.engine.remove_all()
    rig.engine.call("DELETE", "/images/gpudock/phoenix:test")
