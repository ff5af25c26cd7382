"""Loss of the store: volumes are restored from the disks and the engine, and no empty volume replaces one."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest
from gpudock.v1 import container_pb2, volume_pb2
from gpudock_server.adapters.etcd.values import encode
from gpudock_server.model.volume import VolumeBacking

from tests.calls import Caller, failure
from tests.engine.drift import KIND, REPAIRED, REPORTED, list_drift, state_of, wait_for_drift, wait_for_passes
from tests.engine.isolated_daemons import FREQUENT_RECONCILE, IsolatedDaemons, daemons
from tests.engine.store_loss import EmbeddedStoreDaemon, restorable_volume, store_daemon
from tests.engine.volume_fixtures import mount
from tests.rig import Rig

__all__ = ["daemons", "store_daemon"]

MIB = 1 << 20
VOLUME_SIZE = 320 * MIB
LOOP = volume_pb2.VOLUME_BACKEND_LOOP
RUNNING = container_pb2.CONTAINER_STATE_RUNNING


def remove_engine_volume(rig: Rig, engine_volume: str) -> None:
    """Remove an engine volume, as `docker volume prune -a` does to an unused one."""
    rig.engine.call("DELETE", f"/volumes/{engine_volume}")


@pytest.mark.deep
async def test_volumes_of_every_kind_are_restored(store_daemon: EmbeddedStoreDaemon, rig: Rig) -> None:
    names = ("mounted", "idle", "plain", "theirs", "pruned")
    rig.engine.call("POST", "/volumes/create", send={"Name": "theirs-in-engine", "Labels": {"gpudock.adopt": "true"}})
    async with Caller(store_daemon.daemon.target) as caller:
        await caller.create_volume("mounted", VOLUME_SIZE, backend=LOOP, owner="alice", labels={"a": "b"})
        await caller.create_volume("idle", VOLUME_SIZE, backend=LOOP)
        await caller.resize_volume("idle", VOLUME_SIZE + 16 * MIB)
        await caller.create_volume("plain", owner="bob", labels={"c": "d"})
        await caller.adopt_volume("theirs", "theirs-in-engine")
        await caller.create_volume("pruned", VOLUME_SIZE, backend=LOOP)
        mounts = [mount("mounted", "/v"), mount("plain", "/p"), mount("theirs", "/t")]
        await caller.create("one", mounts=mounts)
        await caller.shell("one", "for each in v p t; do echo $each > /$each/x; done; sync")
        await caller.create("filler", mounts=[mount("pruned")])
        await caller.shell("filler", "echo pruned > /data/x && sync")
        await caller.delete("filler")
        remove_engine_volume(rig, f"gpudock-{(await caller.volume('pruned')).uid}")
        before = {name: restorable_volume(await caller.volume(name)) for name in names}
    await store_daemon.lose_store()
    async with Caller(store_daemon.daemon.target) as caller:
        after = {name: restorable_volume(await caller.volume(name)) for name in names}
        # An engine volume that was adopted in place has no labels of gpudock: only a container's mount names it.
        for field in ("uid", "create_time"):
            before["theirs"].ClearField(field)
            after["theirs"].ClearField(field)
        assert after == before
        assert {
            finding.volume for finding in await list_drift(caller) if finding.remedy == REPAIRED and finding.volume
        } == set(names)
        await caller.update("one", "env", env={"A": "b"})
        assert await caller.shell("one", "cat /v/x /p/x /t/x") == "v\np\nt\n"
        await caller.create("reader", mounts=[mount("pruned")])
        assert await caller.shell("reader", "cat /data/x") == "pruned\n"
        refused = await failure(caller.create_volume("mounted", VOLUME_SIZE))
        assert refused.reason == "VOLUME_EXISTS"
        assert (await caller.resize_volume("idle", VOLUME_SIZE + 32 * MIB)).result.revision == 2
        await wait_for_passes(caller)
        assert not [finding for finding in await list_drift(caller) if finding.volume], (
            "a repaired finding is listed once"
        )
        await caller.delete("one")
        await caller.delete("reader")
        for name in names:
            await caller.delete_volume(name)
        await wait_for_passes(caller)
        assert not [finding for finding in await list_drift(caller) if finding.volume], (
            "a deleted volume is not restored"
        )


@pytest.mark.deep
async def test_a_volume_that_cannot_be_restored_is_reported_and_keeps_its_name(
    store_daemon: EmbeddedStoreDaemon, rig: Rig
) -> None:
    async with Caller(store_daemon.daemon.target) as caller:
        created = await caller.create_volume("data")
        damaged = await caller.create_volume("damaged", VOLUME_SIZE, backend=LOOP)
    other = "6fa459ea-ee8a-4ca4-894e-db77e160355e"
    labels = {"gpudock.uid": other, "gpudock.name": "data", "gpudock.node": store_daemon.node}
    rig.engine.call("POST", "/volumes/create", send={"Name": "other", "Labels": labels})
    record = _backing_folder(rig, damaged.uid) / "volume.json"
    whole = record.read_text()
    record.write_text("scribble")
    await store_daemon.lose_store()
    async with Caller(store_daemon.daemon.target) as caller:
        findings = await list_drift(caller, kinds=[KIND("DRIFT_KIND_VOLUME_UNKNOWN")])
        assert {(finding.volume, finding.container_uid, finding.remedy) for finding in findings} == {
            ("data", created.uid, REPORTED),
            ("data", other, REPORTED),
            ("damaged", damaged.uid, REPORTED),
        }
        for name in ("data", "damaged"):
            refused = await failure(caller.create_volume(name))
            assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "VOLUME_EXISTS"), refused
            assert refused.metadata["engine_volume"]
        # Once the conflicts are removed, the next comparison restores both.
        remove_engine_volume(rig, "other")
        record.write_text(whole)
        await wait_for_drift(caller, "VOLUME_RECORD_LOST", REPAIRED)
        await wait_for_passes(caller)
        assert (await caller.volume("data")).uid == created.uid
        assert (await caller.volume("damaged")).uid == damaged.uid
        await caller.delete_volume("data")
        await caller.delete_volume("damaged")


def _backing_folder(rig: Rig, uid: str) -> Path:
    engine_volume_state = rig.engine.call("GET", f"/volumes/gpudock-{uid}")
    # The path is valid in the engine's mount namespace.
    return Path(f"/proc/{rig.namespaces.pid}/root", engine_volume_state["Options"]["device"].lstrip("/")).parent


@pytest.mark.deep
async def test_a_volume_of_an_older_version_is_restored(store_daemon: EmbeddedStoreDaemon, rig: Rig) -> None:
    async with Caller(store_daemon.daemon.target) as caller:
        created = await caller.create_volume("old", VOLUME_SIZE, backend=LOOP)
    record = _backing_folder(rig, created.uid) / "volume.json"
    kept = json.loads(record.read_text())
    del kept["volume"]
    record.write_text(json.dumps(kept))
    engine_volume = f"gpudock-{created.uid}"
    engine_volume_state = rig.engine.call("GET", f"/volumes/{engine_volume}")
    remove_engine_volume(rig, engine_volume)
    labels = {key: value for key, value in engine_volume_state["Labels"].items() if key != "gpudock.volume"}
    recreated = {"Name": engine_volume, "Labels": labels, "DriverOpts": engine_volume_state["Options"]}
    rig.engine.call("POST", "/volumes/create", send=recreated)
    await store_daemon.lose_store()
    async with Caller(store_daemon.daemon.target) as caller:
        restored = await caller.volume("old")
        assert (restored.uid, restored.size_bytes, restored.backend, restored.owner) == (
            created.uid,
            VOLUME_SIZE,
            LOOP,
            "",
        )
        await caller.delete_volume("old")


@pytest.mark.deep
async def test_the_volumes_of_another_node_are_left_alone(
    daemons: IsolatedDaemons, store_daemon: EmbeddedStoreDaemon
) -> None:
    async with Caller(store_daemon.daemon.target) as caller:
        await caller.create_volume("data", VOLUME_SIZE, backend=LOOP)
        await caller.create_volume("plain")
        await caller.create("one", mounts=[mount("plain")])
        other = await daemons.start(*FREQUENT_RECONCILE, node=f"{daemons.node}-other")
        async with Caller(other.target) as elsewhere:
            await wait_for_passes(elsewhere)
            for name in ("data", "plain"):
                assert (await failure(elsewhere.volume(name))).reason == "VOLUME_NOT_FOUND"
            assert not await list_drift(elsewhere)
        await caller.delete("one")
        await caller.delete_volume("data")
        await caller.delete_volume("plain")


@pytest.mark.deep
async def test_no_empty_volume_replaces_a_removed_engine_volume(caller: Caller, rig: Rig) -> None:
    data = await caller.create_volume("data", VOLUME_SIZE, backend=LOOP)
    plain = await caller.create_volume("plain")
    await caller.create("filler", mounts=[mount("data")])
    await caller.shell("filler", "echo kept > /data/x && sync")
    await caller.delete("filler")
    for volume in (data, plain):
        remove_engine_volume(rig, f"gpudock-{volume.uid}")
    await caller.create("reader", mounts=[mount("data")])
    assert await caller.shell("reader", "cat /data/x") == "kept\n"
    refused = await failure(caller.create("empty", mounts=[mount("plain")]))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VOLUME_FAILED"), refused
    assert "removed outside gpudock" in refused.message


async def test_no_change_mounts_other_files_than_a_container_has(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start(*FREQUENT_RECONCILE)
    async with Caller(daemon.target) as caller, state_of(daemons, rig) as state:
        await caller.create_volume("data")
        await caller.create_volume("empty")
        await caller.create("one", mounts=[mount("data")])
        view, other = await state.store.volume("data"), await state.store.volume("empty")
        assert view is not None
        assert other is not None
        changed_volume = view.volume.changed(backing=other.volume.backing)
        await state.put(state.keys.volume("data"), encode(changed_volume))
        refused = await failure(caller.update("one", "env", env={"A": "b"}))
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VOLUME_DIFFERS"), refused
        assert refused.metadata["engine_volume"] == _engine_volume(view.volume.backing)
        assert (await caller.get("one")).status.state == RUNNING
        # The record is restored before another volume can get its name.
        await state.put(state.keys.volume("data"), encode(view.volume))
        await state.delete(state.keys.volume("data"))
        await wait_for_drift(caller, "VOLUME_RECORD_LOST", REPAIRED)
        assert (await caller.volume("data")).uid == view.volume.uid
        await caller.update("one", "env", env={"A": "b"})
        await caller.delete("one")
        await caller.delete_volume("data")
        await caller.delete_volume("empty")


def _engine_volume(backing: VolumeBacking | None) -> str:
    assert backing is not None
    return backing.engine_volume
