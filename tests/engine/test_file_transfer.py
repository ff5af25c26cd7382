"""The transfer of a container's files to a new engine container, by each method."""

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
FEW_FILES = 1500
RUNNING = container_pb2.CONTAINER_STATE_RUNNING
STAGE_RUNNING = operation_pb2.OPERATION_STAGE_STATE_RUNNING

# Exits at once with four GPUs, and idles otherwise.
EXIT_WITH_FOUR_GPUS = (
    "sh",
    "-c",
    "[ $(ls /dev | grep -c '^nvidia[0-9]') = 4 ] && exit 1; trap 'exit 0' TERM; while :; do sleep 3600 & wait $!; done",
)


async def create_with_tree(
    caller: Caller, rig: Rig, gpus: int, files: int, command: tuple[str, ...] = IDLE
) -> dict[bytes, TreeEntry]:
    """Create the container with a sample tree; the tree as the container sees it."""
    rig.images.derive(IMAGE, GLIBC, files=image_files())
    await caller.create(NAME, gpus, image=IMAGE, command=command)
    made = await caller.run(NAME, *create_tree_command(files=files))
    assert made.code == 0, made
    # A start changes some files, so that the tree is read after a restart.
    await caller.restart(NAME)
    return await read_container_tree(caller, rig)


async def read_container_tree(caller: Caller, rig: Rig) -> dict[bytes, TreeEntry]:
    """The files of the running container."""
    container = await caller.get(NAME)
    assert container.status.state == RUNNING
    shown = rig.engine.call("GET", f"/containers/{container.status.engine_id}/json")
    return read_tree(f"/proc/{shown['State']['Pid']}/root")


async def plan_of(caller: Caller, gpus: int) -> operation_pb2.OperationPlan:
    """The plan of a scale."""
    progress = await progress_of(caller.containers.ScaleContainer(scale_request(NAME, gpus, validate_only=True)))
    (planned,) = progress.snapshots
    return planned.plan


def transfer_stage(operation: operation_pb2.Operation) -> operation_pb2.OperationStage:
    """The stage that transfers the files."""
    return next(stage for stage in operation.stages if stage.name == "carry")


@pytest.mark.deep
async def test_an_exchange_of_layers_keeps_all_files(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--layer-carry", "exchange")
    async with Caller(daemon.target) as caller:
        before = await create_with_tree(caller, rig, 2, FILES)
        assert len(before) > FILES
        plan = await plan_of(caller, 4)
        assert plan.carry_method == operation_pb2.LAYER_CARRY_METHOD_EXCHANGE
        assert list(plan.warnings) == []
        for gpus in (4, 0):
            await caller.scale(NAME, gpus)
            assert tree_differences(before, await read_container_tree(caller, rig)) == ""
        await caller.stop(NAME)
        await caller.start(NAME, 5)
        assert tree_differences(before, await read_container_tree(caller, rig)) == ""


@pytest.mark.deep
async def test_a_copy_keeps_all_files_and_reports_its_progress(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--layer-carry", "copy")
    async with Caller(daemon.target) as caller:
        before = await create_with_tree(caller, rig, 2, FILES)
        plan = await plan_of(caller, 4)
        assert plan.carry_method == operation_pb2.LAYER_CARRY_METHOD_COPY
        assert plan.bytes_available > plan.bytes_to_move > FILES * 4096
        assert not plan.warnings

        progress = await progress_of(caller.containers.ScaleContainer(scale_request(NAME, 4)))
        stages = [stage for stage in map(transfer_stage, progress.snapshots) if stage.total_bytes]
        copied = [stage.current_bytes for stage in stages]
        assert copied == sorted(copied)
        assert len(set(copied)) > 2
        assert {stage.total_bytes for stage in stages} == {copied[-1]}
        assert copied[-1] >= FILES * 4096
        assert tree_differences(before, await read_container_tree(caller, rig)) == ""

        await caller.scale(NAME, 0)
        assert tree_differences(before, await read_container_tree(caller, rig)) == ""


@pytest.mark.deep
async def test_a_commit_loses_only_the_metadata_that_its_plan_names(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--layer-carry", "commit")
    async with Caller(daemon.target) as caller:
        before = await create_with_tree(caller, rig, 2, FILES)
        plan = await plan_of(caller, 4)
        assert plan.carry_method == operation_pb2.LAYER_CARRY_METHOD_COMMIT
        assert plan.bytes_available > plan.bytes_to_move > 48 * MIB, "the holes of sparse files are not counted"
        warnings = " ".join(plan.warnings)
        for gpus in (4, 0):
            await caller.scale(NAME, gpus)
            _require_committed_tree(before, await read_container_tree(caller, rig), warnings)


def _require_committed_tree(before: Mapping[bytes, TreeEntry], after: Mapping[bytes, TreeEntry], warnings: str) -> None:
    """Assert that the trees are the same except for the losses that `warnings` names."""
    assert "sockets, and the mode, owner and time of /, are not copied" in warnings
    expected = {path: entry for path, entry in before.items() if path != b"/" and entry.kind != "s"}
    found = {path: entry for path, entry in after.items() if path != b"/"}
    assert "extended attributes other than security.capability are lost" in warnings
    kept = {"security.capability"}
    assert "modification times are cut to whole seconds; those before 1970 become 1970" in warnings
    assert "sparse files are written out in full" in warnings
    for path, entry in expected.items():
        expected[path] = dataclasses.replace(
            entry,
            xattrs={name: value for name, value in entry.xattrs.items() if name in kept},
            mtime_ns=max(entry.mtime_ns // 10**9, 0),
            sparse=False,
        )
    for path, entry in found.items():
        # Engines keep times before 1970 of symbolic links.
        found[path] = dataclasses.replace(entry, mtime_ns=max(entry.mtime_ns // 10**9, 0), sparse=False)
    assert tree_differences(expected, found) == ""


@pytest.mark.parametrize("method", deep_except(["exchange"], ["exchange", "copy", "commit"]))
async def test_a_new_engine_container_that_exits_is_replaced_by_the_old_one(
    daemons: IsolatedDaemons, rig: Rig, method: str
) -> None:
    # A busy machine takes longer than FAST_FLAGS allow until the command has exited.
    daemon = await daemons.start("--layer-carry", method, "--settle-period", f"{limit(2):.1f}")
    async with Caller(daemon.target) as caller:
        before = await create_with_tree(caller, rig, 2, FEW_FILES, EXIT_WITH_FOUR_GPUS)
        old = await caller.get(NAME)
        failed = await failure(caller.scale(NAME, 4))
        assert (failed.code, failed.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "START_FAILED")
        await _require_unchanged(caller, rig, old, before)


@pytest.mark.parametrize("method", deep_except(["exchange"], ["exchange", "copy", "commit"]))
async def test_a_start_with_other_gpus_keeps_the_files(daemons: IsolatedDaemons, rig: Rig, method: str) -> None:
    daemon = await daemons.start("--layer-carry", method)
    async with Caller(daemon.target) as caller:
        before = await create_with_tree(caller, rig, 2, FEW_FILES)
        for gpus in (3, 0):
            warnings = " ".join((await plan_of(caller, 5)).warnings)
            await caller.stop(NAME)
            await caller.start(NAME, gpus)
            after = await read_container_tree(caller, rig)
            if method == "commit":
                _require_committed_tree(before, after, warnings)
            else:
                assert tree_differences(before, after) == ""


@pytest.mark.deep
async def test_a_cancel_during_a_copy_restores_the_old_engine_container(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--layer-carry", "copy")
    async with Caller(daemon.target) as caller:
        before = await create_with_tree(caller, rig, 2, FILES)
        old = await caller.get(NAME)
        stream = caller.containers.ScaleContainer(scale_request(NAME, 3))
        async for response in stream:
            if transfer_stage(response.operation).state == STAGE_RUNNING:
                cancel = operation_service_pb2.CancelOperationRequest(id=response.operation.id)
                await caller.operations.CancelOperation(cancel)
                break
        cancelled = await failure(result_of(stream))
        assert (cancelled.code, cancelled.reason) == (grpc.StatusCode.CANCELLED, "OPERATION_CANCELLED")
        await _require_unchanged(caller, rig, old, before)


async def _require_unchanged(
    caller: Caller, rig: Rig, old: container_pb2.Container, before: Mapping[bytes, TreeEntry]
) -> None:
    """Assert that the container runs in its old engine container, with the same GPUs, spec and files."""
    now = await caller.get(NAME)
    assert now.status.engine_id == old.status.engine_id
    assert list(now.status.gpu_uuids) == list(old.status.gpu_uuids)
    assert (now.spec, now.revision) == (old.spec, old.revision)
    claimed = [uuid for uuid, holder in (await caller.holders()).items() if holder == NAME]
    assert sorted(claimed) == sorted(old.status.gpu_uuids)
    assert len(rig.engine.call("GET", "/containers/json?all=1")) == 1
    assert tree_differences(before, await read_container_tree(caller, rig)) == ""


async def test_a_transfer_without_enough_disk_space_is_refused(daemons: IsolatedDaemons) -> None:
    """A sparse file of 8 TiB uses no space in the layer; a commit would write its holes."""
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
