"""History: every change makes a revision, and each can be returned to, with its files."""

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
from tests.faults.invariants import SHOW_FILES, WRITE_FILES, layer_images, require_consistent
from tests.rig import GLIBC, Rig
from tests.rig.patience import limit

_NEVER = container_pb2.SNAPSHOT_POLICY_NEVER
_CHEAP = container_pb2.SNAPSHOT_POLICY_CHEAP
_TREE = container_revision_pb2.SNAPSHOT_KIND_TREE
_PORT = container_pb2.PortRequest(container_port=80)


async def _files(caller: Caller, name: str) -> str:
    return await caller.shell(name, SHOW_FILES)


async def test_every_revision_can_be_returned_to_with_its_files(caller: Caller, rig: Rig) -> None:
    await caller.create("past", 1, ports=[_PORT])
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

    back = await caller.rollback("past", 1)
    assert (back.revision, back.spec.gpus.count) == (4, 1)
    assert await _files(caller, "past") == first, "the files as they were when revision 2 replaced revision 1"
    await require_consistent(caller, rig, "past", first)

    again = await caller.rollback("past", 2)
    assert (again.revision, again.spec.gpus.count) == (5, 2)
    assert await _files(caller, "past") == second
    # Rolling back a rollback: revision 3 had no /work any more.
    gone = await caller.rollback("past", 3)
    assert gone.spec.gpus.count == 3
    assert await caller.shell("past", "ls -d /work 2>/dev/null || echo gone") == "gone\n"

    causes = [revision.cause for revision in await caller.revisions("past")]
    word = container_revision_pb2.RevisionCause.Name
    assert [word(cause).removeprefix("REVISION_CAUSE_") for cause in causes] == [
        "CREATED", "SCALED", "SCALED", "ROLLED_BACK", "ROLLED_BACK", "ROLLED_BACK",
    ]  # fmt: skip
    history = await caller.revisions("past")
    assert [revision.current for revision in history] == [False] * 5 + [True]
    assert all(revision.snapshot.kind == _TREE and revision.layer_bytes > 0 for revision in history[:-1])
    assert not history[-1].HasField("snapshot")
    assert all(revision.operation_id and revision.image_id.startswith("sha256:") for revision in history)


async def test_what_did_not_change_is_kept_once(caller: Caller) -> None:
    await caller.create("big", 1, image=GLIBC)
    await caller.shell("big", "dd if=/dev/urandom of=/big bs=1M count=40 2>/dev/null")
    await caller.scale("big", 2)
    await caller.shell("big", "echo small > /small")
    await caller.scale("big", 1)
    one, two, _ = await caller.revisions("big")
    assert one.snapshot.new_bytes >= 40 << 20
    assert two.layer_bytes >= 40 << 20
    assert two.snapshot.new_bytes < 4 << 20, "40 MB that did not change are shared with the snapshot before"


@pytest.mark.deep
async def test_a_rollback_takes_no_card_that_another_holds(caller: Caller, rig: Rig) -> None:
    held = list((await caller.create("first", 2)).status.gpu_uuids)
    await caller.scale("first", 0)
    taken = [list((await caller.create(f"other{number}", 2)).status.gpu_uuids) for number in range(3)]
    assert set(held) <= {uuid for uuids in taken for uuid in uuids}
    back = await caller.rollback("first", 1)
    assert len(back.status.gpu_uuids) == 2
    assert not set(back.status.gpu_uuids) & {uuid for uuids in taken for uuid in uuids}
    await require_consistent(caller, rig, "first")
    # And where there are none left it is refused, with everything as it was.
    await caller.scale("first", 0)
    await caller.create("last", 2)
    told = await failure(result_of(_rollback(caller, "first", 1)))
    assert told.reason == "GPU_EXHAUSTED"
    assert (await caller.get("first")).spec.gpus.count == 0


def _rollback(caller: Caller, name: str, revision: int, **fields: Any) -> Any:
    request = container_service_pb2.RollbackContainerRequest(name=name, revision=revision, **fields)
    return caller.containers.RollbackContainer(request)


async def test_spec_only_and_what_was_not_kept(caller: Caller, rig: Rig) -> None:
    await caller.create("plain", 1, env={"A": "1"})
    await caller.shell("plain", "echo first > /note")
    await caller.update("plain", env={"A": "2"}, snapshots=_NEVER)
    await caller.shell("plain", "echo second > /note")
    one, _ = await caller.revisions("plain")
    assert not one.HasField("snapshot")
    told = await failure(result_of(_rollback(caller, "plain", 1)))
    assert (told.reason, told.metadata["revision"]) == ("SNAPSHOT_NOT_FOUND", "1")
    back = await caller.rollback("plain", 1, spec_only=True)
    assert back.spec.env == {"A": "1"}
    assert await caller.shell("plain", "cat /note; echo $A") == "second\n1\n"
    told = await failure(result_of(_rollback(caller, "plain", 9)))
    assert (told.reason, told.metadata["available"]) == ("REVISION_NOT_FOUND", "3,2,1")
    # To where it is already: nothing happens.
    same = await progress_of(_rollback(caller, "plain", 3))
    assert same.result is not None
    assert same.result.revision == 3
    await require_consistent(caller, rig, "plain")


async def test_a_plan_says_how_files_are_kept(caller: Caller) -> None:
    await caller.create("planned", 1)
    kept = await progress_of(caller.containers.ScaleContainer(scale_request("planned", 2, validate_only=True)))
    plan = kept.snapshots[-1].plan
    assert plan.snapshot == _TREE
    stages = [stage for stage in plan.stages if stage in ("gather", "stop", "complete", "start", "seal")]
    assert stages == ["gather", "stop", "complete", "start", "seal"], "only the difference is copied while it is down"
    request = scale_request("planned", 2, validate_only=True, snapshots=_NEVER)
    plan = (await progress_of(caller.containers.ScaleContainer(request))).snapshots[-1].plan
    assert not plan.HasField("snapshot")
    assert any("spec only" in warning for warning in plan.warnings)
    assert [revision.revision for revision in await caller.revisions("planned")] == [1]


async def test_in_place_changes_keep_files_without_a_stop(caller: Caller) -> None:
    made = await caller.create("still", 1, image=GLIBC)
    await caller.shell("still", "echo first > /note")
    process = await caller.shell("still", "cat /proc/1/stat | cut -d' ' -f22")
    progress = await progress_of(caller.containers.ScaleContainer(scale_request("still", cpus=1.5)))
    assert [stage for stage in progress.stages if stage in ("freeze", "thaw", "stop")] == ["freeze", "thaw"]
    await caller.shell("still", "echo second > /note")
    now = await caller.update("still", labels={"a": "b"})
    assert now.status.engine_id == made.status.engine_id
    assert await caller.shell("still", "cat /proc/1/stat | cut -d' ' -f22") == process
    assert now.status.state == container_pb2.CONTAINER_STATE_RUNNING
    await caller.shell("still", "echo third > /note")
    await caller.rollback("still", 2)
    assert await caller.shell("still", "cat /note") == "second\n"
    await caller.rollback("still", 1)
    assert await caller.shell("still", "cat /note") == "first\n"


async def test_update_changes_mounts_env_ports_and_command(caller: Caller, rig: Rig, volumes: tuple[str, str]) -> None:
    one, other = volumes
    held = list((await caller.create("many", 2, ports=[_PORT], env={"A": "1", "B": "1"})).status.gpu_uuids)
    await caller.shell("many", "echo kept > /note")
    mount = container_pb2.Mount(volume=one, target="/data")
    await caller.update("many", mounts=[mount])
    await caller.shell("many", "echo one > /data/which")
    await caller.update("many", mounts=[container_pb2.Mount(volume=other, target="/data")])
    assert await caller.shell("many", "ls /data | wc -l; cat /note") == "0\nkept\n"
    await caller.update("many", mounts=[mount], env={"A": "2"}, mask="mounts,env")
    assert await caller.shell("many", "cat /data/which; echo $A$B") == "one\n2\n"
    ports = [_PORT, container_pb2.PortRequest(container_port=81)]
    now = await caller.update("many", ports=ports)
    assert sorted(binding.container_port for binding in now.status.ports) == [80, 81]
    now = await caller.update("many", "ports")
    assert not now.status.ports
    assert list(now.status.gpu_uuids) == held, "cards that are asked for as before stay the same ones"
    await require_consistent(caller, rig, "many")
    # A command that cannot be started is no success, and the old one runs as before.
    told = await failure(
        result_of(caller.containers.UpdateContainer(update_request("many", command=["/no/such/program"])))
    )
    assert told.reason == "START_FAILED"
    assert await caller.shell("many", "cat /note /data/which") == "kept\none\n"
    await require_consistent(caller, rig, "many")


@pytest_asyncio.fixture
async def volumes(caller: Caller) -> tuple[str, str]:
    """Two volumes without a size."""
    names = ("update-one", "update-other")
    for name in names:
        await caller.create_volume(name)
    return names


async def test_another_image_needs_a_word_about_the_files(caller: Caller, rig: Rig) -> None:
    await caller.create("based", 1)
    await caller.shell("based", "echo mine > /note")
    told = await failure(result_of(caller.containers.UpdateContainer(update_request("based", image=GLIBC))))
    assert told.reason == "IMAGE_DIFFERS"
    assert told.metadata["image"] == GLIBC
    now = await caller.update("based", image=GLIBC, files=container_service_pb2.FILES_POLICY_DISCARD)
    assert now.spec.image == GLIBC
    assert await caller.shell("based", "ls /note 2>/dev/null || echo none") == "none\n"
    assert (await failure(result_of(_rollback(caller, "based", 1, spec_only=True)))).reason == "IMAGE_DIFFERS"
    back = await caller.rollback("based", 1)
    assert back.spec.image == IMAGE
    assert await caller.shell("based", "cat /note") == "mine\n"
    # The same image by another name.
    (image_id,) = {one["Image"] for one in _engine(rig, "based")}
    now = await caller.update("based", image=image_id)
    assert await caller.shell("based", "cat /note") == "mine\n"
    told = await failure(result_of(caller.containers.UpdateContainer(update_request("based", image="no/such"))))
    assert told.reason == "IMAGE_NOT_FOUND"


@pytest.mark.deep
async def test_files_go_along_to_another_image(caller: Caller, rig: Rig) -> None:
    await caller.create("grafted", 1, env={"A": "1"})
    await caller.shell("grafted", WRITE_FILES)
    await caller.shell("grafted", "rm /bin/watch; rm -f /etc/passwd")
    files = await _files(caller, "grafted")
    now = await caller.update("grafted", image=GLIBC, files=container_service_pb2.FILES_POLICY_CARRY_COMMIT)
    assert (now.spec.image, now.spec.gpus.count) == (GLIBC, 1)
    assert await _files(caller, "grafted") == files
    # What it had deleted is deleted there too, and what only the new image has is there.
    assert await caller.shell("grafted", "ls /etc/passwd 2>/dev/null || echo gone; ls -d /lib64") == "gone\n/lib64\n"
    await require_consistent(caller, rig, "grafted", files)
    await caller.shell("grafted", "echo more > /note")
    await caller.scale("grafted", 2)
    assert await caller.shell("grafted", "cat /note") == "more\n"
    assert await _files(caller, "grafted") == files
    back = await caller.rollback("grafted", 1)
    assert back.spec.image == IMAGE
    assert await _files(caller, "grafted") == files
    assert await caller.shell("grafted", "ls /note /lib64 2>/dev/null || echo neither") == "neither\n"


@pytest.mark.deep
async def test_one_that_has_written_nothing_goes_to_another_image(caller: Caller, rig: Rig) -> None:
    await caller.create("unwritten", 1)
    now = await caller.update("unwritten", image=GLIBC, files=container_service_pb2.FILES_POLICY_CARRY_COMMIT)
    assert now.spec.image == GLIBC
    assert await caller.shell("unwritten", "ls -d /lib64") == "/lib64\n"
    await caller.shell("unwritten", "echo mine > /note")
    await caller.update("unwritten", image=IMAGE, files=container_service_pb2.FILES_POLICY_CARRY_COMMIT)
    assert await caller.shell("unwritten", "cat /note; ls /lib64 2>/dev/null || echo none") == "mine\nnone\n"
    await caller.rollback("unwritten", 2)
    assert await caller.shell("unwritten", "ls -d /lib64 /note") == "/lib64\n/note\n"
    await require_consistent(caller, rig, "unwritten", await _files(caller, "unwritten"))


def _engine(rig: Rig, name: str) -> list[dict[str, Any]]:
    listed = rig.engine.call("GET", "/containers/json?all=1")
    found = [rig.engine.call("GET", f"/containers/{one['Id']}/json") for one in listed]
    return [one for one in found if one["Config"]["Labels"].get("gpudock.name") == name]


@pytest.mark.deep
async def test_a_stopped_one_is_changed_and_stays_stopped(caller: Caller, rig: Rig) -> None:
    await caller.create("asleep", 2, env={"A": "1"})
    await caller.shell("asleep", "echo first > /note")
    await caller.stop("asleep")
    now = await caller.update("asleep", env={"A": "2"})
    assert now.status.state == container_pb2.CONTAINER_STATE_STOPPED
    assert not now.status.gpu_uuids
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
async def test_what_the_engine_lost_can_be_brought_back(caller: Caller, rig: Rig) -> None:
    made = await caller.create("lost", 1)
    await caller.shell("lost", "echo precious > /note")
    await caller.scale("lost", 2)
    (engine,) = _engine(rig, "lost")
    rig.engine.call("DELETE", f"/containers/{engine['Id']}?force=1")
    async with asyncio.timeout(limit(10)):
        while (await caller.get("lost")).status.state != container_pb2.CONTAINER_STATE_FAILED:
            await asyncio.sleep(0.05)
    assert await caller.free_gpus() == 8
    back = await caller.rollback("lost", 1)
    assert back.status.state == container_pb2.CONTAINER_STATE_STOPPED
    await caller.start("lost")
    assert await caller.shell("lost", "cat /note") == "precious\n"
    assert (await caller.get("lost")).uid == made.uid


async def test_deleting_a_revision_and_the_container(caller: Caller, rig: Rig) -> None:
    made = await caller.create("pruned", 1)
    root = rig.engine.call("GET", "/info")["DockerRootDir"]
    snapshots = Path(root, "gpudock", "snapshots", made.node, made.uid)
    for count in (2, 3, 4):
        await caller.shell("pruned", f"echo {count} > /note{count}")
        await caller.scale("pruned", count)
    await caller.delete_revision("pruned", 2)
    assert [revision.revision for revision in await caller.revisions("pruned")] == [1, 3, 4]
    kept = ["1", "1.json", "3", "3.json", "4.json"]
    assert sorted(os.listdir(snapshots)) == kept  # noqa: PTH208 - a look that takes no time
    call = caller.delete_revision("pruned", 4)
    assert (await failure(call)).reason == "REVISION_IS_CURRENT"
    assert (await failure(caller.delete_revision("pruned", 2))).reason == "REVISION_NOT_FOUND"
    await caller.rollback("pruned", 3)
    assert await caller.shell("pruned", "ls / | grep -c note") == "3\n"
    await caller.delete("pruned")
    assert made.uid not in os.listdir(snapshots.parent)  # noqa: PTH208 - likewise


@pytest.mark.deep
async def test_retention_by_count_and_by_age(rig: Rig) -> None:
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


async def test_the_plan_counts_what_is_copied_and_the_room_for_it(caller: Caller) -> None:
    await caller.create("full", 1, image=GLIBC)
    await caller.shell("full", "dd if=/dev/zero of=/blocks bs=1M count=64 2>/dev/null")
    progress = await progress_of(caller.containers.ScaleContainer(scale_request("full", 2, validate_only=True)))
    plan = progress.snapshots[-1].plan
    assert 64 << 20 <= plan.bytes_to_move <= plan.bytes_available


@pytest.mark.deep
@pytest.mark.parametrize("carry", ["copy", "commit"])
async def test_history_with_other_ways_of_carrying(rig: Rig, carry: str) -> None:
    others = layer_images(rig)
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
            one = (await caller.revisions("other"))[0]
            kind = _TREE if carry == "copy" else container_revision_pb2.SNAPSHOT_KIND_IMAGE
            assert one.snapshot.kind == kind
            await caller.delete_all()
            assert layer_images(rig) == others
    finally:
        await asyncio.to_thread(daemon.stop)


async def test_cheap_keeps_nothing_where_it_would_copy(caller: Caller) -> None:
    await caller.create("cheap", 1, revision_policy=container_pb2.RevisionPolicy(snapshots=_CHEAP))
    await caller.scale("cheap", 2)
    (one, _) = await caller.revisions("cheap")
    # The rig's engine lies on a filesystem without reflinks, or with: kept only where nothing was copied.
    assert one.snapshot.new_bytes == 0
