"""Loss of the whole store: resources of every kind are restored field by field from the engine and the disks."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from gpudock.v1 import container_pb2, container_revision_pb2, container_service_pb2, drift_pb2, volume_pb2

from tests.calls import Caller, failure, result_of
from tests.engine.drift import REPAIRED, list_drift, wait_for_passes
from tests.engine.isolated_daemons import daemons, until_state
from tests.engine.store_loss import EmbeddedStoreDaemon, restorable_container, restorable_volume, store_daemon
from tests.faults.instrumented_daemon import DIE_AT, KIND
from tests.rig import Rig
from tests.rig.errors import RigError

__all__ = ["daemons", "store_daemon"]

pytestmark = pytest.mark.deep

VOLUME_SIZE = 320 << 20
LOOP = volume_pb2.VOLUME_BACKEND_LOOP
FAILED = container_pb2.CONTAINER_STATE_FAILED
PORT = container_pb2.PortRequest(container_port=80)
CONTAINERS = ("running", "stopped", "paused", "failed", "clone", "plain")
VOLUMES = ("sized", "unsized")


@dataclass(frozen=True)
class Resources:
    """The restorable fields of containers, revisions and volumes, the holder of each GPU, and files of containers."""

    containers: list[container_pb2.Container]
    revisions: list[list[container_revision_pb2.ContainerRevision]]
    volumes: list[volume_pb2.Volume]
    holders: dict[str, str]
    files: list[str]


async def read_resources(caller: Caller) -> Resources:
    """Read the resources that `create_resources` made."""
    return Resources(
        containers=[restorable_container(await caller.get(name)) for name in CONTAINERS],
        revisions=[await caller.revisions(name) for name in CONTAINERS],
        volumes=[restorable_volume(await caller.volume(name)) for name in VOLUMES],
        holders=await caller.holders(),
        files=[await caller.shell(name, "cat /note /v/note") for name in ("running", "clone")],
    )


async def create_resources(caller: Caller, rig: Rig) -> None:
    """Create containers in several states, with revisions and snapshots, and volumes of two kinds."""
    await caller.create_volume("sized", VOLUME_SIZE, backend=LOOP, owner="alice", labels={"a": "b"})
    await caller.create_volume("unsized", labels={"c": "d"})
    mounts = [container_pb2.Mount(volume="sized", target="/v"), container_pb2.Mount(volume="unsized", target="/u")]
    spec = caller.spec(2, ports=[PORT], mounts=mounts, env={"A": "1"}, labels={"x": "y"})
    request = container_service_pb2.CreateContainerRequest(name="running", spec=spec, owner="alice")
    await result_of(caller.containers.CreateContainer(request))
    await caller.shell("running", "echo one | tee /note > /v/note")
    await caller.scale("running", 1)
    await caller.shell("running", "echo two > /note")
    # This change is in place, so the engine container does not record it.
    await caller.scale("running", cpus=0.5)
    await caller.clone("running", "clone")
    policy = container_pb2.RevisionPolicy(snapshots=container_pb2.SNAPSHOT_POLICY_NEVER)
    for name in ("stopped", "paused", "failed", "plain"):
        await caller.create(name, 1, **({"revision_policy": policy} if name == "plain" else {}))
        await caller.shell(name, f"echo {name} > /note")
        await caller.update(name, "env", env={"B": name})
    await caller.scale("plain", cpus=0.5)
    await caller.stop("stopped")
    await caller.containers.PauseContainer(container_service_pb2.PauseContainerRequest(name="paused"))
    rig.engine.call("DELETE", f"/containers/{(await caller.get('failed')).status.engine_id}?force=1")
    await until_state(caller, "failed", FAILED)


@pytest.mark.timeout(240)
async def test_resources_of_every_kind_are_restored_and_usable(store_daemon: EmbeddedStoreDaemon, rig: Rig) -> None:
    async with Caller(store_daemon.daemon.target) as caller:
        await create_resources(caller, rig)
        await caller.create("victim", 1)
        await caller.shell("victim", "echo victim > /note")
        before = await read_resources(caller)
    # The daemon is killed in the middle of a scale, after the old engine container has stopped.
    await store_daemon.kill()
    await store_daemon.start(module="tests.faults.instrumented_daemon", environment={KIND: "SCALE", DIE_AT: "9"})
    async with Caller(store_daemon.daemon.target) as caller:
        with pytest.raises(grpc.aio.AioRpcError):
            await caller.scale("victim", 2)
    assert await asyncio.to_thread(store_daemon.daemon.wait) == -9, store_daemon.daemon.log_text
    await store_daemon.wait_for_etcd_exit()
    store_daemon.delete_store()
    await store_daemon.start()
    async with Caller(store_daemon.daemon.target) as caller:
        after = await read_resources(caller)
        assert after.containers == before.containers
        assert after.revisions == before.revisions
        assert after.volumes == before.volumes
        assert after.files == before.files
        # Either engine container of `victim` may have the files, so its record is not restored and it holds nothing.
        assert after.holders == {uuid: name.replace("victim", "") for uuid, name in before.holders.items()}
        findings = await list_drift(caller)
        assert {finding.container for finding in findings if finding.remedy != REPAIRED} == {"victim"}
        await wait_for_passes(caller)
        assert {finding.container for finding in await list_drift(caller)} == {"victim"}, (
            "a repaired finding is listed once"
        )
        await check_resources_are_usable(caller)
        await wait_for_passes(caller)


async def check_resources_are_usable(caller: Caller) -> None:
    """Roll back and start containers; their revisions continue with the next number."""
    assert (await caller.rollback("running", 1)).revision == 4
    assert await caller.shell("running", "cat /note /v/note") == "one\none\n"
    await caller.rollback("running", 3)
    assert await caller.shell("running", "cat /note") == "two\n"
    await caller.start("stopped")
    assert await caller.shell("stopped", "cat /note") == "stopped\n"
    assert (await failure(caller.rollback("plain", 1))).reason == "SNAPSHOT_NOT_FOUND"
    assert (await caller.rollback("plain", 1, spec_only=True)).revision == 4
    # A FAILED container keeps its history and the files of its revisions.
    assert (await caller.rollback("failed", 1)).revision == 3
    await caller.start("failed")
    assert await caller.shell("failed", "cat /note") == "failed\n"


@pytest.mark.timeout(240)
async def test_a_restore_that_is_killed_after_each_record_is_completed(
    store_daemon: EmbeddedStoreDaemon, rig: Rig
) -> None:
    async with Caller(store_daemon.daemon.target) as caller:
        await caller.create_volume("data")
        for name in ("one", "gone"):
            await caller.create(name, 1, mounts=[container_pb2.Mount(volume="data", target="/v")])
            await caller.scale(name, cpus=0.5)
        rig.engine.call("DELETE", f"/containers/{(await caller.get('gone')).status.engine_id}?force=1")
        await until_state(caller, "gone", FAILED)
        before = [restorable_container(await caller.get(name)) for name in ("one", "gone")]
        revisions = [await caller.revisions(name) for name in ("one", "gone")]
    await store_daemon.kill()
    store_daemon.delete_store()
    # Each daemon writes one record and dies before the next; the last daemon has only one record to write.
    starts = 0
    while True:
        module = "tests.faults.daemon_killed_at_transaction"
        await store_daemon.start(module=module, environment={DIE_AT: "2"}, serving=False)
        starts += 1
        if await asyncio.to_thread(_serves_or_killed, store_daemon):
            break
        await store_daemon.wait_for_etcd_exit()
    assert starts == len(("the volume", "one", "gone", "a revision of one", "a revision of gone"))
    await store_daemon.kill()
    await store_daemon.start()
    async with Caller(store_daemon.daemon.target) as caller:
        assert [restorable_container(await caller.get(name)) for name in ("one", "gone")] == before
        assert [await caller.revisions(name) for name in ("one", "gone")] == revisions
        assert (await caller.volume("data")).attached_containers == ["gone", "one"]


def _serves_or_killed(store_daemon: EmbeddedStoreDaemon) -> bool:
    """Whether the daemon begins to serve; False if it was killed before that."""
    try:
        store_daemon.daemon.await_serving(30)
    except RigError:
        assert store_daemon.daemon.wait() == -9, store_daemon.daemon.log_text
        return False
    return True


async def test_a_snapshot_without_a_record_of_its_revision_is_reported_and_kept(
    store_daemon: EmbeddedStoreDaemon, rig: Rig
) -> None:
    async with Caller(store_daemon.daemon.target) as caller:
        for name in ("one", "gone"):
            await caller.create(name, 1)
            await caller.update(name, "env", env={"A": "b"})
        kept, removed = await caller.get("one"), await caller.get("gone")
    root = rig.engine.call("GET", "/info")["DockerRootDir"]
    folders = {
        container.uid: Path(root, "gpudock", "snapshots", store_daemon.node, container.uid)
        for container in (kept, removed)
    }
    await store_daemon.kill()
    rig.engine.call("DELETE", f"/containers/{removed.status.engine_id}?force=1")
    for folder in folders.values():
        for entry in folder.glob("*.json"):
            entry.unlink()
    store_daemon.delete_store()
    await store_daemon.start()
    async with Caller(store_daemon.daemon.target) as caller:
        await wait_for_passes(caller)
        findings = {
            finding.container_uid: finding
            for finding in await list_drift(caller, kinds=[drift_pb2.DRIFT_KIND_SNAPSHOT_UNKNOWN])
        }
        assert set(findings) == {kept.uid, removed.uid}
        assert (findings[kept.uid].container, findings[kept.uid].actual) == ("one", "revision 1")
        assert all((folder / "1" / "tree").is_dir() for folder in folders.values())
        assert (await failure(caller.rollback("one", 1))).reason == "REVISION_NOT_FOUND"
        adopted, *more = await caller.revisions("one")
        assert (adopted.revision, adopted.cause) == (2, container_revision_pb2.REVISION_CAUSE_ADOPTED)
        assert not more
        # The next revision gets the next number, and deleting the container deletes its snapshots.
        assert (await caller.update("one", "env", env={"A": "c"})).revision == 3
        await caller.delete("one")
        assert not folders[kept.uid].exists()
