"""Which drafts are refused, by the state, the name and the limits of a container, and what plans contain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from gpudock_server.core.containers.commands import (
    Clone,
    Command,
    Commit,
    Create,
    Delete,
    DeleteRevision,
    FieldChange,
    Pause,
    Restart,
    Rollback,
    Scale,
    ScaleStrategy,
    Start,
    Stop,
    Unpause,
    Update,
)
from gpudock_server.core.containers.images import ImagePolicy
from gpudock_server.errors import ContainerRecordLost
from gpudock_server.model.container import ContainerState
from gpudock_server.model.engine import NodeLimits
from gpudock_server.model.operation import LayerTransferMethod
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.snapshot import SnapshotKind, SnapshotMethod
from gpudock_server.model.spec import GpuRequest
from gpudock_server.ports import CommitCost, SnapshotPlan

from tests.unit.drafts import preview, refusal
from tests.unit.failing_store import node_record
from tests.unit.model_engine import OTHER_IMAGE
from tests.unit.model_node import SPEC, ModelNode
from tests.unit.scenario_setups import (
    MIB,
)
from tests.unit.scenarios import LABEL_CHANGE, THREE_GPUS

S = ContainerState
BUSY, GONE, PAUSED = "CONTAINER_RUNNING", "CONTAINER_GONE", "CONTAINER_PAUSED"
NOT_RUNNING, NOT_PAUSED = "CONTAINER_NOT_RUNNING", "CONTAINER_NOT_PAUSED"
NEITHER = {S.CREATING: NOT_RUNNING, S.DELETING: NOT_RUNNING}
LOST = {**NEITHER, S.FAILED: GONE}

# What each is refused with, by the state that the container is in; a FAILED one's engine container is gone.
REFUSALS: list[tuple[Command, dict[ContainerState, str]]] = [
    (Start("a"), {**LOST, S.PAUSED: PAUSED}),
    (Start("a", gpus=THREE_GPUS), {**LOST, S.PAUSED: PAUSED, S.RUNNING: BUSY, S.RESTARTING: BUSY}),
    (Restart("a"), LOST),
    (Scale("a", gpus=THREE_GPUS), {**LOST, S.PAUSED: PAUSED, S.EXITED: NOT_RUNNING, S.STOPPED: NOT_RUNNING}),
    (Scale("a", shm_size_bytes=MIB), {**LOST, S.PAUSED: PAUSED, S.EXITED: NOT_RUNNING, S.STOPPED: NOT_RUNNING}),
    (Scale("a", cpus=1.5), {**LOST, S.PAUSED: PAUSED}),
    (
        Scale("a", cpus=1.5, strategy=ScaleStrategy.RECREATE),
        {**LOST, S.PAUSED: PAUSED, S.EXITED: NOT_RUNNING, S.STOPPED: NOT_RUNNING},
    ),
    (Update("a", FieldChange("env", {"A": "1"})), {**LOST, S.PAUSED: PAUSED}),
    (Rollback("a", 1), {**NEITHER, S.PAUSED: PAUSED, S.FAILED: "SNAPSHOT_NOT_FOUND"}),
    (Stop("a"), NEITHER),
    (Pause("a"), {state: PAUSED if state is S.PAUSED else NOT_RUNNING for state in S if state is not S.RUNNING}),
    (Unpause("a"), {state: NOT_PAUSED for state in S if state is not S.PAUSED}),
    (Delete("a"), {S.RUNNING: BUSY, S.RESTARTING: BUSY, S.PAUSED: BUSY}),
    (Delete("a", force=True), {}),
    (Commit("a", "x:y"), {**NEITHER, S.FAILED: NOT_RUNNING}),
    (Clone("b", "a", LABEL_CHANGE), {S.FAILED: GONE}),
]


@pytest.mark.parametrize(("command", "refused"), REFUSALS, ids=lambda one: str(one)[:40])
async def test_what_a_state_does_not_allow(
    model: ModelNode, command: Command, refused: dict[ContainerState, str]
) -> None:
    for state in ContainerState:
        if state is S.FAILED:
            model.engine.containers.clear()
        model.store.put(model.container().with_status(state=state))
        if reason := refused.get(state):
            error = await refusal(model, command)
            assert error.reason == reason, state
            assert error.metadata["container"] == "a"
            assert error.metadata.get("state", state.value) == state.value
        else:
            await preview(model, command)
        if state is S.FAILED:
            model = ModelNode()
            await model.create_container()


NAMED: Sequence[Command] = [command for command, _ in REFUSALS if not isinstance(command, Clone)] + [
    DeleteRevision("a", 1)
]


@pytest.mark.parametrize("command", NAMED, ids=lambda one: type(one).__name__)
async def test_what_is_not_there_or_not_as_it_was_seen(model: ModelNode, command: Any) -> None:
    unknown = await refusal(model, replace(command, name="unknown"))
    assert (unknown.reason, unknown.metadata) == ("CONTAINER_NOT_FOUND", {"container": "unknown"})
    stale = await refusal(model, replace(command, etag="old"))
    assert stale.reason == "STALE_ETAG"
    assert stale.metadata == {"container": "a", "etag": "old", "current_etag": model.container().etag}
    model.store.locks[ResourceKind.CONTAINER, "a"] = "other"
    busy = await refusal(model, replace(command, etag=model.container().etag))
    assert (busy.reason, busy.metadata) == ("CONTAINER_BUSY", {"container": "a", "operation_id": "other"})
    model.store.locks.clear()
    model.store.put(model.container().changed(node="far"))
    model.store.node_records = [node_record("near", "n:1"), node_record("far", "f:1")]
    elsewhere = await refusal(model, command)
    assert elsewhere.reason == "WRONG_NODE"
    assert (elsewhere.metadata["node"], elsewhere.metadata["address"]) == ("far", "f:1")


async def test_a_failed_one_that_the_engine_has_again_is_as_the_engine_shows_it(model: ModelNode) -> None:
    model.store.put(model.container().with_status(state=S.FAILED, message="its engine container is gone"))
    await model.run_ok(Restart("a"))
    assert model.container().status.state is S.RUNNING
    assert model.container().status.message == ""


async def test_one_that_is_gone_names_the_revisions_that_it_can_be_brought_back_to(model: ModelNode) -> None:
    await model.run_ok(Scale("a", gpus=THREE_GPUS))
    await model.run_ok(Scale("a", gpus=GpuRequest(count=1)))
    model.engine.containers.clear()
    model.store.put(model.container().with_status(state=S.FAILED))
    gone = await refusal(model, Start("a"))
    assert gone.metadata == {"container": "a", "revisions": "1,2"}
    assert (await refusal(model, Clone("b", "a", LABEL_CHANGE))).metadata["revisions"] == "1,2"
    await model.run_ok(Rollback("a", 2))
    assert model.container().status.state is S.STOPPED
    assert model.container().revision == 4


async def test_a_new_object_must_not_exist(model: ModelNode) -> None:
    for command in (Create("a", SPEC), Clone("a", "a", LABEL_CHANGE)):
        refused = await refusal(model, command)
        assert (refused.reason, refused.metadata) == ("CONTAINER_EXISTS", {"container": "a"})
    await model.create_container("b")
    # A record that the store lost is found again, and a new container would take its place.
    del model.store.container_records["a"]
    for command in (Create("a", SPEC), Clone("a", "b", LABEL_CHANGE)):
        lost = await refusal(model, command)
        assert isinstance(lost, ContainerRecordLost)
        assert lost.container == "a"


@pytest.mark.parametrize(
    ("limits", "spec", "metadata"),
    [
        (
            NodeLimits(max_memory_bytes=100),
            {"memory_bytes": 101},
            {"field": "memory_bytes", "requested": "101", "maximum": "100", "setting": "max_memory"},
        ),
        (
            NodeLimits(max_pids=100),
            {"pids_limit": 101},
            {"field": "pids_limit", "requested": "101", "maximum": "100", "setting": "max_pids_limit"},
        ),
    ],
)
async def test_a_limit_above_the_nodes_is_refused_unless_it_was_there_before(
    model: ModelNode, limits: NodeLimits, spec: dict[str, int], metadata: dict[str, str]
) -> None:
    ((field, value),) = spec.items()
    await model.run_ok(Update("a", FieldChange(field, value)))
    model.configure(limits=limits)
    for command in (
        Create("b", SPEC.changed(**spec)),
        Update("a", FieldChange(field, value + 1)),
        Clone("b", "a", FieldChange(field, value)),
    ):
        refused = await refusal(model, command)
        assert refused.reason == "LIMIT_FORBIDDEN"
        assert refused.metadata == metadata | {"requested": refused.metadata["requested"]}
    await preview(model, Scale("a", cpus=1.5))
    await preview(model, Create("b", SPEC.changed(gpus=THREE_GPUS, **{field: value - 1})))


async def test_the_plan_of_a_scale(model: ModelNode) -> None:
    operation = await preview(model, Scale("a", gpus=THREE_GPUS))
    plan, old = operation.plan, model.container()
    assert plan.placement.gpu_uuids == ("GPU-0", "GPU-1", "GPU-2")
    assert plan.kept_gpu_uuids == ("GPU-0", "GPU-1")
    assert plan.claimed_gpu_uuids == ("GPU-2",)
    assert plan.released_gpu_uuids == ()
    assert plan.claimed_ports == ()
    assert (plan.bytes_to_move, plan.bytes_available) == (5 + 7, 50)
    assert plan.restarts_process
    assert plan.carry_method is LayerTransferMethod.EXCHANGE
    assert plan.snapshot is SnapshotKind.TREE
    assert plan.warnings == ("it is a test",)
    assert (plan.old_spec, plan.new_spec) == (old.spec, old.spec.changed(gpus=THREE_GPUS))
    assert [stage.name for stage in operation.stages] == [
        *("create", "locate", "gather", "stop", "complete", "carry", "start", "verify", "seal", "commit", "retire")
    ]
    down = await preview(model, Scale("a", gpus=GpuRequest(count=1)))
    assert (down.plan.kept_gpu_uuids, down.plan.released_gpu_uuids) == (("GPU-0",), ("GPU-1",))
    assert down.plan.claimed_gpu_uuids == ()


async def test_the_plan_of_limits(model: ModelNode) -> None:
    operation = await preview(model, Scale("a", memory_bytes=1 << 30, strategy=ScaleStrategy.LIVE))
    assert not operation.plan.restarts_process
    assert operation.plan.carry_method is LayerTransferMethod.NONE
    assert [stage.name for stage in operation.stages] == [
        *("gather", "freeze", "complete", "thaw", "seal", "limits", "commit")
    ]
    live = await refusal(model, Scale("a", gpus=THREE_GPUS, shm_size_bytes=MIB, strategy=ScaleStrategy.LIVE))
    assert live.reason == "RESTART_REQUIRED"
    assert live.metadata == {"container": "a", "changes": "gpus,shm_size_bytes"}
    recreate = await preview(model, Scale("a", cpus=1.5, strategy=ScaleStrategy.RECREATE))
    assert recreate.plan.restarts_process


async def test_a_live_scale_does_not_exchange_an_unhealthy_gpu(model: ModelNode) -> None:
    other = model.container().status.placement.model_copy(update={"gpu_uuids": ("GPU-0", "GPU-9")})
    model.store.put(model.container().with_status(placement=other))
    refused = await refusal(model, Scale("a", gpus=model.container().spec.gpus, strategy=ScaleStrategy.LIVE))
    assert refused.metadata == {"container": "a", "changes": "gpus"}
    # Without GPUs in the request, the process keeps its GPUs.
    assert not (await preview(model, Scale("a", cpus=1.5))).plan.restarts_process


async def test_the_plan_of_a_create_and_of_a_stop(model: ModelNode) -> None:
    plan = (await preview(model, Create("b", SPEC))).plan
    assert plan.claimed_gpu_uuids == plan.placement.gpu_uuids == ("GPU-2", "GPU-3")
    assert plan.claimed_ports == plan.placement.ports
    assert [port.host_port for port in plan.claimed_ports] == [20001]
    stop = (await preview(model, Stop("a"))).plan
    assert (stop.placement.gpu_uuids, stop.released_gpu_uuids) == ((), ("GPU-0", "GPU-1"))
    kept = (await preview(model, Stop("a", keep_resources=True))).plan
    assert (kept.placement.gpu_uuids, kept.released_gpu_uuids) == (("GPU-0", "GPU-1"), ())
    model.configure_history(on_stop=True)
    files = (await preview(model, Stop("a"))).plan
    assert (files.bytes_to_move, files.bytes_available, files.snapshot) == (7, 70, SnapshotKind.TREE)
    pause = (await preview(model, Pause("a"))).plan
    assert pause.placement == model.container().status.placement


async def test_what_a_clone_leaves_behind(model: ModelNode) -> None:
    plan = (await preview(model, Clone("b", "a", LABEL_CHANGE))).plan
    assert plan.warnings == ("the anonymous volume of a at /cache is not copied",)
    assert plan.claimed_gpu_uuids == ("GPU-2", "GPU-3")
    assert (plan.bytes_to_move, plan.bytes_available, plan.carry_method) == (7, 70, LayerTransferMethod.COPY)
    model.snapshots.cost = SnapshotPlan(method=SnapshotMethod.LINK, too_large="10 files")
    assert "too large to copy: 10 files" in (await refusal(model, Clone("b", "a", LABEL_CHANGE))).message
    model.snapshots.method_result = (None, "no")
    plan = (await preview(model, Clone("b", "a", LABEL_CHANGE))).plan
    assert plan.carry_method is LayerTransferMethod.COMMIT
    assert "which loses metadata: no" in plan.warnings[0]
    model.layers.method = LayerTransferMethod.COMMIT
    plan = (await preview(model, Clone("b", "a", LABEL_CHANGE))).plan
    assert (plan.bytes_to_move, plan.bytes_available, plan.warnings[0]) == (5, 50, "it is a test")


async def test_the_plan_of_a_commit(model: ModelNode) -> None:
    plan = (await preview(model, Commit("a", "x:y"))).plan
    assert (plan.bytes_to_move, plan.bytes_available) == (17, 1 << 30)
    assert (plan.apparent_bytes, plan.allocated_bytes) == (10, 10)
    assert plan.warnings == ()
    assert plan.expected_freeze_seconds == pytest.approx(0.1 + 20e-6)
    assert plan.kept_gpu_uuids == plan.placement.gpu_uuids == ("GPU-0", "GPU-1")
    still = await preview(model, Commit("a", "x:y", pause=False))
    assert still.plan.expected_freeze_seconds is None
    assert [stage.name for stage in still.stages] == ["commit-files", "image", "tag", "commit", "clean"]
    huge = 60_000_000
    model.layers.cost = CommitCost(
        measured=True, apparent_bytes=huge, allocated_bytes=1, entries=1, bytes_available=huge + 6, warnings=("w",)
    )
    plan = (await preview(model, Commit("a", "x:y"))).plan
    assert plan.expected_freeze_seconds == pytest.approx(1.1)
    assert plan.bytes_to_move == huge
    assert plan.warnings[0] == "w"
    assert "holes" in plan.warnings[1]
    assert "frozen while the engine writes the image: copy and image need" in plan.warnings[2]
    model.layers.cost = model.layers.cost.model_copy(update={"bytes_available": huge + 7})
    assert (await preview(model, Commit("a", "x:y"))).stages[0].name == "copy-files"
    model.snapshots.cost = SnapshotPlan(method=SnapshotMethod.LINK, too_large="10 files")
    plan = (await preview(model, Commit("a", "x:y"))).plan
    assert plan.warnings[-1].endswith("the layer is too large to copy: 10 files")
    model.layers.cost = CommitCost()
    plan = (await preview(model, Commit("a", "x:y"))).plan
    assert plan.expected_freeze_seconds is None
    assert "(duration unknown): its files cannot be measured" in plan.warnings[-1]


async def test_a_commit_does_not_take_the_name_of_another_owner(model: ModelNode) -> None:
    model.configure(images=ImagePolicy(repositories=("team",)))
    assert (await refusal(model, Commit("a", "other:v1"))).reason == "IMAGE_NAME_FORBIDDEN"
    model.configure(images=ImagePolicy())
    taken = await refusal(model, Commit("a", OTHER_IMAGE))
    assert taken.reason == "IMAGE_EXISTS"
    assert taken.metadata["image"] == OTHER_IMAGE
    assert (await refusal(model, Commit("a", OTHER_IMAGE, replace=True))).reason == "IMAGE_EXISTS"
    await model.run_ok(Commit("a", "team/model:v1"))
    first = model.engine.tags["team/model:v1"]
    model.engine.write(model.engine_id(), "more")
    await model.run_ok(Commit("a", "team/model:v1"))
    assert model.engine.tags["team/model:v1"] != first
    model.store.put(model.container().changed(owner="bob"))
    assert (await refusal(model, Commit("a", "team/model:v1"))).reason == "IMAGE_EXISTS"
    model.configure(images=ImagePolicy(replace_any=True))
    assert (await refusal(model, Commit("a", "team/model:v1"))).reason == "IMAGE_EXISTS"
    await preview(model, Commit("a", "team/model:v1", replace=True))
