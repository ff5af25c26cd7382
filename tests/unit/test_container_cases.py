"""Cases of operations on a container that no scenario has: what is created only, left behind, or ends meanwhile."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from gpudock_server.core.containers import engine_containers, images, status
from gpudock_server.core.containers.commands import (
    Clone,
    Command,
    Commit,
    Create,
    Delete,
    FieldChange,
    FilesPolicy,
    Pause,
    Restart,
    Scale,
    Start,
    Stop,
    Update,
)
from gpudock_server.core.containers.images import ImagePolicy
from gpudock_server.core.operations.saga import OperationDraft
from gpudock_server.core.volumes.engine_volumes import identity_of
from gpudock_server.errors import ContainerExists, ContainerNotRunning, EngineRejected, ImageExists, ImageNameForbidden
from gpudock_server.model.container import ContainerState
from gpudock_server.model.engine import LABEL_VOLUME, EngineState, EngineVolume, RegistryAuth
from gpudock_server.model.operation import OperationState
from gpudock_server.model.record import now
from gpudock_server.model.snapshot import SnapshotKey, SnapshotMethod
from gpudock_server.model.spec import ContainerSpec, GpuRequest, Mount
from gpudock_server.model.volume import VolumeIdentity
from gpudock_server.ports import CommitCost, Progress

from tests.rig.patience import limit
from tests.unit.model_engine import OTHER_IMAGE, REMOTE_IMAGE
from tests.unit.model_node import SPEC, TIMEOUT_SECONDS, ModelNode
from tests.unit.scenario_checks import FILES_OF_A
from tests.unit.scenarios import LABEL_CHANGE, THREE_GPUS

REJECTED = EngineRejected(call="work", status=500, detail="no")


pytestmark = pytest.mark.usefixtures("no_backoff")


# -- clones and commits ----------------------------------------------------------------------------------------------


async def test_a_clone_that_is_created_only_does_not_run(model: ModelNode) -> None:
    operation = await model.run_ok(Clone("b", "a", LABEL_CHANGE, create_only=True))
    assert [stage.name for stage in operation.stages] == ["create", "gather", "complete", "commit"]
    assert model.container("b").status.state is ContainerState.STOPPED
    assert model.engine_container("b").state is EngineState.CREATED
    assert model.files("b") == FILES_OF_A
    assert len(model.claims("b")) == 3


async def test_a_clone_of_what_another_operation_has_changed_is_planned_again(model: ModelNode) -> None:
    drafts = 0

    async def drafted() -> OperationDraft:
        nonlocal drafts
        drafts += 1
        draft = await model.containers.draft(Clone("b", "a", LABEL_CHANGE))
        if drafts == 1:
            model.store.put(model.container())
        return draft

    await model.ended_operation(await model.operations.begin(drafted, None))
    assert drafts == 2
    assert model.files("b") == FILES_OF_A


async def test_a_source_that_ends_while_it_is_cloned_is_shown_as_ended(model: ModelNode) -> None:
    start, source = model.engine.start, model.engine_id()

    async def and_end_the_source(engine_id: str) -> None:
        await start(engine_id)
        model.engine.containers[source] = replace(
            model.engine.containers[source], state=EngineState.EXITED, exit_code=7, pid=0
        )

    model.engine.start = and_end_the_source  # type: ignore[method-assign]  # this call alone differs
    before = model.container()
    await model.run_ok(Clone("b", "a", LABEL_CHANGE))
    assert (model.container().status.state, model.container().status.exit_code) == (ContainerState.EXITED, 7)
    assert model.container().update_time > before.update_time


async def test_a_plan_for_a_name_that_is_taken_is_refused(model: ModelNode) -> None:
    await model.create_container("b")
    for command in (Clone("b", "a", LABEL_CHANGE), Create("b", SPEC)):
        with pytest.raises(ContainerExists) as refused:
            await model.containers.preview(command)
        assert refused.value.container == "b"


async def test_a_clone_of_what_is_gone_names_what_it_would_be_made_of(model: ModelNode) -> None:
    model.engine.containers.clear()
    with pytest.raises(ContainerNotRunning) as refused:
        await model.begin(Clone("b", "a", LABEL_CHANGE))
    assert refused.value.metadata == {
        "container": "a",
        "state": "RUNNING",
        "needs": "its current files are lost; clone one of its revisions",
    }


@pytest.mark.parametrize("lost", ["source", "shadow"])
async def test_a_commit_whose_containers_vanish_says_which(model: ModelNode, lost: str) -> None:
    create_file_holder = model.engine.create_file_holder
    gone: list[str] = []

    async def and_lose_one(of: str, name: str, labels: Any) -> str:
        shadow_id = await create_file_holder(of, name, labels)
        gone.append(of if lost == "source" else shadow_id)
        del model.engine.containers[gone[0]]
        return shadow_id

    model.engine.create_file_holder = and_lose_one  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(Commit("a", "team/model:v1"))
    assert operation.error is not None
    assert operation.error.reason == "SNAPSHOT_FAILED"
    assert operation.error.metadata == {"detail": f"engine container {gone[0][:12]} was removed during the operation"}


async def test_a_commit_tells_how_much_it_writes(model: ModelNode) -> None:
    operation = await model.run_ok(Commit("a", "team/model:v1"))
    stages = {stage.name: stage for stage in operation.stages}
    # What ModelLayers says that it is.
    assert (stages["commit-files"].current_bytes, stages["commit-files"].total_bytes) == (10, 10)


async def test_a_name_that_is_taken_is_refused_with_what_can_be_done(model: ModelNode) -> None:
    own = "it was not committed without an owner under this name"
    for command, rest in (
        (Commit("a", OTHER_IMAGE), "; use another name, or set `replace` if the setting commit_replace allows it"),
        (Commit("a", OTHER_IMAGE, replace=True), "; use another name; the setting commit_replace forbids `replace`"),
    ):
        with pytest.raises(ImageExists) as refused:
            await model.begin(command)
        assert refused.value.detail.startswith(own + rest)


async def test_an_image_that_a_commit_replaced_has_its_name_again_when_the_commit_is_undone(model: ModelNode) -> None:
    model.configure(images=ImagePolicy(replace_any=True))
    command = Commit("a", OTHER_IMAGE, replace=True)
    before, tag = model.summary(), model.engine.tag

    async def and_fail(image: str, reference: str) -> None:
        await tag(image, reference)
        model.engine.tag = tag  # type: ignore[method-assign]  # this call alone differs
        raise REJECTED

    model.engine.tag = and_fail  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(command)
    assert operation.state is OperationState.FAILED
    assert model.summary() == before
    await model.run_ok(command)
    assert model.engine.images[model.engine.tags[OTHER_IMAGE]].files == FILES_OF_A


async def test_a_repository_of_a_registry_with_a_port_can_be_allowed(model: ModelNode) -> None:
    model.configure(images=ImagePolicy(repositories=("registry.example:5000/team",)))
    await model.run_ok(Commit("a", "registry.example:5000/team/model:v1"))
    for other in ("registry.example:5000/other:v1", "registry.example:v1"):
        with pytest.raises(ImageNameForbidden) as refused:
            await model.begin(Commit("a", other))
        assert refused.value.repository == other.rpartition(":")[0]


async def test_holes_of_which_an_image_takes_little_are_not_worth_a_word(model: ModelNode) -> None:
    few = 16 << 20
    for holes, warnings in ((few, 0), (few + 1, 1)):
        model.layers.cost = CommitCost(
            measured=True, apparent_bytes=100 + holes, allocated_bytes=100, entries=1, bytes_available=1 << 30
        )
        assert len((await model.containers.preview(Commit("a", "team/model:v1"))).plan.warnings) == warnings


# -- pulls -----------------------------------------------------------------------------------------------------------


async def test_an_update_says_itself_how_long_its_pull_may_stand_still(model: ModelNode) -> None:
    async def stuck(*_: object) -> None:
        await asyncio.Event().wait()

    model.engine.pull = stuck  # type: ignore[method-assign, assignment]
    change = FieldChange("image", REMOTE_IMAGE)
    operation = await model.run(Update("a", change, files=FilesPolicy.DISCARD, pull_stall_seconds=0.1))
    assert operation.error is not None
    assert operation.error.reason == "IMAGE_PULL_FAILED"
    assert operation.error.metadata["detail"].startswith("no progress for 0.1 s")


async def test_a_pull_that_moves_again_says_no_more_that_it_stood_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_STALL_NOTICE_SECONDS", 0.02)
    model = ModelNode()
    pull, messages = model.engine.pull, list[str]()

    def message() -> str:
        (running,) = model.operations._running.values()
        return running.view.message

    async def slow(reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
        while not message():
            await asyncio.sleep(0.001)
        messages.append(message())
        progress(1, 2)
        messages.append(message())
        await pull(reference, auth, progress)

    model.engine.pull = slow  # type: ignore[method-assign]  # this call alone differs
    await model.run_ok(Create("a", ContainerSpec(image=REMOTE_IMAGE), pull_stall_seconds=TIMEOUT_SECONDS))
    stalled, moving = messages
    assert stalled.startswith("pull stalled since")
    assert moving == ""


async def test_an_image_that_came_with_a_pull_that_failed_at_its_end_is_for_no_owner() -> None:
    model = ModelNode()
    pull = model.engine.pull

    async def and_fail(reference: str, auth: RegistryAuth | None, progress: Progress) -> None:
        await pull(reference, auth, progress)
        raise REJECTED

    model.engine.pull = and_fail  # type: ignore[method-assign]  # this call alone differs
    auth = RegistryAuth(identity_token="t")  # noqa: S106 - of nothing
    operation = await model.run(Create("a", ContainerSpec(image=REMOTE_IMAGE), owner="alice", registry_auth=auth))
    assert operation.state is OperationState.FAILED
    origin = model.store.origins["gpu1", "sha256:remote"]
    assert (origin.restricted, origin.owners) == (True, ())


# -- what is kept of files -------------------------------------------------------------------------------------------


async def test_files_are_shared_with_the_latest_revision_of_which_a_tree_was_kept(model: ModelNode) -> None:
    gather, shared = model.snapshots.gather, list[int]()

    async def noted(old: Any, key: Any, operation_id: str, previous: SnapshotKey | None, progress: Any) -> None:
        shared.append(previous.revision if previous else 0)
        await gather(old, key, operation_id, previous, progress)

    model.snapshots.gather = noted  # type: ignore[method-assign]  # this call alone differs
    for cpus in (1.0, 2.0):
        await model.run_ok(Scale("a", cpus=cpus))
    assert shared == [0, 1]
    model.snapshots.method_result = (None, "no")
    await model.run_ok(Scale("a", cpus=3.0))
    model.snapshots.method_result = (SnapshotMethod.LINK, "")
    # An image was kept of the third.
    await model.run_ok(Scale("a", cpus=4.0))
    assert shared == [0, 1, 2]
    model.configure_history(on_stop=True)
    await model.run_ok(Stop("a"))
    assert shared == [0, 1, 2, 4]


async def test_images_that_were_kept_of_revisions_go_with_their_container(model: ModelNode) -> None:
    model.snapshots.method_result = (None, "no such filesystem")
    await model.run_ok(Scale("a", cpus=1.5))
    assert [name for name in model.engine.tags if name.startswith("gpudock/")]
    await model.run_ok(Delete("a", force=True))
    assert not [name for name in model.engine.tags if name.startswith("gpudock/")]


async def test_files_go_back_from_a_successor_that_was_started_outside_gpudock(model: ModelNode) -> None:
    before, old = model.summary(), model.engine_id()
    halt = model.engine.stop

    async def refused(*_: object) -> int | None:
        raise REJECTED

    async def and_start_it_again(engine_id: str, timeout: float) -> None:
        await halt(engine_id, timeout)
        if engine_id != old and model.engine.stop is not halt:
            model.engine.stop = halt  # type: ignore[method-assign]  # this call alone differs
            model.engine._set(engine_id, EngineState.RUNNING)

    model.engine.exited_within = refused  # type: ignore[method-assign, assignment]
    model.engine.stop = and_start_it_again  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(Scale("a", gpus=THREE_GPUS))
    assert model.engine.stop is halt
    assert operation.state is OperationState.FAILED
    assert model.summary() == before


# -- mounts ----------------------------------------------------------------------------------------------------------


async def test_what_runs_again_after_a_failure_has_the_host_paths_that_it_had(model: ModelNode) -> None:
    await model.create_container("b", SPEC.changed(mounts=(Mount(host_path="/data/x", target="/x"),)))

    async def refused(*_: object) -> int | None:
        raise REJECTED

    model.engine.exited_within = refused  # type: ignore[method-assign, assignment]
    model.host_paths.renewed.clear()
    assert (await model.run(Scale("b", gpus=GpuRequest(count=1)))).state is OperationState.FAILED
    # Those of the successor at its creation and its start; and then those of the old one as they were.
    assert model.host_paths.renewed == [True, True, False]


def test_what_an_engine_volume_says_of_its_volume() -> None:
    identity = VolumeIdentity(node="gpu1", owner="o", labels={"k": "v"}, create_time=now())
    found = EngineVolume(name="x", driver="local", labels={LABEL_VOLUME: identity.model_dump_json()})
    assert identity_of(found) == identity
    for labels in ({}, {LABEL_VOLUME: ""}, {LABEL_VOLUME: "what is this"}):
        assert identity_of(found.model_copy(update={"labels": labels})) is None


# -- what happens meanwhile ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "call"),
    [(Scale("a", gpus=THREE_GPUS), "create"), (Pause("a"), "pause"), (Restart("a"), "stop"), (Stop("a"), "stop")],
    ids=lambda one: str(one)[:10],
)
async def test_what_has_failed_was_looked_at_when_it_did(model: ModelNode, command: Command, call: str) -> None:
    async def refused(*_: object, **__: object) -> None:
        raise REJECTED

    before = model.container()
    setattr(model.engine, call, refused)
    operation = await model.run(command)
    assert operation.state is OperationState.FAILED
    assert model.container().status == before.status
    assert model.container().update_time > before.update_time


async def test_a_restart_that_fails_leaves_the_process_that_it_started(model: ModelNode) -> None:
    async def refused(*_: object) -> int | None:
        raise REJECTED

    model.engine.exited_within = refused  # type: ignore[method-assign, assignment]
    assert (await model.run(Restart("a"))).state is OperationState.FAILED
    assert model.engine_container().state is EngineState.RUNNING
    assert model.engine.stop_timeouts == [10]


async def test_how_long_a_stop_waits_is_said_by_the_call_then_the_container_then_the_node(model: ModelNode) -> None:
    await model.run_ok(Stop("a"))
    await model.run_ok(Start("a"))
    spec = model.container().spec.changed(stop_timeout=timedelta(seconds=6))
    model.store.put(model.container().changed(spec=spec))
    await model.run_ok(Stop("a"))
    await model.run_ok(Start("a"))
    await model.run_ok(Stop("a", timeout=4))
    assert model.engine.stop_timeouts == [10, 6, 4]


@pytest.mark.parametrize("settles", [False, True], ids=["at once", "in a moment"])
async def test_a_process_that_its_restart_policy_has_started_again_has_ended(
    model: ModelNode, monkeypatch: pytest.MonkeyPatch, *, settles: bool
) -> None:
    monkeypatch.setattr(engine_containers, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(status, "RESTART_SETTLE_TIME", timedelta(seconds=TIMEOUT_SECONDS))
    looks = 0
    start, inspect = model.engine.start, model.engine.inspect

    async def in_a_loop(engine_id: str) -> None:
        await start(engine_id)
        seen = model.engine.containers[engine_id]
        model.engine.containers[engine_id] = replace(
            seen,
            state=EngineState.RUNNING if settles else EngineState.RESTARTING,
            exit_code=0 if settles else 3,
            restart_count=1,
            start_time=now(),
        )

    async def has_not_ended(_engine_id: str, _seconds: float) -> int | None:
        return None

    async def which_ends(engine_id: str) -> object:
        nonlocal looks
        seen = model.engine.containers.get(engine_id)
        if seen is not None and seen.state is EngineState.RUNNING and seen.restart_count:
            looks += 1
            if looks == 3:
                model.engine.containers[engine_id] = replace(seen, state=EngineState.RESTARTING, exit_code=3)
        return await inspect(engine_id)

    model.engine.start = in_a_loop  # type: ignore[method-assign]  # this call alone differs
    model.engine.exited_within = has_not_ended  # type: ignore[method-assign, assignment]
    if settles:
        model.engine.inspect = which_ends  # type: ignore[method-assign, assignment]
    operation = await model.run_ok(Restart("a"))
    assert operation.facts("verify") == {"exit_code": 3}
    assert looks == (3 if settles else 0)
    assert model.container().status.state is ContainerState.RESTARTING


async def test_a_container_started_outside_gpudock_is_stopped_with_a_reason(model: ModelNode) -> None:
    await model.run_ok(Stop("a"))
    view = await model.store.container("a")
    assert view is not None
    model.engine._set(model.engine_id(), EngineState.RUNNING)
    draft = model.core.container_use_cases.stop.draft_enforced(
        view, model.engine_container(), "its GPUs are held by another container"
    )

    async def drafted() -> OperationDraft:
        return draft

    operation = await model.ended_operation(await model.operations.begin(drafted, None))
    assert operation.state is OperationState.SUCCEEDED
    assert model.engine_container().state is EngineState.EXITED
    status = model.container().status
    assert (status.state, status.message) == (ContainerState.STOPPED, "its GPUs are held by another container")
    assert not model.claims()


async def test_what_is_left_of_a_deleted_container_does_not_keep_its_name(model: ModelNode) -> None:
    left = model.engine_container()
    await model.run_ok(Delete("a", force=True))
    model.engine.containers[left.id] = replace(left, state=EngineState.EXITED)
    model.engine.layer_of[left.id] = 0
    model.engine.layers[0] = frozenset()
    await model.run_ok(Create("a", SPEC))
    assert model.engine_id() != left.id


async def test_what_is_left_of_a_creation_that_was_undone_does_not_keep_its_name(model: ModelNode) -> None:
    left, made = model.engine_container(), model.store.journal[model.last_operation_id]
    model.store.journal[model.last_operation_id] = replace(made, value=made.value.changed(state=OperationState.FAILED))
    del model.store.container_records["a"]
    model.engine.containers[left.id] = replace(left, state=EngineState.EXITED)
    await model.run_ok(Create("a", SPEC))
    assert model.engine_id() != left.id


async def test_another_container_of_the_name_is_none_of_an_operations(model: ModelNode) -> None:
    pause, other = model.engine.pause, model.container().changed(uid="1b4e28ba-2fa1-41d2-883f-0016d3cca427")

    async def meanwhile(engine_id: str) -> None:
        await pause(engine_id)
        model.store.put(other)

    model.engine.pause = meanwhile  # type: ignore[method-assign]  # this call alone differs
    operation = await model.run(Pause("a"))
    assert (operation.state, operation.committed) == (OperationState.RUNNING, False)
    assert model.container() == other


async def test_a_stop_that_is_left_and_fails_afterwards_is_no_error_of_the_daemons(model: ModelNode) -> None:
    stopping, gate = asyncio.Event(), asyncio.Event()
    unheard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))

    async def slow(*_: object) -> None:
        stopping.set()
        await gate.wait()
        raise REJECTED

    model.engine.stop = slow  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(model.core.engine_containers.stop(model.engine_id(), SPEC, None, frozen=False))
    async with asyncio.timeout(limit(TIMEOUT_SECONDS)):
        await stopping.wait()
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done(), "it waits for the end, which comes all the same"
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    del task
    gc.collect()
    assert not unheard
