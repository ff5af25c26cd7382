"""Drafts of changes of containers: snapshots, the history of revisions, and images."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from gpudock_server.core.containers.commands import (
    Clone,
    Create,
    DeleteRevision,
    FieldChange,
    FilesPolicy,
    PullPolicy,
    Rollback,
    Scale,
    Update,
)
from gpudock_server.core.containers.history import HistoryDefaults
from gpudock_server.core.containers.images import ImagePolicy
from gpudock_server.model.image import ImageOrigin
from gpudock_server.model.operation import OperationState
from gpudock_server.model.snapshot import SnapshotKind, SnapshotMethod
from gpudock_server.model.spec import ContainerSpec, RevisionPolicy, SnapshotPolicy
from gpudock_server.ports import SnapshotPlan

from tests.rpc.fakes import LONG_AGO
from tests.unit.drafts import preview, refusal
from tests.unit.model_engine import IMAGE, OTHER_IMAGE, REMOTE_IMAGE
from tests.unit.model_node import SPEC, ModelNode
from tests.unit.scenario_setups import (
    scaled_container_with_image_snapshot,
)
from tests.unit.scenarios import LABEL_CHANGE, THREE_GPUS


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
    unlimited = RevisionPolicy(keep_for=timedelta(days=365_00))
    await model.run_ok(Update("a", FieldChange("revision_policy", unlimited)))
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
    # The name belongs to another image now.
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


def test_defaults_of_the_history() -> None:
    assert HistoryDefaults() == HistoryDefaults(SnapshotPolicy.ALWAYS, 20, 0.0, on_stop=False)
