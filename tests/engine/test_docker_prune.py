"""`docker system prune -af` while a container is stopped: errors name the remedies, and a rollback restores it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest
from gpudock.v1 import container_pb2, container_service_pb2

from tests.calls import Caller, failure, result_of
from tests.engine.docker_registry import publish, registry
from tests.engine.drift import wait_for_drift_log
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until_state
from tests.rig import Rig

__all__ = ["daemons"]

FAILED = container_pb2.CONTAINER_STATE_FAILED
STOPPED = container_pb2.CONTAINER_STATE_STOPPED


async def prune(caller: Caller, rig: Rig, *names: str, image: str = "") -> None:
    """Remove engine containers, and optionally their image, as the engine does when it prunes."""
    for name in names:
        rig.engine.call("DELETE", f"/containers/{(await caller.get(name)).status.engine_id}")
    if image:
        rig.engine.call("DELETE", f"/images/{image}")
    for name in names:
        await until_state(caller, name, FAILED)


async def test_a_pruned_container_is_restored_from_a_snapshot_or_its_image(daemons: IsolatedDaemons, rig: Rig) -> None:
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
        assert "roll back to or clone revision 1" in await wait_for_drift_log(daemon, "CONTAINER_GONE", "kept")
        assert "there is no snapshot" in await wait_for_drift_log(daemon, "CONTAINER_GONE", "bare")
        assert (await failure(caller.rollback("kept", 2))).reason == "SNAPSHOT_NOT_FOUND", (
            "revision 2 had no snapshot when its files were lost"
        )
        await caller.clone("kept", "clone", revision=1)
        assert await caller.shell("clone", "cat /note") == "one\n"
        assert (await caller.rollback("kept", 1)).status.state == STOPPED
        # With spec_only, the container gets the files of its image.
        request = container_service_pb2.RollbackContainerRequest(
            name="bare", revision=1, spec_only=True, validate_only=True
        )
        answers = [answer async for answer in caller.containers.RollbackContainer(request)]
        assert any("are lost" in answer for answer in answers[-1].operation.plan.warnings), answers[-1]
        assert (await caller.rollback("bare", 1, spec_only=True)).status.state == STOPPED
        for name, note in (("kept", "one\n"), ("bare", "")):
            await caller.start(name)
            assert await caller.shell(name, "cat /note 2>/dev/null || true") == note
        await caller.delete_all()


async def test_a_pruned_image_is_pulled_again_and_must_have_the_same_id(
    daemons: IsolatedDaemons, rig: Rig, tmp_path: Path
) -> None:
    daemon = await daemons.start()
    async with registry(rig, tmp_path, locked=False) as host, Caller(daemon.target) as caller:
        image = f"{host}/whole"
        request = container_service_pb2.CreateContainerRequest(
            name="one", spec=container_pb2.ContainerSpec(image=image, command=["/payload"]), create_only=True
        )
        created = await result_of(caller.containers.CreateContainer(request))
        await caller.update("one", "env", env={"A": "1"})
        await prune(caller, rig, "one", image=image)
        rolled_back = await caller.rollback("one", 1)
        assert (rolled_back.status.state, rolled_back.status.image_id, rolled_back.revision) == (
            STOPPED,
            created.status.image_id,
            3,
        )
        # If the name refers to another image, nothing is changed.
        await prune(caller, rig, "one", image=image)
        publish(tmp_path, seed="another")
        for arguments in ({"revision": 1}, {"revision": 3, "spec_only": True}):
            refused = await failure(caller.rollback("one", **arguments))
            assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "IMAGE_DIFFERS"), refused
            assert refused.metadata["current_image_id"] == created.status.image_id
            assert refused.message.endswith(
                "Restore the image (`docker pull` by its digest, or `docker load`), and call this again"
            )
            current = await caller.get("one")
            assert (current.status.state, current.revision) == (FAILED, 3)
        publish(tmp_path)
        assert (await caller.rollback("one", 1)).revision == 4
        await caller.delete_all()
        rig.engine.call("DELETE", f"/images/{image}?force=1")


@pytest.mark.deep
async def test_snapshot_on_stop_keeps_the_files_of_a_stopped_container(daemons: IsolatedDaemons, rig: Rig) -> None:
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
        rolled_back = await caller.rollback("one", 1)
        assert (rolled_back.status.state, rolled_back.revision) == (STOPPED, 2)
        await caller.start("one")
        for name in ("one", "clone"):
            assert await caller.shell(name, "cat /note") == "second\n"
        # The snapshot that the next change makes replaces the one that the stop made.
        await caller.shell("one", "echo third > /note")
        await caller.stop("one")
        await caller.start("one")
        await caller.shell("one", "echo fourth > /note")
        stopped_revision = (await caller.get("one")).revision
        await caller.update("one", "env", env={"A": "1"})
        await caller.rollback("one", stopped_revision)
        assert await caller.shell("one", "cat /note") == "fourth\n"
        await caller.delete_all()


async def test_a_stop_succeeds_without_a_snapshot_if_none_can_be_made(daemons: IsolatedDaemons, rig: Rig) -> None:
    # A file in the place of the snapshot folder makes every snapshot fail.
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
