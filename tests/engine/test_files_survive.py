"""The files that a container has written, before and after its engine container was replaced: by each method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import grpc
import pytest
from gpudock.v1 import container_pb2, operation_pb2, operation_service_pb2

from tests.calls import IDLE, Caller, failure, progress_of, result_of, scale_request
from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.engine.sample_trees import FILES, TreeEntry, create_tree_command, image_files, read_tree, tree_differences
from tests.rig import Rig
from tests.rig.images import GLIBC
from tests.rig.patience import limit
from tests.selection import deep_except

__all__ = ["daemons"]

IMAGE = "gpudock/survivor:test"
NAME = "survivor"
MIB = 1 << 20
SMALL = 1500
RUNNING = container_pb2.CONTAINER_STATE_RUNNING
STAGE_RUNNING = operation_pb2.OPERATION_STAGE_STATE_RUNNING

# Idles, unless it is given four cards.
NOT_WITH_FOUR = (
    "sh",
    "-c",
    "[ $(ls /dev | grep -c '^nvidia[0-9]') = 4 ] && exit 1; trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done",
)


async def grown(
    caller: Caller, rig: Rig, gpus: int, files: int, command: tuple[str, ...] = IDLE
) -> dict[bytes, TreeEntry]:
    """Create the container with the tree in it; what it looks like inside."""
    rig.images.derive(IMAGE, GLIBC, files=image_files())
    await caller.create(NAME, gpus, image=IMAGE, command=command)
    made = await caller.run(NAME, *create_tree_command(files=files))
    assert made.code == 0, made
    # Read after another start, so that what a start changes by itself is in it.
    await caller.restart(NAME)
    return await inside(caller, rig)


async def inside(caller: Caller, rig: Rig) -> dict[bytes, TreeEntry]:
    """What the running container sees."""
    container = await caller.get(NAME)
    assert container.status.state == RUNNING
    shown = rig.engine.call("GET", f"/containers/{container.status.engine_id}/json")
    return read_tree(f"/proc/{shown['State']['Pid']}/root")


async def plan_of(caller: Caller, gpus: int) -> operation_pb2.OperationPlan:
    """What a scale would do."""
    progress = await progress_of(caller.containers.ScaleContainer(scale_request(NAME, gpus, validate_only=True)))
    (planned,) = progress.snapshots
    return planned.plan


def carry_of(operation: operation_pb2.Operation) -> operation_pb2.OperationStage:
    """The stage in which the files move."""
    return next(stage for stage in operation.stages if stage.name == "carry")


@pytest.mark.deep
async def test_exchange_carries_everything(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--layer-carry", "exchange")
    async with Caller(daemon.target) as caller:
        before = await grown(caller, rig, 2, FILES)
        assert len(before) > FILES
        plan = await plan_of(caller, 4)
        assert plan.carry_method == operation_pb2.LAYER_CARRY_METHOD_EXCHANGE
        assert list(plan.warnings) == []
        for gpus in (4, 0):
            await caller.scale(NAME, gpus)
            assert tree_differences(before, await inside(caller, rig)) == ""
        await caller.stop(NAME)
        await caller.start(NAME, 5)
        assert tree_differences(before, await inside(caller, rig)) == ""


@pytest.mark.deep
async def test_copy_carries_everything_and_tells_how_far_it_is(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--layer-carry", "copy")
    async with Caller(daemon.target) as caller:
        before = await grown(caller, rig, 2, FILES)
        plan = await plan_of(caller, 4)
        assert plan.carry_method == operation_pb2.LAYER_CARRY_METHOD_COPY
        assert plan.bytes_available > plan.bytes_to_move > FILES * 4096
        assert not plan.warnings

        progress = await progress_of(caller.containers.ScaleContainer(scale_request(NAME, 4)))
        told = [carry for carry in map(carry_of, progress.snapshots) if carry.total_bytes]
        moved = [carry.current_bytes for carry in told]
        assert moved == sorted(moved)
        assert len(set(moved)) > 2
        assert {carry.total_bytes for carry in told} == {moved[-1]}
        assert moved[-1] >= FILES * 4096
        assert tree_differences(before, await inside(caller, rig)) == ""

        await caller.scale(NAME, 0)
        assert tree_differences(before, await inside(caller, rig)) == ""


@pytest.mark.deep
async def test_commit_loses_what_its_plan_says_and_no_more(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--layer-carry", "commit")
    async with Caller(daemon.target) as caller:
        before = await grown(caller, rig, 2, FILES)
        plan = await plan_of(caller, 4)
        assert plan.carry_method == operation_pb2.LAYER_CARRY_METHOD_COMMIT
        assert plan.bytes_available > plan.bytes_to_move > 48 * MIB, "the sparse files, written out"
        said = " ".join(plan.warnings)
        for gpus in (4, 0):
            await caller.scale(NAME, gpus)
            _as_committed(before, await inside(caller, rig), said)


def _as_committed(before: Mapping[bytes, TreeEntry], after: Mapping[bytes, TreeEntry], said: str) -> None:
    """All is the same, but for what `said` names."""
    assert "sockets, and the mode, owner and time of /, are not copied" in said
    expected = {path: entry for path, entry in before.items() if path != b"/" and entry.kind != "s"}
    found = {path: entry for path, entry in after.items() if path != b"/"}
    assert "extended attributes other than security.capability are lost" in said
    kept = {"security.capability"}
    assert "modification times are cut to whole seconds; those before 1970 become 1970" in said
    assert "sparse files are written out in full" in said
    for path, entry in expected.items():
        expected[path] = dataclasses.replace(
            entry,
            xattrs={name: value for name, value in entry.xattrs.items() if name in kept},
            mtime_ns=max(entry.mtime_ns // 10**9, 0),
            sparse=False,
        )
    for path, entry in found.items():
        # Of those before 1970 engines keep a symbolic link's.
        found[path] = dataclasses.replace(entry, mtime_ns=max(entry.mtime_ns // 10**9, 0), sparse=False)
    assert tree_differences(expected, found) == ""


@pytest.mark.parametrize("method", deep_except(["exchange"], ["exchange", "copy", "commit"]))
async def test_a_successor_that_does_not_live_gives_the_old_one_back(
    daemons: IsolatedDaemons, rig: Rig, method: str
) -> None:
    # A busy machine takes longer than FAST allows to run the few programs that end it.
    daemon = await daemons.start("--layer-carry", method, "--settle-period", f"{limit(2):.1f}")
    async with Caller(daemon.target) as caller:
        before = await grown(caller, rig, 2, SMALL, NOT_WITH_FOUR)
        old = await caller.get(NAME)
        failed = await failure(caller.scale(NAME, 4))
        assert (failed.code, failed.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "START_FAILED")
        await _is_as_before(caller, rig, old, before)


@pytest.mark.parametrize("method", deep_except(["exchange"], ["exchange", "copy", "commit"]))
async def test_a_start_with_other_cards_carries_the_files_too(daemons: IsolatedDaemons, rig: Rig, method: str) -> None:
    daemon = await daemons.start("--layer-carry", method)
    async with Caller(daemon.target) as caller:
        before = await grown(caller, rig, 2, SMALL)
        for gpus in (3, 0):
            said = " ".join((await plan_of(caller, 5)).warnings)
            await caller.stop(NAME)
            await caller.start(NAME, gpus)
            after = await inside(caller, rig)
            if method == "commit":
                _as_committed(before, after, said)
            else:
                assert tree_differences(before, after) == ""


@pytest.mark.deep
async def test_a_cancel_in_the_midst_of_a_copy_gives_the_old_one_back(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--layer-carry", "copy")
    async with Caller(daemon.target) as caller:
        before = await grown(caller, rig, 2, FILES)
        old = await caller.get(NAME)
        stream = caller.containers.ScaleContainer(scale_request(NAME, 3))
        async for answer in stream:
            if carry_of(answer.operation).state == STAGE_RUNNING:
                cancel = operation_service_pb2.CancelOperationRequest(id=answer.operation.id)
                await caller.operations.CancelOperation(cancel)
                break
        cancelled = await failure(result_of(stream))
        assert (cancelled.code, cancelled.reason) == (grpc.StatusCode.CANCELLED, "OPERATION_CANCELLED")
        await _is_as_before(caller, rig, old, before)


async def _is_as_before(
    caller: Caller, rig: Rig, old: container_pb2.Container, before: Mapping[bytes, TreeEntry]
) -> None:
    """It runs in the same engine container, alone, with the same cards, spec and files."""
    now = await caller.get(NAME)
    assert now.status.engine_id == old.status.engine_id
    assert list(now.status.gpu_uuids) == list(old.status.gpu_uuids)
    assert (now.spec, now.revision) == (old.spec, old.revision)
    held = [uuid for uuid, holder in (await caller.holders()).items() if holder == NAME]
    assert sorted(held) == sorted(old.status.gpu_uuids)
    assert len(rig.engine.call("GET", "/containers/json?all=1")) == 1
    assert tree_differences(before, await inside(caller, rig)) == ""


async def test_files_that_find_no_room_stay_where_they_are(daemons: IsolatedDaemons) -> None:
    """A file of 8 TiB with nothing in it takes no room where it is; a commit would write it out."""
    daemon = await daemons.start("--layer-carry", "commit")
    async with Caller(daemon.target) as caller:
        old = await caller.create(NAME, 2)
        await caller.shell(NAME, "truncate -s $((8 << 40)) /huge")
        full = await failure(caller.scale(NAME, 3))
        assert (full.code, full.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "DISK_FULL")
        assert int(full.metadata["needed_bytes"]) > 8 << 40 > int(full.metadata["available_bytes"])
        now = await caller.get(NAME)
        assert (now.status.engine_id, now.status.state) == (old.status.engine_id, RUNNING)
        assert await caller.free_gpus() == 6
