"""Revisions: every change makes one, and a rollback restores its spec and its files."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from gpudock.v1 import container_pb2, container_revision_pb2, container_service_pb2

from tests.calls import IMAGE, Caller, failure, progress_of, result_of, scale_request, update_request
from tests.conftest import FAST_FLAGS, own_state_flags
from tests.engine.isolated_daemons import until_state
from tests.faults.invariants import SHOW_FILES, WRITE_FILES, layer_images, require_consistent
from tests.rig import GLIBC, Rig
from tests.rig.patience import limit

NEVER = container_pb2.SNAPSHOT_POLICY_NEVER
CHEAP = container_pb2.SNAPSHOT_POLICY_CHEAP
TREE = container_revision_pb2.SNAPSHOT_KIND_TREE
PORT = container_pb2.PortRequest(container_port=80)


async def _files(caller: Caller, name: str) -> str:
    return await caller.shell(name, SHOW_FILES)


async def test_a_rollback_restores_the_spec_and_the_files_of_every_revision(caller: Caller, rig: Rig) -> None:
    await caller.create("past", 1, ports=[PORT])
    await caller.shell("past", WRITE_FILES)
    first = await _files(caller, "past")
    await caller.scale("past", 2)
    assert await _files(caller, "past") == first
    await caller.shell(
        "past", "echo changed > /work/file; rm -r /work/deep; mkdir /work/deep; echo new > /work/deep/data"
    )
    second = await _files(caller, "past")
    assert second != first
    await caller.scale("past", 3)
    await caller.shell("past", "rm -rf /work")

    rolled_back = await caller.rollback("past", 1)
    assert (rolled_back.revision, rolled_back.spec.gpus.count) == (4, 1)
    assert await _files(caller, "past") == first, "the files as they were when revision 2 replaced revision 1"
    await require_consistent(caller, rig, "past", first)

    second_rollback = await caller.rollback("past", 2)
    assert (second_rollback.revision, second_rollback.spec.gpus.count) == (5, 2)
    assert await _files(caller, "past") == second
    # Revision 3, which the first rollback replaced, had no /work any more.
    third_rollback = await caller.rollback("past", 3)
    assert third_rollback.spec.gpus.count == 3
    assert await caller.shell("past", "ls -d /work 2>/dev/null || echo gone") == "gone\n"

    causes = [revision.cause for revision in await caller.revisions("past")]
    name_of = container_revision_pb2.RevisionCause.Name
    assert [name_of(cause).removeprefix("REVISION_CAUSE_") for cause in causes] == [
        "CREATED", "SCALED", "SCALED", "ROLLED_BACK", "ROLLED_BACK", "ROLLED_BACK",
    ]  # fmt: skip
    history = await caller.revisions("past")
    assert [revision.current for revision in history] == [False] * 5 + [True]
    assert all(revision.snapshot.kind == TREE and revision.layer_bytes > 0 for revision in history[:-1])
    assert not history[-1].HasField("snapshot")
    assert all(revision.operation_id and revision.image_id.startswith("sha256:") for revision in history)


async def test_unchanged_files_are_shared_between_snapshots(caller: Caller) -> None:
    await caller.create("big", 1, image=GLIBC)
    await caller.shell("big", "dd if=/dev/urandom of=/big bs=1M count=40 2>/dev/null")
    await caller.scale("big", 2)
    await caller.shell("big", "echo small > /small")
    await caller.scale("big", 1)
    first, second, _ = await caller.revisions("big")
    assert first.snapshot.new_bytes >= 40 << 20
    assert second.layer_bytes >= 40 << 20
    assert second.snapshot.new_bytes < 4 << 20, "40 MiB of unchanged files are shared with the snapshot before"


@pytest.mark.deep
async def test_a_rollback_claims_no_gpu_that_another_container_holds(caller: Caller, rig: Rig) -> None:
    gpus = list((await caller.create("first", 2)).status.gpu_uuids)
    await caller.scale("first", 0)
    other_gpus = [list((await caller.create(f"other{number}", 2)).status.gpu_uuids) for number in range(3)]
    assert set(gpus) <= {uuid for uuids in other_gpus for uuid in uuids}
    rolled_back = await caller.rollback("first", 1)
    assert len(rolled_back.status.gpu_uuids) == 2
    assert not set(rolled_back.status.gpu_uuids) & {uuid for uuids in other_gpus for uuid in uuids}
    await require_consistent(caller, rig, "first")
    # Without a free GPU it is refused, and changes nothing.
    await caller.scale("first", 0)
    await caller.create("last", 2)
    refused = await failure(result_of(_rollback(caller, "first", 1)))
    assert refused.reason == "GPU_EXHAUSTED"
    assert (await caller.get("first")).spec.gpus.count == 0


def _rollback(caller: Caller, name: str, revision: int, **fields: Any) -> Any:
    request = container_service_pb2.RollbackContainerRequest(name=name, revision=revision, **fields)
    return caller.containers.RollbackContainer(request)


async def test_a_revision_without_a_snapshot_can_be_restored_with_spec_only(caller: Caller, rig: Rig) -> None:
    await caller.create("plain", 1, env={"A": "1"})
    await caller.shell("plain", "echo first > /note")
    await caller.update("plain", env={"A": "2"}, snapshots=NEVER)
    await caller.shell("plain", "echo second > /note")
    first, _ = await caller.revisions("plain")
    assert not first.HasField("snapshot")
    refused = await failure(result_of(_rollback(caller, "plain", 1)))
    assert (refused.reason, refused.metadata["revision"]) == ("SNAPSHOT_NOT_FOUND", "1")
    rolled_back = await caller.rollback("plain", 1, spec_only=True)
    assert rolled_back.spec.env == {"A": "1"}
    assert await caller.shell("plain", "cat /note; echo $A") == "second\n1\n"
    refused = await failure(result_of(_rollback(caller, "plain", 9)))
    assert (refused.reason, refused.metadata["available"]) == ("REVISION_NOT_FOUND", "3,2,1")
    # A rollback to the current revision changes nothing.
    same = await progress_of(_rollback(caller, "plain", 3))
    assert same.result is not None
    assert same.result.revision == 3
    await require_consistent(caller, rig, "plain")


async def test_a_plan_says_how_a_snapshot_is_made(caller: Caller) -> None:
    await caller.create("planned", 1)
    kept = await progress_of(caller.containers.ScaleContainer(scale_request("planned", 2, validate_only=True)))
    plan = kept.snapshots[-1].plan
    assert plan.snapshot == TREE
    stages = [stage for stage in plan.stages if stage in ("gather", "stop", "complete", "start", "seal")]
    assert stages == ["gather", "stop", "complete", "start", "seal"], (
        "only the difference is copied while the container is stopped"
    )
    request = scale_request("planned", 2, validate_only=True, snapshots=NEVER)
    plan = (await progress_of(caller.containers.ScaleContainer(request))).snapshots[-1].plan
    assert not plan.HasField("snapshot")
    assert any("spec only" in warning for warning in plan.warnings)
    assert [revision.revision for revision in await caller.revisions("planned")] == [1]


async def test_changes_in_place_make_snapshots_without_a_stop(caller: Caller) -> None:
    created = await caller.create("still", 1, image=GLIBC)
    await caller.shell("still", "echo first > /note")
    process = await caller.shell("still", "cat /proc/1/stat | cut -d' ' -f22")
    progress = await progress_of(caller.containers.ScaleContainer(scale_request("still", cpus=1.5)))
    assert [stage for stage in progress.stages if stage in ("freeze", "thaw", "stop")] == ["freeze", "thaw"]
    await caller.shell("still", "echo second > /note")
    updated = await caller.update("still", labels={"a": "b"})
    assert updated.status.engine_id == created.status.engine_id
    assert await caller.shell("still", "cat /proc/1/stat | cut -d' ' -f22") == process
    assert updated.status.state == container_pb2.CONTAINER_STATE_RUNNING
    await caller.shell("still", "echo third > /note")
    await caller.rollback("still", 2)
    assert await caller.shell("still", "cat /note") == "second\n"
    await caller.rollback("still", 1)
    assert await caller.shell("still", "cat /note") == "first\n"


async def test_update_changes_mounts_env_ports_and_command(caller: Caller, rig: Rig, volumes: tuple[str, str]) -> None:
    first, second = volumes
    gpus = list((await caller.create("many", 2, ports=[PORT], env={"A": "1", "B": "1"})).status.gpu_uuids)
    await caller.shell("many", "echo kept > /note")
    mount = container_pb2.Mount(volume=first, target="/data")
    await caller.update("many", mounts=[mount])
    await caller.shell("many", "echo one > /data/which")
    await caller.update("many", mounts=[container_pb2.Mount(volume=second, target="/data")])
    assert await caller.shell("many", "ls /data | wc -l; cat /note") == "0\nkept\n"
    await caller.update("many", mounts=[mount], env={"A": "2"}, mask="mounts,env")
    assert await caller.shell("many", "cat /data/which; echo $A$B") == "one\n2\n"
    ports = [PORT, container_pb2.PortRequest(container_port=81)]
    updated = await caller.update("many", ports=ports)
    assert sorted(binding.container_port for binding in updated.status.ports) == [80, 81]
    updated = await caller.update("many", "ports")
    assert not updated.status.ports
    assert list(updated.status.gpu_uuids) == gpus, "an unchanged GPU count keeps the same GPUs"
    await require_consistent(caller, rig, "many")
    # An update to a command that cannot be started is undone, and the old process runs again.
    refused = await failure(
        result_of(caller.containers.UpdateContainer(update_request("many", command=["/no/such/program"])))
    )
    assert refused.reason == "START_FAILED"
    assert await caller.shell("many", "cat /note /data/which") == "kept\none\n"
    await require_consistent(caller, rig, "many")


@pytest_asyncio.fixture
async def volumes(caller: Caller) -> tuple[str, str]:
    """Two volumes without a size."""
    names = ("update-one", "update-other")
    for name in names:
        await caller.create_volume(name)
    return names


async def test_an_update_to_another_image_needs_a_files_policy(caller: Caller, rig: Rig) -> None:
    await caller.create("based", 1)
    await caller.shell("based", "echo mine > /note")
    refused = await failure(result_of(caller.containers.UpdateContainer(update_request("based", image=GLIBC))))
    assert refused.reason == "IMAGE_DIFFERS"
    assert refused.metadata["image"] == GLIBC
    updated = await caller.update("based", image=GLIBC, files=container_service_pb2.FILES_POLICY_DISCARD)
    assert updated.spec.image == GLIBC
    assert await caller.shell("based", "ls /note 2>/dev/null || echo none") == "none\n"
    assert (await failure(result_of(_rollback(caller, "based", 1, spec_only=True)))).reason == "IMAGE_DIFFERS"
    rolled_back = await caller.rollback("based", 1)
    assert rolled_back.spec.image == IMAGE
    assert await caller.shell("based", "cat /note") == "mine\n"
    # The same image by its id needs no policy.
    (image_id,) = {container["Image"] for container in _engine_containers(rig, "based")}
    updated = await caller.update("based", image=image_id)
    assert await caller.shell("based", "cat /note") == "mine\n"
    refused = await failure(result_of(caller.containers.UpdateContainer(update_request("based", image="no/such"))))
    assert refused.reason == "IMAGE_NOT_FOUND"


@pytest.mark.deep
async def test_files_are_transferred_to_another_image(caller: Caller, rig: Rig) -> None:
    await caller.create("grafted", 1, env={"A": "1"})
    await caller.shell("grafted", WRITE_FILES)
    await caller.shell("grafted", "rm /bin/watch; rm -f /etc/passwd")
    files = await _files(caller, "grafted")
    updated = await caller.update("grafted", image=GLIBC, files=container_service_pb2.FILES_POLICY_CARRY_COMMIT)
    assert (updated.spec.image, updated.spec.gpus.count) == (GLIBC, 1)
    assert await _files(caller, "grafted") == files
    # Files that the container had deleted are deleted in the new image, too; other files of the new image exist.
    assert await caller.shell("grafted", "ls /etc/passwd 2>/dev/null || echo gone; ls -d /lib64") == "gone\n/lib64\n"
    await require_consistent(caller, rig, "grafted", files)
    await caller.shell("grafted", "echo more > /note")
    await caller.scale("grafted", 2)
    assert await caller.shell("grafted", "cat /note") == "more\n"
    assert await _files(caller, "grafted") == files
    rolled_back = await caller.rollback("grafted", 1)
    assert rolled_back.spec.image == IMAGE
    assert await _files(caller, "grafted") == files
    assert await caller.shell("grafted", "ls /note /lib64 2>/dev/null || echo neither") == "neither\n"


@pytest.mark.deep
async def test_a_container_with_an_empty_layer_is_updated_to_another_image(caller: Caller, rig: Rig) -> None:
    await caller.create("unwritten", 1)
    updated = await caller.update("unwritten", image=GLIBC, files=container_service_pb2.FILES_POLICY_CARRY_COMMIT)
    assert updated.spec.image == GLIBC
    assert await caller.shell("unwritten", "ls -d /lib64") == "/lib64\n"
    await caller.shell("unwritten", "echo mine > /note")
    await caller.update("unwritten", image=IMAGE, files=container_service_pb2.FILES_POLICY_CARRY_COMMIT)
    assert await caller.shell("unwritten", "cat /note; ls /lib64 2>/dev/null || echo none") == "mine\nnone\n"
    await caller.rollback("unwritten", 2)
    assert await caller.shell("unwritten", "ls -d /lib64 /note") == "/lib64\n/note\n"
    await require_consistent(caller, rig, "unwritten", await _files(caller, "unwritten"))


def _engine_containers(rig: Rig, name: str) -> list[dict[str, Any]]:
    listed = rig.engine.call("GET", "/containers/json?all=1")
    inspected = [rig.engine.call("GET", f"/containers/{container['Id']}/json") for container in listed]
    return [container for container in inspected if container["Config"]["Labels"].get("gpudock.name") == name]


@pytest.mark.deep
async def test_a_stopped_container_is_updated_and_rolled_back_and_stays_stopped(caller: Caller, rig: Rig) -> None:
    await caller.create("asleep", 2, env={"A": "1"})
    await caller.shell("asleep", "echo first > /note")
    await caller.stop("asleep")
    updated = await caller.update("asleep", env={"A": "2"})
    assert updated.status.state == container_pb2.CONTAINER_STATE_STOPPED
    assert not updated.status.gpu_uuids
    assert await caller.free_gpus() == 8
    await caller.start("asleep")
    assert await caller.shell("asleep", "cat /note; echo $A") == "first\n2\n"
    await caller.shell("asleep", "echo second > /note")
    await caller.stop("asleep")
    await caller.rollback("asleep", 1)
    assert (await caller.get("asleep")).status.state == container_pb2.CONTAINER_STATE_STOPPED
    started = await caller.start("asleep")
    assert len(started.status.gpu_uuids) == 2
    assert await caller.shell("asleep", "cat /note; echo $A") == "first\n1\n"
    await require_consistent(caller, rig, "asleep")


@pytest.mark.deep
async def test_a_container_whose_engine_container_was_removed_is_restored_by_a_rollback(
    caller: Caller, rig: Rig
) -> None:
    created = await caller.create("lost", 1)
    await caller.shell("lost", "echo precious > /note")
    await caller.scale("lost", 2)
    (engine,) = _engine_containers(rig, "lost")
    rig.engine.call("DELETE", f"/containers/{engine['Id']}?force=1")
    await until_state(caller, "lost", container_pb2.CONTAINER_STATE_FAILED)
    assert await caller.free_gpus() == 8
    rolled_back = await caller.rollback("lost", 1)
    assert rolled_back.status.state == container_pb2.CONTAINER_STATE_STOPPED
    await caller.start("lost")
    assert await caller.shell("lost", "cat /note") == "precious\n"
    assert (await caller.get("lost")).uid == created.uid


async def test_deleting_a_revision_or_a_container_deletes_its_snapshots(caller: Caller, rig: Rig) -> None:
    created = await caller.create("pruned", 1)
    root = rig.engine.call("GET", "/info")["DockerRootDir"]
    snapshots = Path(root, "gpudock", "snapshots", created.node, created.uid)
    for count in (2, 3, 4):
        await caller.shell("pruned", f"echo {count} > /note{count}")
        await caller.scale("pruned", count)
    await caller.delete_revision("pruned", 2)
    assert [revision.revision for revision in await caller.revisions("pruned")] == [1, 3, 4]
    kept = ["1", "1.json", "3", "3.json", "4.json"]
    assert sorted(os.listdir(snapshots)) == kept  # noqa: PTH208 - Path.iterdir is refused by ASYNC240
    call = caller.delete_revision("pruned", 4)
    assert (await failure(call)).reason == "REVISION_IS_CURRENT"
    assert (await failure(caller.delete_revision("pruned", 2))).reason == "REVISION_NOT_FOUND"
    await caller.rollback("pruned", 3)
    assert await caller.shell("pruned", "ls / | grep -c note") == "3\n"
    await caller.delete("pruned")
    assert created.uid not in os.listdir(snapshots.parent)  # noqa: PTH208 - Path.iterdir is refused by ASYNC240


@pytest.mark.deep
async def test_revisions_are_pruned_by_count_and_by_age(rig: Rig) -> None:
    daemon = await rig.start_daemon(
        *FAST_FLAGS, *own_state_flags(), "--reconcile-interval", "0.3", "--keep-revisions", "3"
    )
    try:
        async with Caller(daemon.target) as caller:
            policy = container_pb2.RevisionPolicy(keep_revisions=2)
            await caller.create("few", 0, revision_policy=policy)
            await caller.create("node", 0)
            for cpus in (1.0, 1.5, 2.0, 0.5):
                await caller.scale("few", cpus=cpus)
                await caller.scale("node", cpus=cpus)
            assert [revision.revision for revision in await caller.revisions("few")] == [4, 5]
            assert [revision.revision for revision in await caller.revisions("node")] == [3, 4, 5]
            policy = container_pb2.RevisionPolicy()
            policy.keep_for.FromSeconds(1)
            await caller.update("node", revision_policy=policy)
            async with asyncio.timeout(limit(15)):
                while [revision.revision for revision in await caller.revisions("node")] != [6]:
                    await asyncio.sleep(0.1)
            await caller.delete_all()
    finally:
        await asyncio.to_thread(daemon.stop)


async def test_a_plan_has_the_bytes_to_copy_and_the_free_bytes(caller: Caller) -> None:
    await caller.create("full", 1, image=GLIBC)
    await caller.shell("full", "dd if=/dev/zero of=/blocks bs=1M count=64 2>/dev/null")
    progress = await progress_of(caller.containers.ScaleContainer(scale_request("full", 2, validate_only=True)))
    plan = progress.snapshots[-1].plan
    assert 64 << 20 <= plan.bytes_to_move <= plan.bytes_available


@pytest.mark.deep
@pytest.mark.parametrize("carry", ["copy", "commit"])
async def test_revisions_with_other_transfer_methods(rig: Rig, carry: str) -> None:
    images_before = layer_images(rig)
    daemon = await rig.start_daemon(*FAST_FLAGS, *own_state_flags(), "--layer-carry", carry)
    try:
        async with Caller(daemon.target) as caller:
            await caller.create("other", 1)
            await caller.shell("other", WRITE_FILES)
            first = await _files(caller, "other")
            await caller.scale("other", 2)
            await caller.shell("other", "rm -r /work; mkdir /work; echo x > /work/file")
            second = await _files(caller, "other")
            await caller.update("other", env={"A": "1"})
            await caller.rollback("other", 1)
            assert await _files(caller, "other") == first
            await caller.rollback("other", 2)
            assert await _files(caller, "other") == second
            await require_consistent(caller, rig, "other", second)
            kept_revision = (await caller.revisions("other"))[0]
            kind = TREE if carry == "copy" else container_revision_pb2.SNAPSHOT_KIND_IMAGE
            assert kept_revision.snapshot.kind == kind
            await caller.delete_all()
            assert layer_images(rig) == images_before
    finally:
        await asyncio.to_thread(daemon.stop)


async def test_the_cheap_policy_makes_no_snapshot_that_copies_files(caller: Caller) -> None:
    await caller.create("cheap", 1, revision_policy=container_pb2.RevisionPolicy(snapshots=CHEAP))
    await caller.scale("cheap", 2)
    (first, _) = await caller.revisions("cheap")
    # On a filesystem with reflinks there is a snapshot, which copies nothing; on others there is none.
    assert first.snapshot.new_bytes == 0
