"""WatchContainers of a real daemon: every change is sent once, also after a resume."""

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
from tests.engine.watch_calls import EVENT_SECONDS, FREQUENT_CHECKPOINTS, ContainerWatch, open_writer
from tests.rig import Daemon, Rig
from tests.rig.patience import limit

pytest_plugins = ["tests.engine.etcd_fixtures"]

__all__ = ["daemons"]

RUNNING, STOPPED = container_pb2.CONTAINER_STATE_RUNNING, container_pb2.CONTAINER_STATE_STOPPED


def large_spec(number: int) -> dict[str, Any]:
    """Fields of a record whose spec has 200 KB."""
    return {"spec": container("a").spec.model_copy(update={"env": {"LARGE": f"{number} " + "x" * 200_000}})}


async def test_a_watch_sends_every_change_of_a_container_from_create_to_delete(caller: Caller) -> None:
    await caller.create("before")
    watch = ContainerWatch(caller)
    assert await watch.initial_names() == ["before"]
    created = await caller.create("web", gpus=1)
    kind, first = await watch.change()
    assert kind == "added"
    assert first.status.state == container_pb2.CONTAINER_STATE_CREATING
    operation = first.status.operation_id
    assert operation
    last = first
    while last.status.operation_id:
        kind, last = await watch.change()
        assert kind == "modified"
        assert last.status.operation_id in (operation, "")
    assert last == created == await caller.get("web")
    stopped = await caller.stop("web")
    while last.status.state != STOPPED or last.status.operation_id:
        kind, last = await watch.change()
        assert kind == "modified"
    assert last == stopped
    await caller.delete("web")
    while (event := await watch.change())[0] == "modified":
        last = event[1]
    assert event[0] == "deleted"
    assert event[1] == last, "a deleted event has the last state"
    watch.call.cancel()


async def test_containers_that_begin_or_cease_to_match_are_added_or_deleted(caller: Caller) -> None:
    watch = ContainerWatch(caller, states=[RUNNING], labels={"team": "ml"})
    assert await watch.initial_names() == []
    await caller.create("other")
    created = await caller.create("web", labels={"team": "ml"})
    kind, item = await watch.change()
    assert (kind, item.name, item.status.state) == ("added", "web", RUNNING)
    await caller.stop("web")
    token_before_delete = watch.token
    while kind != "deleted":
        token_before_delete = watch.token
        kind, item = await watch.change()
    assert item.status.state == RUNNING, "the last state that matched"
    assert item.uid == created.uid
    await caller.start("web")
    # A watch that resumes before the deletion gets the same events.
    for again in (watch, ContainerWatch(caller, token_before_delete, states=[RUNNING], labels={"team": "ml"})):
        kind, item = await again.change()
        if again is not watch:
            assert kind == "deleted"
            kind, item = await again.change()
        assert (kind, item.name, item.status.state) == ("added", "web", RUNNING)
        again.call.cancel()


async def test_a_watch_continues_after_a_list(caller: Caller) -> None:
    await caller.create("a")
    filters = container_service_pb2.ContainerFilter(states=[RUNNING])
    listed = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest(filter=filters))
    await caller.delete("a")
    watch = ContainerWatch(caller, listed.resume_token, states=[RUNNING])
    assert (await watch.event())[0] == "checkpoint", "a resumed watch begins with a checkpoint"
    while (event := await watch.change())[0] == "modified":
        pass
    assert event[0] == "deleted"
    watch.call.cancel()


async def test_invalid_resume_tokens_are_refused(caller: Caller) -> None:
    await caller.create("a")
    watch = ContainerWatch(caller)
    await watch.initial_names()
    watch.call.cancel()
    listing = await caller.containers.ListContainers(container_service_pb2.ListContainersRequest())
    for token, filters in (
        (watch.token, {"owner": "alice"}),
        (watch.token[:-2], {}),
        ("AAAA", {}),
        ("é" * 40, {}),
        (listing.resume_token, {"states": [RUNNING]}),
    ):
        failed = await ContainerWatch(caller, token, **filters).failure()
        assert failed.code == grpc.StatusCode.INVALID_ARGUMENT
        assert failed.violations == ("resume_token",)
    failed = await ContainerWatch(caller, "AAAA", states=[99]).failure()
    assert set(failed.violations) == {"resume_token", "filter.states"}


async def test_a_watch_resumes_after_kill_9_and_at_another_daemon(daemons: IsolatedDaemons, rig: Rig) -> None:
    first = await daemons.start()
    second = await daemons.start(node=f"second-{daemons.id}")
    async with open_writer(rig.etcd.endpoint, daemons.prefix) as writer:
        async with Caller(first.target) as caller:
            watch = ContainerWatch(caller)
            assert await watch.initial_names() == []
            await writer.put("a", 1)
            assert await watch.changes(1) == [("added", "a.1")]
            await asyncio.to_thread(first.kill9)
            assert (await watch.failure()).code == grpc.StatusCode.UNAVAILABLE
        await writer.put("a", 2)
        await writer.put("b", 1)
        await writer.delete("a")
        missed_changes = [("modified", "a.2"), ("added", "b.1"), ("deleted", "a.2")]
        successor = await daemons.start(after=first)
        for daemon in (second, successor):
            async with Caller(daemon.target) as caller:
                resumed_watch = ContainerWatch(caller, watch.token)
                assert await resumed_watch.changes(3) == missed_changes
                resumed_watch.call.cancel()


async def test_the_client_resumes_a_watch(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start()
    events: list[tuple[str, str]] = []
    async with open_writer(rig.etcd.endpoint, daemons.prefix) as writer, Client(daemon.target) as client:

        async def collect_events() -> None:
            async for event in client.containers.watch(owner="alice"):
                assert event.item is not None
                events.append((event.kind, f"{event.item.name}.{event.item.revision}"))
                if event.kind == "deleted":
                    return

        async def has_events() -> bool:
            return bool(events)

        await writer.put("a", 1)
        collecting = asyncio.create_task(collect_events())
        await until(has_events)
        for revision in range(2, 40):
            await writer.put("a", revision)
            if revision in (10, 25):
                await asyncio.to_thread(daemon.kill9 if revision == 10 else daemon.stop)
                daemon = await daemons.start(after=daemon)
        await writer.delete("a")
        await asyncio.wait_for(collecting, limit(EVENT_SECONDS))
    assert events == [
        ("added", "a.1"),
        *[("modified", f"a.{number}") for number in range(2, 40)],
        ("deleted", "a.39"),
    ]


@pytest.mark.deep
async def test_watches_continue_when_etcd_is_killed(daemons: IsolatedDaemons, own_etcd: EmbeddedEtcd) -> None:
    endpoint = own_etcd.address.endpoints[0]
    daemon = await daemons.start("--store-timeout", "10", etcd_endpoints=endpoint)
    async with Caller(daemon.target) as caller, open_writer(endpoint, daemons.prefix) as writer:
        watches = [ContainerWatch(caller) for _ in range(5)]
        for watch in watches:
            await watch.initial_names()
        for revision in range(1, 60):
            await writer.put("a", revision)
            if revision % 25 == 0:
                os.kill(own_etcd.pid, signal.SIGKILL)
        expected = [("added", "a.1"), *[("modified", f"a.{number}") for number in range(2, 60)]]
        for watch in watches:
            assert await watch.changes(59) == expected
            watch.call.cancel()
    await asyncio.to_thread(daemon.stop)


async def test_a_token_from_before_a_compaction_is_expired(daemons: IsolatedDaemons, own_etcd: EmbeddedEtcd) -> None:
    # A separate etcd, because a compaction also expires the tokens of other tests.
    endpoint = own_etcd.address.endpoints[0]
    daemon = await daemons.start(*FREQUENT_CHECKPOINTS, etcd_endpoints=endpoint)
    async with Caller(daemon.target) as caller, open_writer(endpoint, daemons.prefix) as writer:
        watch = ContainerWatch(caller)
        await watch.initial_names()
        await writer.put("a", 1)
        assert await watch.changes(1) == [("added", "a.1")]
        old_token = watch.token
        await writer.put("a", 2)
        assert await watch.changes(1) == [("modified", "a.2")]
        await writer.put("a", 3)
        await writer.compact()
        failed = await ContainerWatch(caller, old_token).failure()
        assert (failed.code, failed.reason) == (grpc.StatusCode.OUT_OF_RANGE, "RESUME_TOKEN_EXPIRED")
        assert await watch.changes(1) == [("modified", "a.3")], "a watch without a backlog is not affected"
        # The token of a checkpoint stays valid after a compaction.
        while (await watch.event())[0] != "checkpoint":
            pass
        await writer.compact()
        resumed_watch = ContainerWatch(caller, watch.token)
        await writer.put("a", 4)
        assert await resumed_watch.changes(1) == [("modified", "a.4")]
        for stream in (watch, resumed_watch):
            stream.call.cancel()
    await asyncio.to_thread(daemon.stop)


async def test_checkpoints_are_sent_without_matching_changes(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start(*FREQUENT_CHECKPOINTS)
    async with Caller(daemon.target) as caller, open_writer(rig.etcd.endpoint, daemons.prefix) as writer:
        watch = ContainerWatch(caller, owner="no-such-owner")
        assert await watch.initial_names() == []
        loop = asyncio.get_running_loop()
        begin, tokens = loop.time(), set()
        for number in range(6):
            # A change that does not match is not sent, but a later checkpoint has another token.
            await writer.put("a", number + 1)
            before = watch.token
            while watch.token == before:
                kind, checkpoint = await watch.event()
                assert kind == "checkpoint"
                assert not checkpoint.list_complete
            tokens.add(watch.token)
        assert len(tokens) == 6
        assert 0.9 < loop.time() - begin < limit(6), "checkpoints are half a second apart"
        watch.call.cancel()


@pytest.mark.deep
@pytest.mark.parametrize("filtered", [False, True])
async def test_fifty_watches_get_each_of_two_hundred_changes_once_in_the_same_order(
    daemons: IsolatedDaemons, rig: Rig, *, filtered: bool
) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller, open_writer(rig.etcd.endpoint, daemons.prefix) as writer:
        await writer.put("c00", 1)
        watches = [ContainerWatch(caller, owner="alice" if filtered else "") for _ in range(50)]
        assert await asyncio.gather(*(watch.initial_names() for watch in watches)) == [["c00"]] * 50
        readers = [asyncio.create_task(watch.changes(200)) for watch in watches]

        async def write(name: str, first: int) -> None:
            for revision in range(first, first + 20):
                await writer.put(name, revision)

        # Ten containers change simultaneously, twenty times each.
        await asyncio.gather(*(write(f"c{number:02d}", 2 if number == 0 else 1) for number in range(10)))
        events = await asyncio.gather(*readers)
        assert len(set(events[0])) == 200
        for number in range(10):
            name = f"c{number:02d}"
            own_events = [(kind, revision_name) for kind, revision_name in events[0] if revision_name.startswith(name)]
            first = 2 if number == 0 else 1
            assert own_events == [
                ("added" if revision == 1 else "modified", f"{name}.{revision}")
                for revision in range(first, first + 20)
            ]
        assert all(other == events[0] for other in events), "the order differs between watches"
        for watch in watches:
            watch.call.cancel()


@pytest.mark.deep
async def test_a_watch_that_is_not_read_takes_no_memory_and_loses_no_change(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller, open_writer(rig.etcd.endpoint, daemons.prefix) as writer:
        slow_watch, prompt_watch = ContainerWatch(caller), ContainerWatch(caller)
        assert await slow_watch.initial_names() == await prompt_watch.initial_names() == []
        for revision in range(1, 31):
            await writer.put("a", revision, **large_spec(revision))
        assert len(await prompt_watch.changes(30)) == 30
        before = await asyncio.to_thread(_resident_bytes, daemon)
        for revision in range(31, 431):
            await writer.put("a", revision, **large_spec(revision))
            # The watch that is read gets each change without delay.
            assert await prompt_watch.changes(1) == [("modified", f"a.{revision}")]
        # The changes have 80 MB.
        growth = await asyncio.to_thread(_resident_bytes, daemon) - before
        assert growth < 40_000_000, f"{growth / 1e6:.0f} MB more for a watch that is not read"
        assert await slow_watch.changes(430) == [
            ("added", "a.1"),
            *[("modified", f"a.{revision}") for revision in range(2, 431)],
        ]
        for watch in (slow_watch, prompt_watch):
            watch.call.cancel()


def _resident_bytes(daemon: Daemon) -> int:
    """The resident memory of a daemon in bytes."""
    return int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_a_daemon_that_stops_ends_its_watches_with_shutting_down(daemons: IsolatedDaemons) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller:
        watches = [ContainerWatch(caller) for _ in range(3)]
        for watch in watches:
            await watch.initial_names()
        daemon.terminate()
        for watch in watches:
            failed = await watch.failure()
            assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert await asyncio.to_thread(daemon.wait) == 0
    assert "Traceback" not in daemon.log_text


@pytest.mark.deep
async def test_cancelled_watches_leave_no_memory(daemons: IsolatedDaemons, rig: Rig) -> None:
    daemon = await daemons.start()
    async with Caller(daemon.target) as caller, open_writer(rig.etcd.endpoint, daemons.prefix) as writer:
        await writer.put("a", 1)
        for _ in range(100):
            watch = ContainerWatch(caller)
            await watch.initial_names()
            watch.call.cancel()
        before = await asyncio.to_thread(_resident_bytes, daemon)
        for _ in range(300):
            watch = ContainerWatch(caller)
            await watch.initial_names()
            watch.call.cancel()
        await writer.put("a", 2)
        growth = await asyncio.to_thread(_resident_bytes, daemon) - before
        assert growth < 10_000_000, f"{growth / 1e6:.1f} MB"
    assert await asyncio.to_thread(daemon.stop) == 0
    assert "Traceback" not in daemon.log_text, daemon.log_text
