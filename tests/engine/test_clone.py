"""CloneContainer: a new container with the current files of another one, or with those of a revision."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from gpudock.v1 import (
    container_pb2,
    container_revision_pb2,
    container_service_pb2,
    operation_pb2,
    operation_service_pb2,
)

from tests.calls import IMAGE, Caller, clone_request, failure, failure_of, progress_of, result_of
from tests.conftest import FAST_FLAGS, own_state_flags
from tests.engine.sample_trees import TreeEntry, create_tree_command, image_files, read_tree, tree_differences
from tests.faults.invariants import SHOW_FILES, WRITE_FILES, layer_images, require_absent, require_consistent
from tests.rig import CUDA_LIKE, GLIBC, Rig
from tests.rig.patience import limit
from tests.selection import deep_except

_NEVER = container_pb2.SNAPSHOT_POLICY_NEVER
_PORT = container_pb2.PortRequest(container_port=80)
_STOPPED = container_pb2.CONTAINER_STATE_STOPPED
_PAUSED = container_pb2.CONTAINER_STATE_PAUSED
_TREES = "gpudock/cloned:test"
# Writes continuously: line n of the log is n.
_WRITER = "mkdir /busy; n=0; while :; do n=$((n+1)); echo $n >> /busy/log; echo $n > /busy/$((n % 50)); done"


async def _files(caller: Caller, name: str) -> str:
    return await caller.shell(name, SHOW_FILES)


async def _inside(caller: Caller, rig: Rig, name: str) -> dict[bytes, TreeEntry]:
    container = await caller.get(name)
    shown = rig.engine.call("GET", f"/containers/{container.status.engine_id}/json")
    return read_tree(f"/proc/{shown['State']['Pid']}/root")


async def test_a_clone_has_the_spec_and_the_files_and_is_independent(caller: Caller, rig: Rig) -> None:
    origin = await caller.create("origin", 2, ports=[_PORT], env={"A": "1"}, labels={"team": "ml"})
    await caller.shell("origin", WRITE_FILES)
    files = await _files(caller, "origin")
    process = await caller.shell("origin", "cut -d' ' -f22 /proc/1/stat")
    progress = await progress_of(caller.containers.CloneContainer(clone_request("origin", "clone")))
    assert progress.stages == ["create", "gather", "complete", "start", "commit"]
    clone = progress.result
    assert clone is not None
    assert (clone.spec, clone.revision, clone.owner) == (origin.spec, 1, origin.owner)
    assert clone.uid != origin.uid
    assert not set(clone.status.gpu_uuids) & set(origin.status.gpu_uuids)
    assert clone.status.ports[0].host_port != origin.status.ports[0].host_port
    assert await caller.shell("clone", "hostname; echo $A") == "clone\n1\n"
    await require_consistent(caller, rig, "clone", files)
    await require_consistent(caller, rig, "origin", files)
    assert await caller.shell("origin", "cut -d' ' -f22 /proc/1/stat") == process, "the source was restarted"
    (revision,) = await caller.revisions("clone")
    assert revision.cause == container_revision_pb2.REVISION_CAUSE_CLONED
    assert (await caller.get("origin")).etag == origin.etag

    await caller.shell("origin", "echo origin > /work/file")
    await caller.shell("clone", "rm -r /work/deep")
    assert await caller.shell("clone", "cat /work/file") == "kept\n"
    assert await caller.shell("origin", "ls /work/deep") == "data\n"
    await caller.delete("origin")
    await caller.scale("clone", 1)
    await caller.rollback("clone", 1)
    assert await caller.shell("clone", "cat /work/file") == "kept\n"
    await require_consistent(caller, rig, "clone")


async def test_a_clone_differs_in_the_fields_of_the_request(caller: Caller, rig: Rig) -> None:
    pinned = container_pb2.PortRequest(container_port=80, host_port=25_123)
    origin = await caller.create("origin", 2, ports=[pinned], env={"A": "1", "B": "1"})
    error = await failure(caller.clone("origin", "clone"))
    assert error.reason == "PORT_IN_USE"
    claimed = container_pb2.GpuRequest(uuids=origin.status.gpu_uuids[:1])
    assert (await failure(caller.clone("origin", "clone", "gpus,ports", gpus=claimed))).reason == "GPU_BUSY"
    await require_absent(caller, rig, "clone")
    gpus = container_pb2.GpuRequest(count=3)
    clone = await caller.clone("origin", "clone", gpus=gpus, ports=[_PORT], env={"A": "2"}, owner="me")
    assert (clone.spec.gpus.count, dict(clone.spec.env), clone.owner) == (3, {"A": "2"}, "me")
    assert clone.spec.image == IMAGE
    await require_consistent(caller, rig, "clone")
    # A field in the mask without a value is cleared.
    cleared = await caller.clone("origin", "cleared", "gpus,ports,env")
    assert not cleared.status.gpu_uuids
    assert not cleared.status.ports
    assert await caller.shell("cleared", "echo [$A$B]") == "[]\n"
    # The stopped source has released its pinned port, so that the clone can claim it.
    await caller.stop("origin")
    pinned_clone = await caller.clone("origin", "pinned", gpus=container_pb2.GpuRequest(count=1))
    assert [port.host_port for port in pinned_clone.status.ports] == [25_123]


async def test_a_revision_is_cloned_with_its_files(caller: Caller, rig: Rig) -> None:
    await caller.create("origin", 1, env={"A": "1"})
    await caller.shell("origin", WRITE_FILES)
    first = await _files(caller, "origin")
    await caller.update("origin", env={"A": "2"})
    await caller.shell("origin", "rm -r /work")
    await caller.update("origin", env={"A": "3"}, snapshots=_NEVER)
    clone = await caller.clone("origin", "clone", revision=1)
    assert (dict(clone.spec.env), clone.revision) == ({"A": "1"}, 1)
    await require_consistent(caller, rig, "clone", first)
    assert (await failure(caller.clone("origin", "other", revision=2))).reason == "SNAPSHOT_NOT_FOUND"
    error = await failure(caller.clone("origin", "other", revision=9))
    assert (error.reason, error.metadata["container"]) == ("REVISION_NOT_FOUND", "origin")
    current = await caller.clone("origin", "current", revision=3)
    assert dict(current.spec.env) == {"A": "3"}
    assert await caller.shell("current", "ls -d /work 2>/dev/null || echo gone") == "gone\n"
    await caller.delete("origin")
    await require_consistent(caller, rig, "clone", first)


@pytest.mark.deep
async def test_a_stopped_or_paused_source_keeps_its_state(caller: Caller, rig: Rig) -> None:
    await caller.create("origin", 1)
    await caller.shell("origin", WRITE_FILES)
    files = await _files(caller, "origin")
    await caller.containers.PauseContainer(container_service_pb2.PauseContainerRequest(name="origin"))
    await caller.clone("origin", "of-paused")
    assert (await caller.get("origin")).status.state == _PAUSED
    await require_consistent(caller, rig, "of-paused", files)
    await caller.stop("origin")
    clone = await caller.clone("origin", "of-stopped", create_only=True)
    assert (clone.status.state, len(clone.status.gpu_uuids)) == (_STOPPED, 1)
    assert (await caller.get("origin")).status.state == _STOPPED
    await caller.start("of-stopped")
    await require_consistent(caller, rig, "of-stopped", files)


@pytest.mark.parametrize("transfer", deep_except(["exchange"], ["exchange", "commit"]))
async def test_a_clone_has_the_files_of_one_moment_while_the_source_writes(rig: Rig, transfer: str) -> None:
    daemon = await rig.start_daemon(*FAST_FLAGS, *own_state_flags(), "--layer-carry", transfer)
    try:
        async with Caller(daemon.target) as caller:
            await caller.create("origin", 1, command=("sh", "-c", _WRITER))
            await caller.clone("origin", "clone", command=("sleep", "infinity"))
            log = (await caller.shell("clone", "cat /busy/log")).split()
            assert log == [str(number) for number in range(1, len(log) + 1)], "the log has a gap"
            last = sorted(int(number) for number in (await caller.shell("clone", "cat /busy/[0-9]*")).split())
            assert last[-1] in (len(log), len(log) - 1)
            assert last == list(range(last[0], last[0] + len(last)))
            before = int(await caller.shell("origin", "wc -l < /busy/log"))
            assert before > len(log)
            async with asyncio.timeout(limit(10)):
                while int(await caller.shell("origin", "wc -l < /busy/log")) <= before:
                    await asyncio.sleep(0.05)
            await caller.delete_all()
    finally:
        await asyncio.to_thread(daemon.stop)


@pytest.mark.deep
async def test_a_clone_has_all_metadata_of_the_files(caller: Caller, rig: Rig) -> None:
    rig.images.derive(_TREES, GLIBC, files=image_files())
    await caller.create("origin", 0, image=_TREES)
    assert (await caller.run("origin", *create_tree_command(files=2000))).code == 0
    await caller.restart("origin")
    expected = await _inside(caller, rig, "origin")
    await caller.clone("origin", "clone")
    assert tree_differences(expected, await _inside(caller, rig, "clone")) == ""
    await caller.update("origin", env={"A": "1"})
    await caller.clone("origin", "older", revision=1)
    assert tree_differences(expected, await _inside(caller, rig, "older")) == ""


@pytest.mark.deep
@pytest.mark.parametrize("transfer", ["copy", "commit"])
async def test_images_that_a_clone_needs_remain_after_the_source_is_deleted(rig: Rig, transfer: str) -> None:
    others = layer_images(rig)
    daemon = await rig.start_daemon(*FAST_FLAGS, *own_state_flags(), "--layer-carry", transfer)
    try:
        async with Caller(daemon.target) as caller:
            await caller.create("origin", 1)
            await caller.shell("origin", WRITE_FILES)
            first = await _files(caller, "origin")
            await caller.scale("origin", 2)
            await caller.shell("origin", "echo changed > /work/file")
            second = await _files(caller, "origin")
            progress = await progress_of(caller.containers.CloneContainer(clone_request("origin", "now")))
            await caller.clone("origin", "old", revision=1)
            await caller.delete("old")
            back = await caller.rollback("origin", 1)
            assert back.revision == 3, "the deletion of a clone removed an image of its source"
            await caller.clone("origin", "old", revision=1)
            await caller.delete("origin")
            await require_consistent(caller, rig, "now", second)
            await require_consistent(caller, rig, "old", first)
            await caller.scale("old", 3)
            await require_consistent(caller, rig, "old", first)
            methods = {"copy": "COPY", "commit": "COMMIT"}
            named = operation_pb2.LayerCarryMethod.Name(progress.snapshots[0].plan.carry_method)
            assert named == f"LAYER_CARRY_METHOD_{methods[transfer]}"
            await caller.delete_all()
            assert layer_images(rig) == others
    finally:
        await asyncio.to_thread(daemon.stop)


@pytest.mark.deep
async def test_concurrent_clones_of_one_source_or_name_succeed_or_are_refused(caller: Caller, rig: Rig) -> None:
    await caller.create("origin", 1, image=GLIBC)
    await caller.shell("origin", "dd if=/dev/urandom of=/big bs=1M count=64 2>/dev/null")
    calls = [caller.containers.CloneContainer(clone_request("origin", name)) for name in ("one", "two")]
    outcomes = await asyncio.gather(*(result_of(call) for call in calls), return_exceptions=True)
    assert any(isinstance(outcome, container_pb2.Container) for outcome in outcomes)
    for outcome in outcomes:
        if not isinstance(outcome, container_pb2.Container):
            assert isinstance(outcome, grpc.aio.AioRpcError)
            error = failure_of(outcome)
            assert (error.reason, error.metadata["container"]) == ("CONTAINER_BUSY", "origin")
    same_name = [caller.containers.CloneContainer(clone_request("origin", "three")) for _ in range(2)]
    outcomes = await asyncio.gather(*(result_of(call) for call in same_name), return_exceptions=True)
    assert sum(isinstance(outcome, container_pb2.Container) for outcome in outcomes) == 1
    await require_consistent(caller, rig, "three")
    assert (await failure(caller.clone("origin", "three"))).reason == "CONTAINER_EXISTS"
    assert (await failure(caller.clone("missing", "four"))).reason == "CONTAINER_NOT_FOUND"


async def test_a_cancelled_clone_leaves_nothing(caller: Caller, rig: Rig) -> None:
    await caller.create("origin", 1, image=GLIBC)
    await caller.shell("origin", "dd if=/dev/urandom of=/big bs=1M count=200 2>/dev/null")
    stream = caller.containers.CloneContainer(clone_request("origin", "clone"))
    async for response in stream:
        if response.operation.stage == "gather":
            await caller.operations.CancelOperation(
                operation_service_pb2.CancelOperationRequest(id=response.operation.id)
            )
            break
    error = await failure(progress_of(stream))
    assert error.reason == "OPERATION_CANCELLED"
    await require_absent(caller, rig, "clone")
    await require_consistent(caller, rig, "origin")
    assert await caller.free_gpus() == 7


@pytest.mark.deep
async def test_anonymous_volumes_are_not_cloned_and_the_plan_warns(caller: Caller, rig: Rig) -> None:
    await caller.create("origin", 0, image=CUDA_LIKE)
    await caller.shell("origin", "echo mine > /data/mine")
    request = clone_request("origin", "clone", validate_only=True)
    plan = (await progress_of(caller.containers.CloneContainer(request))).snapshots[-1].plan
    assert any("/data" in warning for warning in plan.warnings)
    await require_absent(caller, rig, "clone")
    await caller.clone("origin", "clone")
    assert await caller.shell("clone", "ls /data") == "from-image\n"
    assert await caller.shell("origin", "ls /data") == "from-image\nmine\n"
    before = {volume["Name"] for volume in rig.engine.call("GET", "/volumes")["Volumes"]}
    await caller.delete("clone")
    after = {volume["Name"] for volume in rig.engine.call("GET", "/volumes")["Volumes"]}
    assert len(before - after) == 1
    assert await caller.shell("origin", "cat /data/mine") == "mine\n"


@pytest.mark.deep
async def test_a_revision_of_a_source_without_its_engine_container_can_be_cloned(caller: Caller, rig: Rig) -> None:
    await caller.create("origin", 0)
    await caller.shell("origin", WRITE_FILES)
    files = await _files(caller, "origin")
    updated = await caller.update("origin", env={"A": "1"})
    rig.engine.call("DELETE", f"/containers/{updated.status.engine_id}?force=1")
    async with asyncio.timeout(limit(10)):
        while (await caller.get("origin")).status.state != container_pb2.CONTAINER_STATE_FAILED:
            await asyncio.sleep(0.05)
    assert (await failure(caller.clone("origin", "clone"))).reason == "CONTAINER_GONE"
    await caller.clone("origin", "clone", revision=1)
    assert await _files(caller, "clone") == files


async def test_the_plan_of_a_clone_has_the_bytes_to_copy(caller: Caller) -> None:
    await caller.create("origin", 0, image=GLIBC)
    await caller.shell("origin", "dd if=/dev/zero of=/blocks bs=1M count=64 2>/dev/null")
    request = clone_request("origin", "clone", validate_only=True)
    plan = (await progress_of(caller.containers.CloneContainer(request))).snapshots[-1].plan
    assert plan.bytes_to_move == 0 or 64 << 20 <= plan.bytes_to_move <= plan.bytes_available


async def test_a_clone_cannot_have_another_image(caller: Caller) -> None:
    await caller.create("origin", 0)
    for mask in ("", "image", "env,image"):
        error = await failure(caller.clone("origin", "clone", mask, image=GLIBC))
        assert error.reason == "INVALID_ARGUMENT"
    error = await failure(caller.clone("Origin", "Clone", owner="!", revision=-1))
    assert set(error.violations) == {"name", "source", "owner", "revision"}
