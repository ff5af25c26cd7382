"""`docker system prune -af` while a container is stopped: what is said, and what brings it back."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from gpudock.v1 import container_pb2, container_service_pb2

from tests.calls import Caller, failure, result_of
from tests.engine.docker_registry import publish, registry
from tests.engine.drift import REPAIRED, wait_for_drift
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until_state
from tests.rig import Rig

__all__ = ["daemons"]

FAILED = container_pb2.CONTAINER_STATE_FAILED
STOPPED = container_pb2.CONTAINER_STATE_STOPPED


async def prune(caller: Caller, rig: Rig, *names: str, image: str = "") -> None:
    """What the engine's prune does to these, and to the image that they were the last to use."""
    for name in names:
        rig.engine.call("DELETE", f"/containers/{(await caller.get(name)).status.engine_id}")
    if image:
        rig.engine.call("DELETE", f"/images/{image}")
    for name in names:
        await until_state(caller, name, FAILED)


async def test_what_was_pruned_says_what_can_be_done(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller:
        await caller.create("kept", 1)
        await caller.shell("kept", "echo one > /note")
        await caller.update("kept", "env", env={"A": "1"})
        await caller.create("bare", 1)
        for name in ("kept", "bare"):
            await caller.stop(name)
        await prune(caller, rig, "kept", "bare")
        calls: dict[str, Any] = {
            "start": caller.start,
            "restart": caller.restart,
            "scale": lambda name: caller.scale(name, cpus=0.5),
            "update": lambda name: caller.update(name, "env", env={"A": "2"}),
        }
        for name, revisions in (("kept", "1"), ("bare", "")):
            for call in calls.values():
                refused = await failure(call(name))
                assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CONTAINER_GONE"), (
                    refused
                )
                assert refused.metadata.get("revisions", "") == revisions
        assert (
            "roll back to or clone revision 1"
            in (await wait_for_drift(caller, "CONTAINER_GONE", REPAIRED, "kept")).plan
        )
        assert "there is no snapshot" in (await wait_for_drift(caller, "CONTAINER_GONE", REPAIRED, "bare")).plan
        assert (await failure(caller.rollback("kept", 2))).reason == "SNAPSHOT_NOT_FOUND", "its files are lost"
        await caller.clone("kept", "clone", revision=1)
        assert await caller.shell("clone", "cat /note") == "one\n"
        assert (await caller.rollback("kept", 1)).status.state == STOPPED
        # Its spec alone: what the image has.
        request = container_service_pb2.RollbackContainerRequest(
            name="bare", revision=1, spec_only=True, validate_only=True
        )
        planned = [each async for each in caller.containers.RollbackContainer(request)]
        assert any("are lost" in each for each in planned[-1].operation.plan.warnings), planned[-1]
        assert (await caller.rollback("bare", 1, spec_only=True)).status.state == STOPPED
        for name, note in (("kept", "one\n"), ("bare", "")):
            await caller.start(name)
            assert await caller.shell(name, "cat /note 2>/dev/null || true") == note
        await caller.delete_all()


async def test_the_image_is_pulled_again_and_must_be_the_same(
    daemons: IsolatedDaemons, rig: Rig, tmp_path: Path
) -> None:
    daemon = await daemons.start()
    async with registry(rig, tmp_path, locked=False) as host, Caller(daemon.target) as caller:
        image = f"{host}/whole"
        request = container_service_pb2.CreateContainerRequest(
            name="one", spec=container_pb2.ContainerSpec(image=image, command=["/payload"]), create_only=True
        )
        made = await result_of(caller.containers.CreateContainer(request))
        await caller.update("one", "env", env={"A": "1"})
        await prune(caller, rig, "one", image=image)
        back = await caller.rollback("one", 1)
        assert (back.status.state, back.status.image_id, back.revision) == (STOPPED, made.status.image_id, 3)
        # Its name leads elsewhere by now: then nothing is changed.
        await prune(caller, rig, "one", image=image)
        publish(tmp_path, seed="another")
        for words in ({"revision": 1}, {"revision": 3, "spec_only": True}):
            refused = await failure(caller.rollback("one", **words))
            assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "IMAGE_DIFFERS"), refused
            assert refused.metadata["current_image_id"] == made.status.image_id
            assert refused.message.endswith(
                "Restore the image (`docker pull` by its digest, or `docker load`), and call this again"
            )
            seen = await caller.get("one")
            assert (seen.status.state, seen.revision) == (FAILED, 3)
        publish(tmp_path)
        assert (await caller.rollback("one", 1)).revision == 4
        await caller.delete_all()
        rig.engine.call("DELETE", f"/images/{image}?force=1")


@pytest.mark.deep
async def test_files_are_kept_when_a_container_is_stopped(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start("--snapshot-on-stop", "true")
    async with Caller(daemon.target) as caller:
        await caller.create("one", 1)
        await caller.shell("one", "echo first > /note")
        await caller.stop("one")
        assert (await caller.revisions("one"))[0].snapshot.kind
        await caller.start("one")
        await caller.shell("one", "echo second > /note")
        await caller.stop("one")
        never = container_pb2.RevisionPolicy(snapshots=container_pb2.SNAPSHOT_POLICY_NEVER)
        await caller.create("bare", 1, revision_policy=never)
        await caller.stop("bare")
        assert not (await caller.revisions("bare"))[0].HasField("snapshot")
        await prune(caller, rig, "one", "bare")
        refused = await failure(caller.start("one"))
        assert (refused.reason, refused.metadata["revisions"]) == ("CONTAINER_GONE", "1")
        await caller.clone("one", "clone")
        back = await caller.rollback("one", 1)
        assert (back.status.state, back.revision) == (STOPPED, 2)
        await caller.start("one")
        for name in ("one", "clone"):
            assert await caller.shell(name, "cat /note") == "second\n"
        # What the next change keeps of a revision takes the place of what its stop kept.
        await caller.shell("one", "echo third > /note")
        await caller.stop("one")
        await caller.start("one")
        await caller.shell("one", "echo fourth > /note")
        ended = (await caller.get("one")).revision
        await caller.update("one", "env", env={"A": "1"})
        await caller.rollback("one", ended)
        assert await caller.shell("one", "cat /note") == "fourth\n"
        await caller.delete_all()


async def test_a_stop_does_not_wait_for_room_to_keep_files(daemons: IsolatedDaemons, rig: Rig) -> None:
    # No folder can be made below a file.
    root = rig.engine.call("GET", "/info")["DockerRootDir"]
    blocked = Path(root, f"blocked-{daemons.id}")
    await asyncio.to_thread(blocked.touch)
    daemon = await daemons.start("--snapshot-on-stop", "true", "--snapshot-dir", str(blocked))
    async with Caller(daemon.target) as caller:
        await caller.create("one", 1)
        assert (await caller.stop("one")).status.state == STOPPED
        assert not (await caller.revisions("one"))[0].HasField("snapshot")
        await asyncio.to_thread(blocked.unlink)
        await caller.delete_all()
