"""What is refused before anything is done, and what a plan says of what would be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
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
    FilesPolicy,
    Pause,
    PullPolicy,
    Restart,
    Rollback,
    Scale,
    ScaleStrategy,
    Start,
    Stop,
    Unpause,
    Update,
)
from gpudock_server.core.containers.history import HistoryDefaults
from gpudock_server.core.containers.images import ImagePolicy
from gpudock_server.core.volumes import commands as volume_commands
from gpudock_server.errors import ContainerRecordLost, GpudockError
from gpudock_server.model.container import ContainerState
from gpudock_server.model.engine import NodeLimits
from gpudock_server.model.image import ImageOrigin
from gpudock_server.model.operation import LayerTransferMethod, Operation, OperationState
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.snapshot import SnapshotKind, SnapshotMethod
from gpudock_server.model.spec import ContainerSpec, GpuRequest, Mount, RevisionPolicy, SnapshotPolicy
from gpudock_server.model.volume import VolumeState
from gpudock_server.ports import CommitCost, SnapshotPlan, Versioned

from tests.rpc.fakes import LONG_AGO
from tests.unit.failing_store import node_record
from tests.unit.model_engine import IMAGE, OTHER_IMAGE, REMOTE_IMAGE
from tests.unit.model_node import SPEC, ModelNode
from tests.unit.scenario_setups import (
    DATA_MOUNT,
    MIB,
    SPEC_WITH_DATA,
    mounted_volume,
    scaled_container_with_image_snapshot,
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


async def refusal(model: ModelNode, command: Command | volume_commands.Command) -> GpudockError:
    """What is said of what is refused; nothing of it has been done."""
    before = model.summary()
    with pytest.raises(GpudockError) as refused:
        await model.begin(command)
    assert model.summary() == before
    return refused.value


async def preview(model: ModelNode, command: Command) -> Operation:
    """What would be done; nothing is."""
    before = model.summary()
    operation = await model.containers.preview(command)
    assert model.summary() == before
    assert operation.state is OperationState.PLANNED
    return operation


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
    unknown = await refusal(model, replace(command, name="nobody"))
    assert (unknown.reason, unknown.metadata) == ("CONTAINER_NOT_FOUND", {"container": "nobody"})
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


async def test_what_is_made_anew_must_not_be_there(model: ModelNode) -> None:
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


async def test_a_live_scale_does_not_exchange_a_card_that_is_not_well(model: ModelNode) -> None:
    other = model.container().status.placement.model_copy(update={"gpu_uuids": ("GPU-0", "GPU-9")})
    model.store.put(model.container().with_status(placement=other))
    refused = await refusal(model, Scale("a", gpus=model.container().spec.gpus, strategy=ScaleStrategy.LIVE))
    assert refused.metadata == {"container": "a", "changes": "gpus"}
    # Where the request names no cards, the process goes on with those that it has.
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


@pytest.mark.parametrize(
    ("node", "container", "call", "method", "kept", "warned"),
    [
        (SnapshotPolicy.ALWAYS, None, None, SnapshotMethod.LINK, SnapshotKind.TREE, ""),
        (SnapshotPolicy.NEVER, None, None, SnapshotMethod.LINK, None, "the policy is NEVER"),
        (SnapshotPolicy.NEVER, SnapshotPolicy.ALWAYS, None, SnapshotMethod.LINK, SnapshotKind.TREE, ""),
        (SnapshotPolicy.ALWAYS, SnapshotPolicy.NEVER, None, SnapshotMethod.LINK, None, "the policy is NEVER"),
        (
            SnapshotPolicy.NEVER,
            SnapshotPolicy.NEVER,
            SnapshotPolicy.ALWAYS,
            SnapshotMethod.LINK,
            SnapshotKind.TREE,
            "",
        ),
        (SnapshotPolicy.CHEAP, None, None, SnapshotMethod.LINK, None, "the policy is CHEAP"),
        (SnapshotPolicy.CHEAP, None, None, SnapshotMethod.REFLINK, SnapshotKind.TREE, ""),
        (SnapshotPolicy.CHEAP, None, None, None, None, "the policy is CHEAP"),
        (
            SnapshotPolicy.ALWAYS,
            None,
            None,
            None,
            SnapshotKind.IMAGE,
            "by an engine commit, which loses metadata: no",
        ),
    ],
)
async def test_whether_files_are_kept_is_said_by_the_call_then_the_container_then_the_node(  # noqa: PLR0917 - a row of the table
    model: ModelNode,
    node: SnapshotPolicy,
    container: SnapshotPolicy | None,
    call: SnapshotPolicy | None,
    method: SnapshotMethod | None,
    kept: SnapshotKind | None,
    warned: str,
) -> None:
    model.configure_history(snapshots=node)
    model.snapshots.method_result = (method, "no")
    spec = model.container().spec.changed(revision_policy=RevisionPolicy(snapshots=container))
    model.store.put(model.container().changed(spec=spec))
    operation = await preview(model, Scale("a", cpus=1.5, snapshots=call))
    assert operation.plan.snapshot is kept
    assert [warned in warning for warning in operation.plan.warnings] == [True] * bool(warned)


async def test_a_layer_that_is_too_large_is_not_kept_unless_the_call_asks_for_it(model: ModelNode) -> None:
    model.snapshots.cost = SnapshotPlan(method=SnapshotMethod.LINK, too_large="10 files")
    operation = await preview(model, Scale("a", cpus=1.5))
    assert operation.plan.snapshot is None
    (warning,) = operation.plan.warnings
    assert "too large for a snapshot: 10 files" in warning
    refused = await refusal(model, Scale("a", cpus=1.5, snapshots=SnapshotPolicy.ALWAYS))
    assert refused.reason == "SNAPSHOT_FAILED"
    assert refused.metadata["detail"].startswith("the layer is too large for a snapshot: 10 files")
    done = await model.run_ok(Scale("a", cpus=1.5))
    assert done.state is OperationState.SUCCEEDED
    view = model.store.revision_views[model.container().uid, 1]
    assert view.snapshot is None
    assert view.snapshot_warning == "the layer was too large for a snapshot: 10 files"


async def test_history_is_pruned_by_number_and_by_age(model: ModelNode) -> None:
    def revisions() -> list[int]:
        return sorted(number for _, number in model.store.revision_views)

    model.configure_history(keep_revisions=3)
    for cpus in (1.0, 2.0):
        await model.run_ok(Scale("a", cpus=cpus))
    assert revisions() == [1, 2, 3]
    operation = await model.run_ok(Scale("a", cpus=3.0))
    assert operation.stages[-1].name == "prune"
    assert revisions() == [2, 3, 4]
    # The container's own word comes first.
    await model.run_ok(Update("a", FieldChange("revision_policy", RevisionPolicy(keep_revisions=2))))
    assert revisions() == [4, 5]
    model.configure_history(keep_revisions=100, keep_seconds=3600.0)
    await model.run_ok(Update("a", FieldChange("revision_policy", RevisionPolicy())))
    assert revisions() == [4, 5, 6]
    view = model.store.revision_views[model.container().uid, 5]
    aged = replace(view, revision=view.revision.model_copy(update={"create_time": LONG_AGO}))
    model.store.revision_views[model.container().uid, 5] = aged
    await model.run_ok(Scale("a", cpus=4.0))
    # What replaced the fourth is old; what replaced the fifth is not.
    assert revisions() == [5, 6, 7]
    for_ever = RevisionPolicy(keep_for=timedelta(days=365_00))
    await model.run_ok(Update("a", FieldChange("revision_policy", for_ever)))
    assert revisions() == [5, 6, 7, 8]


async def test_revisions_that_there_are_not_and_that_are_current(model: ModelNode) -> None:
    for cpus in range(1, 13):
        await model.run_ok(Scale("a", cpus=float(cpus)))
    for command in (Rollback("a", 99), DeleteRevision("a", 99), Clone("b", "a", LABEL_CHANGE, revision=99)):
        refused = await refusal(model, command)
        assert refused.reason == "REVISION_NOT_FOUND"
        assert refused.metadata == {
            "container": "a",
            "revision": "99",
            "available": "13,12,11,10,9,8,7,6,5,4",
        }
    current = await refusal(model, DeleteRevision("a", 13))
    assert (current.reason, current.metadata) == ("REVISION_IS_CURRENT", {"container": "a", "revision": "13"})
    container, view = await model.containers.revision("a", 0)
    assert (container, view.revision.revision) == (model.container(), 13)
    assert (await model.containers.revision("a", 2))[1].revision.spec.cpus == 1.0
    page = await model.containers.revisions(container.uid, page_size=2, page_token="")
    assert [one.revision.revision for one in page.items] == [1, 2]


async def test_files_that_were_not_kept_cannot_be_brought_back(model: ModelNode) -> None:
    await model.run_ok(Scale("a", gpus=THREE_GPUS, snapshots=SnapshotPolicy.NEVER))
    for command in (Rollback("a", 1), Clone("b", "a", LABEL_CHANGE, revision=1)):
        refused = await refusal(model, command)
        assert (refused.reason, refused.metadata) == ("SNAPSHOT_NOT_FOUND", {"container": "a", "revision": "1"})
    await preview(model, Rollback("a", 1, spec_only=True))


async def test_an_image_that_the_engine_has_no_more_is_pulled_again_where_it_can_be() -> None:
    model = ModelNode()
    await model.create_container(spec=SPEC.changed(image=REMOTE_IMAGE))
    await model.run_ok(Update("a", FieldChange("image", OTHER_IMAGE), files=FilesPolicy.DISCARD))
    image_id = model.engine.tags.pop(REMOTE_IMAGE)
    image = model.engine.images.pop(image_id)
    operation = await preview(model, Rollback("a", 1))
    assert operation.stages[0].name == "pull"
    (warning,) = [one for one in operation.plan.warnings if "will be pulled" in one]
    assert image_id in warning
    assert (await refusal(model, Clone("b", "a", LABEL_CHANGE, revision=1))).reason == "IMAGE_NOT_FOUND"
    done = await model.run_ok(Rollback("a", 1))
    assert done.facts("pull") == {"image_id": image.id}
    # The name leads to another image by now.
    await model.run_ok(Update("a", FieldChange("image", OTHER_IMAGE), files=FilesPolicy.DISCARD))
    model.engine.tags.pop(REMOTE_IMAGE)
    model.engine.images.pop(image_id)
    model.engine.registry[REMOTE_IMAGE] = replace(image, id="sha256:moved")
    failed = await model.run(Rollback("a", 1))
    assert failed.error is not None
    assert failed.error.reason == "IMAGE_DIFFERS"
    assert failed.error.metadata == {
        "container": "a",
        "image": REMOTE_IMAGE,
        "image_id": "sha256:moved",
        "current_image_id": image_id,
    }


async def test_an_image_of_carried_files_is_in_no_registry() -> None:
    model = ModelNode()
    await scaled_container_with_image_snapshot(model)
    await model.run_ok(Update("a", FieldChange("image", OTHER_IMAGE), files=FilesPolicy.DISCARD))
    kept = model.store.revision_views[model.container().uid, 1].snapshot
    assert kept is not None
    del model.engine.tags[kept.reference], model.engine.images[kept.image_id]
    refused = await refusal(model, Rollback("a", 1))
    assert (refused.reason, refused.metadata) == ("IMAGE_NOT_FOUND", {"image": f"{IMAGE} ({kept.image_id})"})


async def test_another_image_needs_a_word_on_the_files(model: ModelNode) -> None:
    refused = await refusal(model, Update("a", FieldChange("image", OTHER_IMAGE)))
    assert refused.reason == "IMAGE_DIFFERS"
    assert refused.metadata == {
        "container": "a",
        "image": OTHER_IMAGE,
        "image_id": model.engine.tags[OTHER_IMAGE],
        "current_image_id": model.engine.tags[IMAGE],
    }
    # It is not pulled for that.
    assert (await refusal(model, Update("a", FieldChange("image", REMOTE_IMAGE)))).reason == "IMAGE_NOT_FOUND"
    # Another name of the same image is none.
    model.engine.tags["busybox:1"] = model.engine.tags[IMAGE]
    assert (await preview(model, Update("a", FieldChange("image", "busybox:1")))).plan.snapshot is not None
    await model.run_ok(Update("a", FieldChange("image", OTHER_IMAGE), files=FilesPolicy.DISCARD))
    back = await refusal(model, Rollback("a", 1, spec_only=True))
    assert back.reason == "IMAGE_DIFFERS"
    assert back.metadata["image_id"] == model.engine.tags[IMAGE]


@pytest.mark.parametrize("policy", PullPolicy)
@pytest.mark.parametrize("there", [True, False])
async def test_when_an_image_is_pulled(policy: PullPolicy, *, there: bool) -> None:
    model = ModelNode()
    command = Create("a", ContainerSpec(image=IMAGE if there else REMOTE_IMAGE), pull_policy=policy)
    if policy is PullPolicy.NEVER and not there:
        assert (await refusal(model, command)).metadata == {"image": REMOTE_IMAGE}
        return
    names = [stage.name for stage in (await preview(model, command)).stages]
    assert ("pull" in names) is (policy is PullPolicy.ALWAYS or not there)


async def test_an_image_that_was_pulled_with_credentials_is_for_those_who_showed_some() -> None:
    model = ModelNode()
    model.configure(images=ImagePolicy(verify_access=True))
    image_id = model.engine.tags[IMAGE]
    model.store.origins["gpu1", image_id] = ImageOrigin(
        node="gpu1", image_id=image_id, restricted=True, owners=("alice",), update_time=LONG_AGO
    )
    spec = ContainerSpec(image=IMAGE)
    await model.run_ok(Create("a", spec, owner="alice", pull_policy=PullPolicy.NEVER))
    never = Create("b", spec, owner="bob", pull_policy=PullPolicy.NEVER)
    assert (await refusal(model, never)).reason == "IMAGE_NOT_FOUND"
    assert (await preview(model, Create("b", spec, owner="bob"))).stages[0].name == "pull"
    clone = Clone("b", "a", LABEL_CHANGE, owner="bob")
    assert (await refusal(model, clone)).metadata == {"image": IMAGE}
    await preview(model, Clone("b", "a", LABEL_CHANGE))
    model.configure(images=ImagePolicy())
    await preview(model, never)


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


async def test_a_commit_takes_no_name_that_is_somebody_elses(model: ModelNode) -> None:
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


async def test_volumes_that_cannot_be_mounted(model: ModelNode) -> None:
    missing = await refusal(model, Create("b", SPEC_WITH_DATA))
    assert missing.metadata == {"volume": "data", "available": ""}
    await model.run_ok(volume_commands.Create("date", size_bytes=MIB))
    assert (await refusal(model, Create("b", SPEC_WITH_DATA))).metadata["available"] == "date"
    await model.run_ok(volume_commands.Create("data", size_bytes=MIB))
    model.store.locks[ResourceKind.VOLUME, "data"] = "other"
    busy = await refusal(model, Create("b", SPEC_WITH_DATA))
    assert (busy.reason, busy.metadata) == ("VOLUME_BUSY", {"volume": "data", "operation_id": "other"})
    model.store.locks.clear()
    head = model.store.volume_records["data"]
    model.store.volume_records["data"] = Versioned(head.value.changed(state=VolumeState.DELETING), head.version)
    failed = await refusal(model, Create("b", SPEC_WITH_DATA))
    assert (failed.reason, failed.metadata["volume"], failed.metadata["call"]) == ("VOLUME_FAILED", "data", "mount")
    model.store.volume_records["data"] = Versioned(head.value.changed(node="far"), head.version)
    model.store.node_records = [node_record("far", "f:1")]
    elsewhere = await refusal(model, Create("b", SPEC_WITH_DATA))
    assert (elsewhere.metadata["node"], elsewhere.metadata["address"]) == ("far", "f:1")


async def test_a_volume_that_is_another_one_than_before_is_not_mounted_in_its_place() -> None:
    model = ModelNode()
    await mounted_volume(model)
    head = model.store.volume_records["data"]
    backing = head.value.backing
    assert backing is not None
    other = head.value.changed(backing=backing.model_copy(update={"engine_volume": "another"}))
    model.store.volume_records["data"] = Versioned(other, head.version)
    refused = await refusal(model, Scale("a", gpus=THREE_GPUS))
    assert refused.reason == "VOLUME_DIFFERS"
    assert refused.metadata == {
        "container": "a",
        "volume": "data",
        "engine_volume": backing.engine_volume,
        "recorded_engine_volume": "another",
    }
    await preview(model, Update("a", FieldChange("mounts", ())))
    await preview(model, Scale("a", cpus=1.0))


async def test_a_volume_that_is_to_be_mounted_is_locked_by_an_update(model: ModelNode) -> None:
    await model.run_ok(volume_commands.Create("data", size_bytes=MIB))
    operation = await model.run_ok(Update("a", FieldChange("mounts", (DATA_MOUNT,))))
    assert operation.locks == (model.volume().target,)
    again = await model.run_ok(Update("a", FieldChange("env", {"A": "1"})))
    assert again.locks == ()
    assert model.engine_container().volumes["/data"] == model.engine.created_specs[model.engine_id()].mounted["data"]


async def test_an_engine_volume_that_was_removed_is_made_again_where_its_files_are_gpudocks() -> None:
    model = ModelNode()
    await mounted_volume(model)
    await model.run_ok(Stop("a"))
    backing = model.volume().backing
    assert backing is not None
    removed = model.engine.volumes.pop(backing.engine_volume)
    await model.run_ok(Start("a", gpus=THREE_GPUS))
    assert model.engine.volumes[backing.engine_volume] == removed


async def test_what_mounts_a_host_path() -> None:
    model = ModelNode()
    spec = SPEC.changed(mounts=(Mount(host_path="/data/x", target="/x"),))
    await model.create_container(spec=spec)
    name = model.engine_container().name
    assert model.engine_container().binds == {"/x": f"/bound/{name}/data/x"}
    assert model.host_paths.renewed == [True, True]
    model.host_paths.renewed.clear()
    await model.run_ok(Stop("a"))
    await model.run_ok(Start("a"))
    assert model.host_paths.renewed == [True]
    # One that an older version made mounts it by its own name, and is given a successor at its next start.
    await model.run_ok(Stop("a"))
    engine_id = model.engine_id()
    model.engine.containers[engine_id] = replace(model.engine.containers[engine_id], binds={"/x": "/data/x"})
    assert (await preview(model, Start("a"))).plan.carry_method is LayerTransferMethod.EXCHANGE
    await model.run_ok(Start("a"))
    assert model.engine_container().binds == {"/x": f"/bound/{model.engine_container().name}/data/x"}


def test_defaults_of_the_history() -> None:
    assert HistoryDefaults() == HistoryDefaults(SnapshotPolicy.ALWAYS, 20, 0.0, on_stop=False)
