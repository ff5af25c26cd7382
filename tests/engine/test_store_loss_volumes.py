"""The whole store lost: everything that disks and engine still know is back, and nothing takes its place meanwhile."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import pytest
from gpudock.v1 import container_pb2, volume_pb2
from gpudock_server.adapters.etcd.values import encode
from gpudock_server.model.volume import VolumeBacking

from tests.calls import Caller, failure
from tests.engine.drift import KIND, REPAIRED, REPORTED, drift, found, passed, state_of
from tests.engine.isolated_daemons import FREQUENT_RECONCILE, IsolatedDaemons, daemons
from tests.engine.store_loss import EmbeddedStoreDaemon, restorable_volume, store_daemon
from tests.rig import Rig

__all__ = ["daemons", "store_daemon"]

MIB = 1 << 20
SIZE = 320 * MIB
LOOP = volume_pb2.VOLUME_BACKEND_LOOP
RUNNING = container_pb2.CONTAINER_STATE_RUNNING


def mount(volume: str, target: str = "/data") -> container_pb2.Mount:
    """A volume, mounted."""
    return container_pb2.Mount(volume=volume, target=target)


def pruned(rig: Rig, engine_volume: str) -> None:
    """`docker volume prune -a`, of one that nothing uses."""
    rig.engine.call("DELETE", f"/volumes/{engine_volume}")


@pytest.mark.deep
async def test_volumes_of_every_kind_come_back(store_daemon: EmbeddedStoreDaemon, rig: Rig) -> None:
    names = ("mounted", "idle", "plain", "theirs", "pruned")
    rig.engine.call("POST", "/volumes/create", send={"Name": "theirs-in-engine", "Labels": {"gpudock.adopt": "true"}})
    async with Caller(store_daemon.daemon.target) as caller:
        await caller.create_volume("mounted", SIZE, backend=LOOP, owner="alice", labels={"a": "b"})
        await caller.create_volume("idle", SIZE, backend=LOOP)
        await caller.resize_volume("idle", SIZE + 16 * MIB)
        await caller.create_volume("plain", owner="bob", labels={"c": "d"})
        await caller.adopt_volume("theirs", "theirs-in-engine")
        await caller.create_volume("pruned", SIZE, backend=LOOP)
        mounts = [mount("mounted", "/v"), mount("plain", "/p"), mount("theirs", "/t")]
        await caller.create("one", mounts=mounts)
        await caller.shell("one", "for each in v p t; do echo $each > /$each/x; done; sync")
        await caller.create("filler", mounts=[mount("pruned")])
        await caller.shell("filler", "echo pruned > /data/x && sync")
        await caller.delete("filler")
        pruned(rig, f"gpudock-{(await caller.volume('pruned')).uid}")
        before = {name: restorable_volume(await caller.volume(name)) for name in names}
    await store_daemon.lose_store()
    async with Caller(store_daemon.daemon.target) as caller:
        after = {name: restorable_volume(await caller.volume(name)) for name in names}
        # Of an engine volume that was taken in as it is, nothing says more than that a container has it mounted.
        for field in ("uid", "create_time"):
            before["theirs"].ClearField(field)
            after["theirs"].ClearField(field)
        assert after == before
        assert {one.volume for one in await list_drift(caller) if one.remedy == REPAIRED and one.volume} == set(names)
        await caller.update("one", "env", env={"A": "b"})
        assert await caller.shell("one", "cat /v/x /p/x /t/x") == "v\np\nt\n"
        await caller.create("reader", mounts=[mount("pruned")])
        assert await caller.shell("reader", "cat /data/x") == "pruned\n"
        refused = await failure(caller.create_volume("mounted", SIZE))
        assert refused.reason == "VOLUME_EXISTS"
        assert (await caller.resize_volume("idle", SIZE + 32 * MIB)).result.revision == 2
        await wait_for_passes(caller)
        assert not [one for one in await list_drift(caller) if one.volume], "found once"
        await caller.delete("one")
        await caller.delete("reader")
        for name in names:
            await caller.delete_volume(name)
        await wait_for_passes(caller)
        assert not [one for one in await list_drift(caller) if one.volume], "deleted is deleted"


@pytest.mark.deep
async def test_a_volume_that_cannot_be_restored_is_reported_and_keeps_its_name(
    store_daemon: EmbeddedStoreDaemon, rig: Rig
) -> None:
    async with Caller(store_daemon.daemon.target) as caller:
        made = await caller.create_volume("data")
        damaged = await caller.create_volume("damaged", SIZE, backend=LOOP)
    other = "6fa459ea-ee8a-4ca4-894e-db77e160355e"
    labels = {"gpudock.uid": other, "gpudock.name": "data", "gpudock.node": store_daemon.node}
    rig.engine.call("POST", "/volumes/create", send={"Name": "other", "Labels": labels})
    record = _folder(rig, damaged.uid) / "volume.json"
    whole = record.read_text()
    record.write_text("scribble")
    await store_daemon.lose_store()
    async with Caller(store_daemon.daemon.target) as caller:
        findings = await list_drift(caller, kinds=[KIND("DRIFT_KIND_VOLUME_UNKNOWN")])
        assert {(one.volume, one.container_uid, one.remedy) for one in findings} == {
            ("data", made.uid, REPORTED),
            ("data", other, REPORTED),
            ("damaged", damaged.uid, REPORTED),
        }
        for name in ("data", "damaged"):
            refused = await failure(caller.create_volume(name))
            assert (refused.code, refused.reason) == (grpc.StatusCode.ALREADY_EXISTS, "VOLUME_EXISTS"), refused
            assert refused.metadata["engine_volume"]
        # What stands against it taken away, it comes back at the next pass.
        pruned(rig, "other")
        record.write_text(whole)
        await wait_for_drift(caller, "VOLUME_RECORD_LOST", REPAIRED)
        await wait_for_passes(caller)
        assert (await caller.volume("data")).uid == made.uid
        assert (await caller.volume("damaged")).uid == damaged.uid
        await caller.delete_volume("data")
        await caller.delete_volume("damaged")


def _folder(rig: Rig, uid: str) -> Path:
    shown = rig.engine.call("GET", f"/volumes/gpudock-{uid}")
    # The engine has a mount namespace of its own.
    return Path(f"/proc/{rig.namespaces.pid}/root", shown["Options"]["device"].lstrip("/")).parent


@pytest.mark.deep
async def test_what_an_older_version_made_comes_back(store_daemon: EmbeddedStoreDaemon, rig: Rig) -> None:
    async with Caller(store_daemon.daemon.target) as caller:
        made = await caller.create_volume("old", SIZE, backend=LOOP)
    record = _folder(rig, made.uid) / "volume.json"
    kept = json.loads(record.read_text())
    del kept["volume"]
    record.write_text(json.dumps(kept))
    engine_volume = f"gpudock-{made.uid}"
    shown = rig.engine.call("GET", f"/volumes/{engine_volume}")
    pruned(rig, engine_volume)
    labels = {key: value for key, value in shown["Labels"].items() if key != "gpudock.volume"}
    again = {"Name": engine_volume, "Labels": labels, "DriverOpts": shown["Options"]}
    rig.engine.call("POST", "/volumes/create", send=again)
    await store_daemon.lose_store()
    async with Caller(store_daemon.daemon.target) as caller:
        back = await caller.volume("old")
        assert (back.uid, back.size_bytes, back.backend, back.owner) == (made.uid, SIZE, LOOP, "")
        await caller.delete_volume("old")


@pytest.mark.deep
async def test_another_nodes_volumes_are_left(daemons: IsolatedDaemons, store_daemon: EmbeddedStoreDaemon) -> None:
    async with Caller(store_daemon.daemon.target) as caller:
        await caller.create_volume("data", SIZE, backend=LOOP)
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
async def test_no_empty_volume_takes_the_place_of_one_that_was_removed(caller: Caller, rig: Rig) -> None:
    data = await caller.create_volume("data", SIZE, backend=LOOP)
    plain = await caller.create_volume("plain")
    await caller.create("filler", mounts=[mount("data")])
    await caller.shell("filler", "echo kept > /data/x && sync")
    await caller.delete("filler")
    for each in (data, plain):
        pruned(rig, f"gpudock-{each.uid}")
    await caller.create("reader", mounts=[mount("data")])
    assert await caller.shell("reader", "cat /data/x") == "kept\n"
    refused = await failure(caller.create("empty", mounts=[mount("plain")]))
    assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VOLUME_FAILED"), refused
    assert "was removed outside gpudock" in refused.message


async def test_no_change_mounts_other_files_than_a_container_has(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start(*FREQUENT_RECONCILE)
    async with Caller(daemon.target) as caller, state_of(daemons, rig) as state:
        await caller.create_volume("data")
        await caller.create_volume("empty")
        await caller.create("one", mounts=[mount("data")])
        view, other = await state.store.volume("data"), await state.store.volume("empty")
        assert view is not None
        assert other is not None
        wrong = view.volume.changed(backing=other.volume.backing)
        await state.put(state.keys.volume("data"), encode(wrong))
        refused = await failure(caller.update("one", "env", env={"A": "b"}))
        assert (refused.code, refused.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "VOLUME_DIFFERS"), refused
        assert refused.metadata["engine_volume"] == _engine_volume(view.volume.backing)
        assert (await caller.get("one")).status.state == RUNNING
        # Without the record, its name is not given to another one.
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
