"""WatchVolumes of a real daemon: every change of a volume and of its mounts is sent once, also after a resume."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from gpudock import Client
from gpudock.v1 import container_pb2, volume_pb2, volume_service_pb2
from gpudock_server.adapters.etcd import EmbeddedEtcd
from gpudock_server.model.spec import Mount

from tests.calls import Caller, failure
from tests.engine.conditions import until_true
from tests.engine.etcd_examples import container
from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.engine.watch_calls import EVENT_SECONDS, FREQUENT_CHECKPOINTS, StoreWriter, VolumeWatch, open_writer
from tests.rig import Rig
from tests.rig.patience import limit

pytest_plugins = ["tests.engine.etcd_fixtures"]

__all__ = ["daemons"]


def mount(name: str) -> container_pb2.Mount:
    """A mount of a volume at `/NAME`."""
    return container_pb2.Mount(volume=name, target=f"/{name}")


async def put_container_with_volumes(writer: StoreWriter, name: str, revision: int, *volumes: str) -> None:
    """Write the record of a container that mounts volumes."""
    mounts = tuple(Mount(volume=volume, target=f"/{volume}") for volume in volumes)
    await writer.put(name, revision, spec=container("any").spec.changed(mounts=mounts))


async def volume_without_usage(caller: Caller, name: str) -> volume_pb2.Volume:
    """A volume as a watch sends it."""
    volume = await caller.volume(name)
    volume.ClearField("used_bytes")
    return volume


async def test_a_watch_sends_every_change_of_a_volume_from_create_to_delete(caller: Caller) -> None:
    await caller.create_volume("before")
    watch = VolumeWatch(caller)
    assert await watch.initial_names() == ["before"]
    await caller.create_volume("data")
    kind, last = await watch.change()
    assert (kind, last.state) == ("added", volume_pb2.VOLUME_STATE_CREATING)
    assert last.operation_id
    while last.operation_id:
        kind, last = await watch.change()
        assert kind == "modified"
    assert last == await volume_without_usage(caller, "data")
    assert last.state == volume_pb2.VOLUME_STATE_READY
    await caller.create("web", mounts=[mount("data")])
    kind, last = await watch.change()
    assert (kind, list(last.attached_containers)) == ("modified", ["web"])
    assert last == await volume_without_usage(caller, "data")
    # A stop changes the container, but not its mounts, so it causes no event.
    await caller.stop("web")
    await caller.update("web", mounts=[mount("before")])
    events: dict[str, volume_pb2.Volume] = {}
    while len(events) < 2 or events["data"].attached_containers:
        kind, last = await watch.change()
        assert kind == "modified"
        events[last.name] = last
    assert list(events["before"].attached_containers) == ["web"]
    while events["before"].operation_id:
        kind, events["before"] = await watch.change()
    assert events == {name: await volume_without_usage(caller, name) for name in ("before", "data")}
    await caller.delete_volume("data")
    while (event := await watch.change())[0] == "modified":
        last = event[1]
    assert event == ("deleted", last), "a deleted event has the last state"
    await caller.delete("web")
    kind, last = await watch.change()
    assert (kind, last.name, list(last.attached_containers)) == ("modified", "before", [])
    watch.call.cancel()


async def test_a_watch_continues_after_a_list_with_the_same_filter(caller: Caller) -> None:
    own_events = volume_service_pb2.VolumeFilter(labels={"team": "ml"})
    await caller.create_volume("mine", labels={"team": "ml"})
    await caller.create_volume("other")
    listed = await caller.volumes.ListVolumes(volume_service_pb2.ListVolumesRequest(filter=own_events))
    await caller.create("web", mounts=[mount("mine"), mount("other")])
    watch = VolumeWatch(caller, listed.resume_token, labels={"team": "ml"})
    assert (await watch.event())[0] == "checkpoint", "a resumed watch begins with a checkpoint"
    assert await watch.mount_changes(1) == ["modified mine.1 web"]
    watch.call.cancel()
    failed = await VolumeWatch(caller, watch.token).failure()
    assert (failed.code, failed.violations) == (grpc.StatusCode.INVALID_ARGUMENT, ("resume_token",))


async def test_a_watch_resumes_after_kill_9_and_at_another_daemon(daemons: IsolatedDaemons, rig: Rig) -> None:
    first = await daemons.start()
    second = await daemons.start(node=f"second-{daemons.id}")
    async with open_writer(rig.etcd.endpoint, daemons.prefix) as writer:
        for name in ("a", "b"):
            await writer.put_volume(name, 1)
        await put_container_with_volumes(writer, "x", 1, "a")
        async with Caller(first.target) as caller:
            watch = VolumeWatch(caller)
            assert await watch.mount_changes(2) == ["added a.1 x", "added b.1"]
            assert (await watch.event())[1].list_complete
            await put_container_with_volumes(writer, "y", 1, "a", "b")
            # One change of a container is a change of two volumes, and the watch ends between the two events.
            assert await watch.mount_changes(1) == ["modified a.1 x y"]
            await asyncio.to_thread(first.kill9)
            between = watch.token
            assert (await watch.failure()).code == grpc.StatusCode.UNAVAILABLE
        await put_container_with_volumes(writer, "x", 2, "a")
        await put_container_with_volumes(writer, "x", 3, "b")
        await writer.put_volume("b", 2)
        await writer.delete("y")
        await writer.delete_volume("a")
        missed_changes = [
            "modified b.1 y",
            "modified a.1 y",
            "modified b.1 x y",
            "modified b.2 x y",
            "modified a.1",
            "modified b.2 x",
            "deleted a.1",
        ]
        successor = await daemons.start(after=first)
        for daemon in (second, successor):
            async with Caller(daemon.target) as caller:
                resumed_watch = VolumeWatch(caller, between)
                assert await resumed_watch.mount_changes(len(missed_changes)) == missed_changes
                resumed_watch.call.cancel()


async def test_the_client_resumes_a_watch(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start()
    events: list[str] = []
    async with open_writer(rig.etcd.endpoint, daemons.prefix) as writer, Client(daemon.target) as client:

        async def collect_events() -> None:
            async for event in client.volumes.watch(owner="alice"):
                assert event.item is not None
                events.append(f"{event.kind} {','.join(event.item.attached_containers)}")
                if event.kind == "deleted":
                    return

        await writer.put_volume("a", 1)
        collecting = asyncio.create_task(collect_events())
        # A watch that begins after the volume was deleted never sees it.
        await until_true(lambda: events, "the watch has begun")
        for number in range(1, 30):
            await put_container_with_volumes(writer, f"c{number:02d}", 1, "a")
            if number in (10, 20):
                await asyncio.to_thread(daemon.kill9 if number == 10 else daemon.stop)
                daemon = await daemons.start(after=daemon)
            await writer.delete(f"c{number:02d}")
        await writer.delete_volume("a")
        await asyncio.wait_for(collecting, limit(EVENT_SECONDS))
    changes = [each for number in range(1, 30) for each in (f"modified c{number:02d}", "modified ")]
    assert events == ["added ", *changes, "deleted "]


async def test_a_token_from_before_a_compaction_is_expired(daemons: IsolatedDaemons, own_etcd: EmbeddedEtcd) -> None:
    endpoint = own_etcd.address.endpoints[0]
    daemon = await daemons.start(*FREQUENT_CHECKPOINTS, etcd_endpoints=endpoint)
    async with Caller(daemon.target) as caller, open_writer(endpoint, daemons.prefix) as writer:
        await writer.put_volume("a", 1)
        await put_container_with_volumes(writer, "x", 1, "a")
        watch = VolumeWatch(caller)
        assert await watch.initial_names() == ["a"]
        old_token = watch.token
        await put_container_with_volumes(writer, "y", 1, "a")
        assert await watch.mount_changes(1) == ["modified a.1 x y"]
        # The token of a checkpoint is newer than changes that affect no volume.
        await put_container_with_volumes(writer, "y", 2, "a")
        while (await watch.event())[0] != "checkpoint":
            pass
        await writer.compact()
        failed = await VolumeWatch(caller, old_token).failure()
        assert (failed.code, failed.reason) == (grpc.StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_EXPIRED")
        resumed_watch = VolumeWatch(caller, watch.token)
        await writer.delete("x")
        for stream in (watch, resumed_watch):
            assert await stream.mount_changes(1) == ["modified a.1 y"]
            stream.call.cancel()
    await asyncio.to_thread(daemon.stop)


@pytest.mark.parametrize("token", ["AAAA", "é" * 40])
async def test_invalid_resume_tokens_are_refused(caller: Caller, token: str) -> None:
    failed = await failure(VolumeWatch(caller, token).call.read())
    assert (failed.code, failed.violations) == (grpc.StatusCode.INVALID_ARGUMENT, ("resume_token",))
