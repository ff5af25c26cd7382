"""Watches of the store on a real etcd: each change exactly once, also after compactions and outages."""

from __future__ import annotations

import asyncio
import os
import signal
from datetime import timedelta

import pytest
from aetcd import rpc
from gpudock_server.adapters.etcd import EmbeddedEtcd, EtcdConnection, EtcdStore, messages
from gpudock_server.adapters.etcd.keys import Keys
from gpudock_server.errors import InvalidArgument, ResumeTokenExpired, StoreUnavailable
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.store_changes import (
    PutContainer,
)
from gpudock_server.ports import ContainerView, StoreEvent

from tests.contracts.store_examples import Reader, put, watching
from tests.engine.conditions import until_true
from tests.engine.etcd_examples import container, open_connection
from tests.rig import Rig, freeze
from tests.rig.patience import limit

pytest_plugins = ["tests.engine.etcd_fixtures"]

# Longer than any test, so that no watch becomes idle.
QUIET = timedelta(seconds=60)
IDLE = timedelta(seconds=0.3)


@pytest.fixture
async def store(connection: EtcdConnection, prefix: str) -> EtcdStore:
    store = EtcdStore(connection, prefix=prefix, idle=QUIET)
    await store.open()
    return store


async def compact(connection: EtcdConnection) -> None:
    """Compact up to the current revision."""
    revision = (await connection.txn(success=[messages.get(b"nothing")])).revision
    await connection._client.kvstub.Compact(rpc.CompactionRequest(revision=revision, physical=True), timeout=limit(5))


async def test_the_token_of_an_idle_watch_advances(connection: EtcdConnection, prefix: str, store: EtcdStore) -> None:
    idle = EtcdStore(connection, prefix=prefix, idle=IDLE)
    version = await put(store, "a", 1)
    async with watching(idle, listing=False) as reader, watching(idle, listing=False) as other:
        tokens = {(await reader.next_event()).token for _ in range(4)}
        assert len(tokens) == 4, "a token was repeated"
        await read_events(other, 1)
        before = await count_idle_puts(connection, prefix)
        await asyncio.gather(read_events(reader, 5), read_events(other, 5))
        # The same puts reach both watches, of which one may be an event behind the other.
        assert await count_idle_puts(connection, prefix) - before <= 6
        await compact(connection)
        await put(store, "a", 2)
        async with watching(idle, reader.token) as resumed:
            assert await resumed.next_changes(1) == [("a.1", "a.2")], "the token is older than the compaction"
    assert version < connection.revision
    assert await store.unfinished("n1") == ()


async def count_idle_puts(connection: EtcdConnection, prefix: str) -> int:
    """How often the idle key of containers has been put."""
    keys = Keys(prefix)
    key = keys.watched(ResourceKind.CONTAINER, keys.containers()).idle
    response = await connection._client.kvstub.Range(rpc.RangeRequest(key=key), timeout=limit(5))
    return int(response.kvs[0].version)


async def read_events(reader: Reader, times: int) -> None:
    for _ in range(times):
        await reader.next_event()


async def test_a_token_of_a_compacted_revision_or_another_etcd_has_expired(
    connection: EtcdConnection, store: EtcdStore, own_etcd: EmbeddedEtcd
) -> None:
    await put(store, "a", 1)
    async with watching(store) as reader:
        listed = (await reader.next_event()).token
        changed = (await reader.next_event()).token
    await put(store, "a", 2)
    await put(store, "a", 3)
    await compact(connection)
    for token in (listed, changed):
        with pytest.raises(ResumeTokenExpired):
            async with watching(store, token) as reader:
                await reader.next_changes(1)
    # The revision of an etcd that was restored from a backup, or of another etcd, is lower than that of the token.
    async with open_connection(own_etcd.address.endpoints[0]) as young:
        other = EtcdStore(young, prefix=store._keys._prefix)
        await other.open()
        with pytest.raises(ResumeTokenExpired):
            async with watching(other, changed) as reader:
                await reader.next_changes(1)


async def test_a_reader_that_is_slower_than_a_compaction_gets_an_error_and_no_gap(
    connection: EtcdConnection, store: EtcdStore
) -> None:
    await put(store, "a", 1, **_large(1))
    async with watching(store, listing=False) as reader:
        await reader.next_event()
        # More than the flow control of the stream and etcd's own buffers hold.
        for generation in range(2, 400):
            await put(store, "a", generation, **_large(generation))
        await compact(connection)
        events: list[StoreEvent[ContainerView]] = []
        with pytest.raises(ResumeTokenExpired):
            await read_until_error(reader, events)
        numbers = [event.after.container.generation for event in events if event.after]
        assert numbers == list(range(2, 2 + len(numbers))), "the events before the error have a gap"
        before = [event.before.container.generation for event in events if event.before]
        assert before == [number - 1 for number in numbers], "an event has another previous generation"
        with pytest.raises(StopAsyncIteration):
            await reader.next_event()


async def read_until_error(reader: Reader, events: list[StoreEvent[ContainerView]]) -> None:
    while True:
        events.append(await reader.next_event())


def _large(number: int) -> dict[str, object]:
    spec = container("a").spec
    return {"spec": spec.model_copy(update={"env": {"LARGE": f"{number} " + "x" * 200_000}})}


@pytest.mark.deep
async def test_a_batch_in_fragments_can_be_resumed_at_each_event(store: EtcdStore) -> None:
    async with watching(store) as reader:
        start = (await reader.next_event()).token
    names = [f"c{number:02d}" for number in range(6)]
    for round_number in range(1, 8):
        views = [await store.container(name) for name in names]
        await store.apply(
            [
                PutContainer(container(name, generation=round_number, **_large(1)), expect=view.version if view else 0)
                for name, view in zip(names, views, strict=True)
            ]
        )
    # One batch has 8 MB, and 8 MB of previous values; a message has at most 2 MB.
    expected = [
        (f"{name}.{number - 1}" if number > 1 else "", f"{name}.{number}") for number in range(1, 8) for name in names
    ]
    async with watching(store, start) as reader:
        tokens = []
        for change in expected:
            assert await reader.next_changes(1) == [change]
            tokens.append(reader.token)
    # Some of the tokens are in the middle of a revision, at the end of a fragment.
    for number, token in enumerate(tokens[:-1]):
        async with watching(store, token) as reader:
            assert await reader.next_changes(1) == [expected[number + 1]], f"after event {number}"


async def test_tokens_of_another_prefix_are_refused(store: EtcdStore, connection: EtcdConnection, prefix: str) -> None:
    other = EtcdStore(connection, prefix="/elsewhere" + prefix)
    await put(store, "a", 1)
    async with watching(store) as reader:
        token = (await reader.next_event()).token
    with pytest.raises(InvalidArgument) as refused:
        async with watching(other, token) as reader:
            await reader.next_event()
    assert refused.value.violations[0].field == "resume_token"


@pytest.mark.deep
async def test_a_watch_continues_after_a_kill_and_a_freeze_of_etcd(own_etcd: EmbeddedEtcd) -> None:
    async with open_connection(own_etcd.address.endpoints[0], timeout=1) as connection:
        store = EtcdStore(connection, idle=QUIET, deadline=timedelta(seconds=limit(8)))
        await store.open()
        await put(store, "a", 1)
        async with watching(store) as reader:
            assert await reader.next_changes(1) == [("", "a.1")]
            for generation in range(2, 5):
                following = asyncio.create_task(reader.next_changes(1))
                # The embedded etcd restarts its process.
                os.kill(own_etcd.pid, signal.SIGKILL)
                await put(store, "a", generation)
                assert await following == [(f"a.{generation - 1}", f"a.{generation}")]
            pid = own_etcd.pid
            following = asyncio.create_task(reader.next_changes(1))
            await asyncio.sleep(0)
            freeze(pid)
            await asyncio.sleep(1)
            os.kill(pid, signal.SIGCONT)
            await put(store, "a", 5)
            assert await following == [("a.4", "a.5")]


@pytest.mark.deep
async def test_a_watch_fails_when_etcd_stays_unavailable(own_etcd: EmbeddedEtcd) -> None:
    async with open_connection(own_etcd.address.endpoints[0], timeout=0.5) as connection:
        store = EtcdStore(connection, idle=IDLE, deadline=timedelta(seconds=limit(1)))
        await store.open()
        async with watching(store, listing=False) as reader:
            await reader.next_event()
            freeze(own_etcd.pid)
            try:
                # A connection without responses is detected within seconds; then the deadline of the store begins.
                async with asyncio.timeout(limit(30)):
                    with pytest.raises(StoreUnavailable):
                        await read_until_error(reader, [])
            finally:
                os.kill(own_etcd.pid, signal.SIGCONT)


async def test_closing_a_watch_ends_its_tasks(store: EtcdStore, rig: Rig) -> None:
    async with open_connection(rig.etcd.endpoint) as connection:
        watched_store = EtcdStore(connection, prefix=store._keys._prefix, idle=QUIET)
        before = len(asyncio.all_tasks())
        for _ in range(20):
            async with watching(watched_store, listing=False) as reader:
                await reader.next_event()
                following = asyncio.ensure_future(reader.next_event())
                await asyncio.sleep(0.01)
                following.cancel()
                await asyncio.wait({following})
        await until_true(lambda: len(asyncio.all_tasks()) <= before + 2, "the tasks of closed watches have ended")


def test_a_watch_spans_containers_locks_and_its_idle_key() -> None:
    keys = Keys("/p/")
    watched = keys.watched(ResourceKind.CONTAINER, keys.containers())
    for key in (keys.container("a"), keys.lock(ResourceKind.CONTAINER, "a"), watched.idle):
        assert watched.span.holds(key)
    # Operations are written often, and a watch of containers must not receive them.
    assert not watched.span.holds(keys.operation("op"))
    assert watched.heads.rest(keys.container("a")) == watched.locks.rest(keys.lock(ResourceKind.CONTAINER, "a")) == b"a"
