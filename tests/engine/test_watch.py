"""WatchContainers of a real daemon: what is told, that it is told once, and that it goes on after anything."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import grpc
import pytest
from gpudock import Client
from gpudock.v1 import container_pb2, container_service_pb2
from gpudock_server.adapters.etcd import EmbeddedEtcd

from tests.calls import Caller
from tests.engine.etcd_examples import container
from tests.engine.isolated_daemons import IsolatedDaemons, daemons, until
from tests.engine.watchers import OFTEN, SOON, Watcher, writing
from tests.rig import Daemon, Rig
from tests.rig.patience import limit

pytest_plugins = ["tests.engine.etcd_fixtures"]

__all__ = ["daemons"]

RUNNING, STOPPED = container_pb2.CONTAINER_STATE_RUNNING, container_pb2.CONTAINER_STATE_STOPPED


def large(number: int) -> dict[str, Any]:
    """A spec of 200 KB."""
    return {"spec": container("a").spec.model_copy(update={"env": {"LARGE": f"{number} " + "x" * 200_000}})}


async def test_the_life_of_a_container(caller: Caller) -> None:
    await caller.create("before")
    watcher = Watcher(caller)
    assert await watcher.listed() == ["before"]
    created = await caller.create("web", gpus=1)
    kind, first = await watcher.change()
    assert kind == "added"
    assert first.status.state == container_pb2.CONTAINER_STATE_CREATING
    operation = first.status.operation_id
    assert operation
    last = first
    while last.status.operation_id:
        kind, last = await watcher.change()
        assert kind == "modified"
        assert last.status.operation_id in (operation, "")
    assert last == created == await caller.get("web")
    stopped = await caller.stop("web")
    while last.status.state != STOPPED or last.status.operation_id:
        kind, last = await watcher.change()
        assert kind == "modified"
    assert last == stopped
    await caller.delete("web")
    while (event := await watcher.change())[0] == "modified":
        last = event[1]
    assert event[0] == "deleted"
    assert event[1] == last, "with its last state"
    watcher.call.cancel()


async def test_a_filter_tells_what_begins_and_ceases_to_match(caller: Caller) -> None:
    watcher = Watcher(caller, states=[RUNNING], labels={"team": "ml"})
    assert await watcher.listed() == []
    await caller.create("other")
    created = await caller.create("web", labels={"team": "ml"})
    kind, item = await watcher.change()
    assert (kind, item.name, item.status.state) == ("added", "web", RUNNING)
    await caller.stop("web")
    gone = watcher.token
    while kind != "deleted":
        gone = watcher.token
        kind, item = await watcher.change()
    assert item.status.state == RUNNING, "what it was when it still matched"
    assert item.uid == created.uid
    await caller.start("web")
    # A watch that resumes before it tells the same as the one that saw it.
    for again in (watcher, Watcher(caller, gone, states=[RUNNING], labels={"team": "ml"})):
        kind, item = await again.change()
        if again is not watcher:
            assert kind == "deleted"
            kind, item = await again.change()
        assert (kind, item.name, item.status.state) == ("added", "web", RUNNING)
        again.call.cancel()


async def test_a_list_goes_on_as_a_watch(caller: Caller) -> None:
    await caller.create("a")
    filters = container_service_pb2.ContainerFilter(states=[RUNNING])
    listed = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest(filter=filters))
    await caller.delete("a")
    watcher = Watcher(caller, listed.resume_token, states=[RUNNING])
    assert (await watcher.event())[0] == "checkpoint", "says that it has begun"
    while (event := await watcher.change())[0] == "modified":
        pass
    assert event[0] == "deleted"
    watcher.call.cancel()


async def test_tokens_that_are_none(caller: Caller) -> None:
    await caller.create("a")
    watcher = Watcher(caller)
    await watcher.listed()
    watcher.call.cancel()
    listing = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest())
    for token, asked in (
        (watcher.token, {"owner": "alice"}),
        (watcher.token[:-2], {}),
        ("AAAA", {}),
        ("é" * 40, {}),
        (listing.resume_token, {"states": [RUNNING]}),
    ):
        failed = await Watcher(caller, token, **asked).failure()
        assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
        assert failed.violations == ("resume_token",)
    failed = await Watcher(caller, "AAAA", states=[99]).failure()
    assert set(failed.violations) == {"resume_token", "filter.states"}


async def test_it_goes_on_after_kill_and_at_another_daemon(daemons: IsolatedDaemons, rig: Rig) -> None:
    first = await daemons.start()
    second = await daemons.start(node=f"second-{daemons.id}")
    async with writing(rig.etcd.endpoint, daemons.prefix) as writer:
        async with Caller(first.target) as caller:
            watcher = Watcher(caller)
            assert await watcher.listed() == []
            await writer.put("a", 1)
            assert await watcher.changes(1) == [("added", "a.1")]
            await asyncio.to_thread(first.kill9)
            assert (await watcher.failure()).code == grpc.StatusCode.UNAVAILABLE
        await writer.put("a", 2)
        await writer.put("b", 1)
        await writer.delete("a")
        missed = [("modified", "a.2"), ("added", "b.1"), ("deleted", "a.2")]
        successor = await daemons.start(after=first)
        for daemon in (second, successor):
            async with Caller(daemon.target) as caller:
                resumed = Watcher(caller, watcher.token)
                assert await resumed.changes(3) == missed
                resumed.call.cancel()


async def test_the_client_goes_on_by_itself(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start()
    told: list[tuple[str, str]] = []
    async with writing(rig.etcd.endpoint, daemons.prefix) as writer, Client(daemon.target) as client:

        async def follow() -> None:
            async for event in client.containers.watch(owner="alice"):
                assert event.item is not None
                told.append((event.kind, f"{event.item.name}.{event.item.revision}"))
                if event.kind == "deleted":
                    return

        async def begun() -> bool:
            return bool(told)

        await writer.put("a", 1)
        following = asyncio.create_task(follow())
        await until(begun)
        for revision in range(2, 40):
            await writer.put("a", revision)
            if revision in (10, 25):
                await asyncio.to_thread(daemon.kill9 if revision == 10 else daemon.stop)
                daemon = await daemons.start(after=daemon)
        await writer.delete("a")
        await asyncio.wait_for(following, limit(SOON))
    assert told == [
        ("added", "a.1"),
        *[("modified", f"a.{number}") for number in range(2, 40)],
        ("deleted", "a.39"),
    ]


@pytest.mark.deep
async def test_an_etcd_that_is_killed_in_the_middle_is_not_noticed(
    daemons: IsolatedDaemons, own_etcd: EmbeddedEtcd
) -> None:
    endpoint = own_etcd.address.endpoints[0]
    daemon = await daemons.start("--store-timeout", "10", etcd_endpoints=endpoint)
    async with Caller(daemon.target) as caller, writing(endpoint, daemons.prefix) as writer:
        watchers = [Watcher(caller) for _ in range(5)]
        for watcher in watchers:
            await watcher.listed()
        for revision in range(1, 60):
            await writer.put("a", revision)
            if revision % 25 == 0:
                os.kill(own_etcd.pid, signal.SIGKILL)
        expected = [("added", "a.1"), *[("modified", f"a.{number}") for number in range(2, 60)]]
        for watcher in watchers:
            assert await watcher.changes(59) == expected
            watcher.call.cancel()
    await asyncio.to_thread(daemon.stop)


async def test_what_was_compacted_away(daemons: IsolatedDaemons, own_etcd: EmbeddedEtcd) -> None:
    # An etcd of its own: a compaction would take the tokens of everybody else's tests as well.
    endpoint = own_etcd.address.endpoints[0]
    daemon = await daemons.start(*OFTEN, etcd_endpoints=endpoint)
    async with Caller(daemon.target) as caller, writing(endpoint, daemons.prefix) as writer:
        watcher = Watcher(caller)
        await watcher.listed()
        await writer.put("a", 1)
        assert await watcher.changes(1) == [("added", "a.1")]
        old = watcher.token
        await writer.put("a", 2)
        assert await watcher.changes(1) == [("modified", "a.2")]
        await writer.put("a", 3)
        await writer.compact()
        failed = await Watcher(caller, old).failure()
        assert (failed.code, failed.reason) == (grpc.StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_EXPIRED")
        assert await watcher.changes(1) == [("modified", "a.3")], "who keeps up does not notice"
        # A checkpoint's token outlives a compaction of everything before it.
        while (await watcher.event())[0] != "checkpoint":
            pass
        await writer.compact()
        resumed = Watcher(caller, watcher.token)
        await writer.put("a", 4)
        assert await resumed.changes(1) == [("modified", "a.4")]
        for stream in (watcher, resumed):
            stream.call.cancel()
    await asyncio.to_thread(daemon.stop)


async def test_checkpoints_come_when_nothing_else_does(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start(*OFTEN)
    async with Caller(daemon.target) as caller, writing(rig.etcd.endpoint, daemons.prefix) as writer:
        watcher = Watcher(caller, owner="nobody")
        assert await watcher.listed() == []
        loop = asyncio.get_running_loop()
        began, tokens = loop.time(), set()
        for number in range(6):
            # What does not match is nothing to tell, and the token moves on all the same.
            await writer.put("a", number + 1)
            kind, checkpoint = await watcher.event()
            assert kind == "checkpoint"
            assert not checkpoint.list_complete
            tokens.add(watcher.token)
        assert len(tokens) == 6
        assert 0.9 < loop.time() - began < limit(6), "each after at most half a second, as far as this machine keeps up"
        watcher.call.cancel()


@pytest.mark.deep
@pytest.mark.parametrize("filtered", [False, True])
async def test_fifty_watchers_see_each_of_two_hundred_changes_once(
    daemons: IsolatedDaemons, rig: Rig, *, filtered: bool
) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller, writing(rig.etcd.endpoint, daemons.prefix) as writer:
        await writer.put("c00", 1)
        watchers = [Watcher(caller, owner="alice" if filtered else "") for _ in range(50)]
        assert await asyncio.gather(*(watcher.listed() for watcher in watchers)) == [["c00"]] * 50
        readers = [asyncio.create_task(watcher.changes(200)) for watcher in watchers]

        async def write(name: str, first: int) -> None:
            for revision in range(first, first + 20):
                await writer.put(name, revision)

        # Ten containers at once, twenty changes each.
        await asyncio.gather(*(write(f"c{number:02d}", 2 if number == 0 else 1) for number in range(10)))
        told = await asyncio.gather(*readers)
        assert len(set(told[0])) == 200
        for number in range(10):
            name = f"c{number:02d}"
            mine = [(kind, what) for kind, what in told[0] if what.startswith(name)]
            first = 2 if number == 0 else 1
            assert mine == [
                ("added" if revision == 1 else "modified", f"{name}.{revision}")
                for revision in range(first, first + 20)
            ]
        assert all(other == told[0] for other in told), "all in the same order"
        for watcher in watchers:
            watcher.call.cancel()


@pytest.mark.deep
async def test_a_slow_reader_costs_no_memory_and_loses_nothing(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller, writing(rig.etcd.endpoint, daemons.prefix) as writer:
        slow, quick = Watcher(caller), Watcher(caller)
        assert await slow.listed() == await quick.listed() == []
        for revision in range(1, 31):
            await writer.put("a", revision, **large(revision))
        assert len(await quick.changes(30)) == 30
        before = await asyncio.to_thread(_rss, daemon)
        for revision in range(31, 431):
            await writer.put("a", revision, **large(revision))
            # The one that reads is told at once, whatever the other does.
            assert await quick.changes(1) == [("modified", f"a.{revision}")]
        # 80 MB of them.
        grown = await asyncio.to_thread(_rss, daemon) - before
        assert grown < 40_000_000, f"{grown / 1e6:.0f} MB more for who does not read"
        assert await slow.changes(430) == [
            ("added", "a.1"),
            *[("modified", f"a.{revision}") for revision in range(2, 431)],
        ]
        for watcher in (slow, quick):
            watcher.call.cancel()


def _rss(daemon: Daemon) -> int:
    """Bytes of memory that a daemon has."""
    return int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_a_daemon_that_stops_says_so(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller:
        watchers = [Watcher(caller) for _ in range(3)]
        for watcher in watchers:
            await watcher.listed()
        daemon.terminate()
        for watcher in watchers:
            failed = await watcher.failure()
            assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert await asyncio.to_thread(daemon.wait) == 0
    assert "Traceback" not in daemon.log_text


@pytest.mark.deep
async def test_who_hangs_up_leaves_nothing_behind(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller, writing(rig.etcd.endpoint, daemons.prefix) as writer:
        await writer.put("a", 1)
        for _ in range(100):
            watcher = Watcher(caller)
            await watcher.listed()
            watcher.call.cancel()
        before = await asyncio.to_thread(_rss, daemon)
        for _ in range(300):
            watcher = Watcher(caller)
            await watcher.listed()
            watcher.call.cancel()
        await writer.put("a", 2)
        grown = await asyncio.to_thread(_rss, daemon) - before
        assert grown < 10_000_000, f"{grown / 1e6:.1f} MB"
    assert await asyncio.to_thread(daemon.stop) == 0
    assert "Traceback" not in daemon.log_text, daemon.log_text
