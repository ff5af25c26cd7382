"""WatchVolumes of a real daemon: volumes and who mounts them, told once and as they were."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from gpudock import Client
from gpudock.v1 import container_pb2, volume_pb2, volume_service_pb2
from gpudock_server.adapters.etcd import EmbeddedEtcd
from gpudock_server.model.spec import Mount

from tests.calls import Caller, failure
from tests.engine.etcd_examples import container
from tests.engine.isolated_daemons import IsolatedDaemons, daemons
from tests.engine.watchers import OFTEN, SOON, VolumeWatcher, Writer, writing
from tests.rig import Rig
from tests.rig.patience import limit

pytest_plugins = ["tests.engine.etcd_fixtures"]

__all__ = ["daemons"]


def mount(name: str) -> container_pb2.Mount:
    """A volume, mounted where it is called like it."""
    return container_pb2.Mount(volume=name, target=f"/{name}")


async def put(writer: Writer, name: str, revision: int, *volumes: str) -> None:
    """Write the head of a container that mounts these."""
    mounts = tuple(Mount(volume=volume, target=f"/{volume}") for volume in volumes)
    await writer.put(name, revision, spec=container("any").spec.changed(mounts=mounts))


async def seen(caller: Caller, name: str) -> volume_pb2.Volume:
    """A volume as a watch shows it."""
    volume = await caller.volume(name)
    volume.ClearField("used_bytes")
    return volume


async def test_the_life_of_a_volume(caller: Caller) -> None:
    await caller.create_volume("before")
    watcher = VolumeWatcher(caller)
    assert await watcher.listed() == ["before"]
    await caller.create_volume("data")
    kind, last = await watcher.change()
    assert (kind, last.state) == ("added", volume_pb2.VOLUME_STATE_CREATING)
    assert last.operation_id
    while last.operation_id:
        kind, last = await watcher.change()
        assert kind == "modified"
    assert last == await seen(caller, "data")
    assert last.state == volume_pb2.VOLUME_STATE_READY
    await caller.create("web", mounts=[mount("data")])
    kind, last = await watcher.change()
    assert (kind, list(last.attached_containers)) == ("modified", ["web"])
    assert last == await seen(caller, "data")
    # It changes in many ways, and mounts what it mounted.
    await caller.stop("web")
    await caller.update("web", mounts=[mount("before")])
    told: dict[str, volume_pb2.Volume] = {}
    while len(told) < 2 or told["data"].attached_containers:
        kind, last = await watcher.change()
        assert kind == "modified"
        told[last.name] = last
    assert list(told["before"].attached_containers) == ["web"]
    while told["before"].operation_id:
        kind, told["before"] = await watcher.change()
    assert told == {name: await seen(caller, name) for name in ("before", "data")}
    await caller.delete_volume("data")
    while (event := await watcher.change())[0] == "modified":
        last = event[1]
    assert event == ("deleted", last), "with its last state"
    await caller.delete("web")
    kind, last = await watcher.change()
    assert (kind, last.name, list(last.attached_containers)) == ("modified", "before", [])
    watcher.call.cancel()


async def test_a_list_goes_on_as_a_watch_of_the_same_volumes(caller: Caller) -> None:
    mine = volume_service_pb2.VolumeFilter(labels={"team": "ml"})
    await caller.create_volume("mine", labels={"team": "ml"})
    await caller.create_volume("other")
    listed = await caller.volumes.ListVolumes(volume_service_pb2.ListVolumesRequest(filter=mine))
    await caller.create("web", mounts=[mount("mine"), mount("other")])
    watcher = VolumeWatcher(caller, listed.resume_token, labels={"team": "ml"})
    assert (await watcher.event())[0] == "checkpoint", "says that it has begun"
    assert await watcher.mounted(1) == ["modified mine.1 web"]
    watcher.call.cancel()
    failed = await VolumeWatcher(caller, watcher.token).failure()
    assert (failed.code, failed.violations) == (grpc.StatusCode.INVALID_ARGUMENT, ("resume_token",))


async def test_it_goes_on_after_kill_and_at_another_daemon(daemons: IsolatedDaemons, rig: Rig) -> None:
    first = await daemons.start()
    second = await daemons.start(node=f"second-{daemons.id}")
    async with writing(rig.etcd.endpoint, daemons.prefix) as writer:
        for name in ("a", "b"):
            await writer.put_volume(name, 1)
        await put(writer, "x", 1, "a")
        async with Caller(first.target) as caller:
            watcher = VolumeWatcher(caller)
            assert await watcher.mounted(2) == ["added a.1 x", "added b.1"]
            assert (await watcher.event())[1].list_complete
            await put(writer, "y", 1, "a", "b")
            # One change of a container is one of each volume, and between the two a watch may end.
            assert await watcher.mounted(1) == ["modified a.1 x y"]
            await asyncio.to_thread(first.kill9)
            between = watcher.token
            assert (await watcher.failure()).code == grpc.StatusCode.UNAVAILABLE
        await put(writer, "x", 2, "a")
        await put(writer, "x", 3, "b")
        await writer.put_volume("b", 2)
        await writer.delete("y")
        await writer.delete_volume("a")
        missed = [
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
                resumed = VolumeWatcher(caller, between)
                assert await resumed.mounted(len(missed)) == missed
                resumed.call.cancel()


async def test_the_client_goes_on_by_itself(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start()
    told: list[str] = []
    async with writing(rig.etcd.endpoint, daemons.prefix) as writer, Client(daemon.target) as client:

        async def follow() -> None:
            async for event in client.volumes.watch(owner="alice"):
                assert event.item is not None
                told.append(f"{event.kind} {','.join(event.item.attached_containers)}")
                if event.kind == "deleted":
                    return

        await writer.put_volume("a", 1)
        following = asyncio.create_task(follow())
        for number in range(1, 30):
            await put(writer, f"c{number:02d}", 1, "a")
            if number in (10, 20):
                await asyncio.to_thread(daemon.kill9 if number == 10 else daemon.stop)
                daemon = await daemons.start(after=daemon)
            await writer.delete(f"c{number:02d}")
        await writer.delete_volume("a")
        await asyncio.wait_for(following, limit(SOON))
    # It may have begun when some had come and gone already.
    first = 29 - (len(told) - 2) // 2
    expected = [each for number in range(first + 1, 30) for each in (f"modified c{number:02d}", "modified ")]
    assert told[-1] == "deleted "
    assert told[-1 - len(expected) : -1] == expected
    assert told[0].startswith("added ")


async def test_what_was_compacted_away(daemons: IsolatedDaemons, own_etcd: EmbeddedEtcd) -> None:
    endpoint = own_etcd.address.endpoints[0]
    daemon = await daemons.start(*OFTEN, etcd_endpoints=endpoint)
    async with Caller(daemon.target) as caller, writing(endpoint, daemons.prefix) as writer:
        await writer.put_volume("a", 1)
        await put(writer, "x", 1, "a")
        watcher = VolumeWatcher(caller)
        assert await watcher.listed() == ["a"]
        old = watcher.token
        await put(writer, "y", 1, "a")
        assert await watcher.mounted(1) == ["modified a.1 x y"]
        # A checkpoint moves its token past what is of no concern to volumes.
        await put(writer, "y", 2, "a")
        while (await watcher.event())[0] != "checkpoint":
            pass
        await writer.compact()
        failed = await VolumeWatcher(caller, old).failure()
        assert (failed.code, failed.reason) == (grpc.StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_EXPIRED")
        resumed = VolumeWatcher(caller, watcher.token)
        await writer.delete("x")
        for stream in (watcher, resumed):
            assert await stream.mounted(1) == ["modified a.1 y"]
            stream.call.cancel()
    await asyncio.to_thread(daemon.stop)


@pytest.mark.parametrize("token", ["AAAA", "é" * 40])
async def test_tokens_that_are_none(caller: Caller, token: str) -> None:
    failed = await failure(VolumeWatcher(caller, token).call.read())
    assert (failed.code, failed.violations) == (grpc.StatusCode.INVALID_ARGUMENT, ("resume_token",))
