"""Watches of the store on a real etcd: every change once and as it was, whatever breaks in between."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta

import pytest
from aetcd import rpc
from gpudock_server.adapters.etcd import EmbeddedEtcd, EtcdConnection, EtcdStore, wire
from gpudock_server.adapters.etcd.keys import Keys
from gpudock_server.errors import InvalidArgument, ResumeTokenExpired, StoreUnavailable
from gpudock_server.model.changes import (
    Change,
    Claim,
    DeleteContainer,
    Lock,
    PutContainer,
    PutOperation,
    PutVolume,
    Unlock,
)
from gpudock_server.model.spec import Mount
from gpudock_server.model.target import TargetKind
from gpudock_server.ports import ContainerView, Seen, VolumeSeen

from tests.engine.etcd_examples import GPU, connected, container, holder, operation, volume
from tests.rig import Rig, freeze

pytest_plugins = ["tests.engine.etcd_fixtures"]

# Long enough that nothing of a test is an idle watch's.
QUIET = timedelta(seconds=60)
IDLE = timedelta(seconds=0.3)
SOON = 10.0


@pytest.fixture
async def store(connection: EtcdConnection, prefix: str) -> EtcdStore:
    store = EtcdStore(connection, prefix=prefix, idle=QUIET)
    await store.open()
    return store


class Reader:
    """Reads a watch. `told` is what each change says: before, after, operation; checkpoints are left out."""

    def __init__(self, watch: AsyncGenerator[Seen[ContainerView], None]) -> None:
        self.watch = watch
        self.token = ""

    async def seen(self) -> Seen[ContainerView]:
        """The next, whatever it is."""
        async with asyncio.timeout(SOON):
            seen = await anext(self.watch)
        self.token = seen.token
        return seen

    async def told(self, count: int) -> list[tuple[str, str]]:
        """The next changes of containers."""
        told: list[tuple[str, str]] = []
        while len(told) < count:
            seen = await self.seen()
            if seen.before or seen.after:
                told.append((_text(seen.before), _text(seen.after)))
        return told


def _text(view: ContainerView | None) -> str:
    if view is None:
        return ""
    return f"{view.container.name}.{view.container.generation} {view.operation_id}".strip()


@asynccontextmanager
async def watching(store: EtcdStore, token: str = "", *, listing: bool = True) -> AsyncIterator[Reader]:
    async with aclosing(store.watch_containers(token=token, listing=listing)) as watch:
        yield Reader(watch)


async def put(store: EtcdStore, name: str, generation: int, *others: Change, **fields: object) -> int:
    """Write a head, whatever stands there."""
    view = await store.container(name)
    head = container(name, generation=generation, **fields)
    return await store.apply([PutContainer(head, expect=view.version if view else 0), *others])


async def delete(store: EtcdStore, name: str, *others: Change) -> int:
    view = await store.container(name)
    assert view is not None
    return await store.apply([DeleteContainer(name, view.container.uid, view.version), *others])


async def compact(connection: EtcdConnection) -> None:
    """Forget everything but what is there now."""
    revision = (await connection.txn(success=[wire.get(b"nothing")])).revision
    await connection._client.kvstub.Compact(rpc.CompactionRequest(revision=revision, physical=True), timeout=5)


async def test_the_list_and_then_every_change_with_its_lock(store: EtcdStore) -> None:
    await put(store, "a", 1)
    await put(store, "b", 1, Lock(TargetKind.CONTAINER, "b", "op1"))
    async with watching(store) as reader:
        assert await reader.told(2) == [("", "a.1"), ("", "b.1 op1")]
        complete = await reader.seen()
        assert complete.list_complete
        assert complete.before is complete.after is None
        await put(store, "c", 1, Lock(TargetKind.CONTAINER, "c", "op2"), PutOperation(operation("op2"), expect=0))
        # A lock alone, without the head; and claims, which are nobody's business here.
        await store.apply([Unlock(TargetKind.CONTAINER, "b", "op1"), Claim("h1", GPU, holder("b"))])
        await store.apply([Lock(TargetKind.CONTAINER, "nobody", "op3")])
        # Two objects in one transaction.
        a, b = await store.container("a"), await store.container("b")
        assert a is not None
        assert b is not None
        await store.apply(
            [
                PutContainer(container("b", generation=2), expect=b.version),
                PutContainer(container("a", generation=2), expect=a.version),
                Lock(TargetKind.CONTAINER, "a", "op4"),
            ]
        )
        await delete(store, "a", Unlock(TargetKind.CONTAINER, "a", "op4"))
        await put(store, "a", 3)
        assert await reader.told(6) == [
            ("", "c.1 op2"),
            ("b.1 op1", "b.1"),
            ("a.1", "a.2 op4"),
            ("b.1", "b.2"),
            ("a.2 op4", ""),
            ("", "a.3"),
        ]
    seen = await store.containers(page_size=10, page_token="")
    assert [_text(view) for view in seen.items] == ["a.3", "b.2", "c.1 op2"], "what the watch has told adds up to it"


async def test_every_token_goes_on_behind_its_own_message(store: EtcdStore) -> None:
    for name in ("a", "b", "c"):
        await put(store, name, 1)
    heads = [await store.container(name) for name in ("a", "b", "c")]
    async with watching(store) as reader:
        everything = [await reader.seen() for _ in range(2)]
        await put(store, "d", 1)
        await store.apply(
            [PutContainer(container(one.container.name, generation=2), expect=one.version) for one in heads if one]
        )
        await delete(store, "d")
        everything += [await reader.seen() for _ in range(7)]
    told = [(_text(one.before), _text(one.after)) for one in everything]
    assert told == [
        ("", "a.1"),
        ("", "b.1"),
        ("", "c.1"),
        ("", ""),
        ("", "d.1"),
        ("a.1", "a.2"),
        ("b.1", "b.2"),
        ("c.1", "c.2"),
        ("d.1", ""),
    ]
    for at, seen in enumerate(everything):
        async with watching(store, seen.token) as reader:
            rest = [one for one in told[at + 1 :] if one != ("", "")]
            assert await reader.told(len(rest)) == rest, f"behind message {at}"


async def test_a_list_and_the_watch_behind_it_lose_nothing(store: EtcdStore) -> None:
    for number in range(120):
        await put(store, f"c{number:03d}", 1)
    pages = [await store.containers(page_size=60, page_token="")]
    await put(store, "c000", 2)
    pages.append(await store.containers(page_size=60, page_token=pages[0].next_token))
    assert pages[0].watch_token == pages[1].watch_token
    async with watching(store, pages[1].watch_token) as reader:
        greeting = await reader.seen()
        assert (greeting.before, greeting.after, greeting.list_complete) == (None, None, False)
        assert await reader.told(1) == [("c000.1", "c000.2")]
    async with watching(store) as reader:
        # Longer than a page of its own; what happens meanwhile comes behind it.
        first = await reader.told(10)
        await put(store, "c119", 2)
        rest = await reader.told(111)
        assert [*first, *rest] == [
            *[("", f"c{number:03d}.{2 if number == 0 else 1}") for number in range(120)],
            ("c119.1", "c119.2"),
        ]
    async with watching(store, listing=False) as reader:
        assert not (await reader.seen()).list_complete
        await put(store, "c001", 2)
        assert await reader.told(1) == [("c001.1", "c001.2")]


async def test_an_idle_watch_moves_on(connection: EtcdConnection, prefix: str, store: EtcdStore) -> None:
    idle = EtcdStore(connection, prefix=prefix, idle=IDLE)
    version = await put(store, "a", 1)
    async with watching(idle, listing=False) as reader, watching(idle, listing=False) as other:
        tokens = {(await reader.seen()).token for _ in range(4)}
        assert len(tokens) == 4, "each is newer than the one before"
        before = connection.revision
        await asyncio.gather(_hear(reader, 5), _hear(other, 5))
        assert connection.revision - before <= 6, "watches that are idle together put one key between them"
        await compact(connection)
        await put(store, "a", 2)
        async with watching(idle, reader.token) as resumed:
            assert await resumed.told(1) == [("a.1", "a.2")], "a token of before the compaction would be too old"
    assert version < connection.revision
    assert await store.unfinished("n1") == ()


async def _hear(reader: Reader, times: int) -> None:
    for _ in range(times):
        await reader.seen()


async def test_what_was_compacted_away_is_said_to_be(
    connection: EtcdConnection, store: EtcdStore, own_etcd: EmbeddedEtcd
) -> None:
    await put(store, "a", 1)
    async with watching(store) as reader:
        listed = (await reader.seen()).token
        told = (await reader.seen()).token
    await put(store, "a", 2)
    await put(store, "a", 3)
    await compact(connection)
    for token in (listed, told):
        with pytest.raises(ResumeTokenExpired):
            async with watching(store, token) as reader:
                await reader.told(1)
    # An etcd that was put back from a backup, or is another one, has not come as far as the token.
    async with connected(own_etcd.address.endpoints[0]) as young:
        other = EtcdStore(young, prefix=store._keys._prefix)
        await other.open()
        with pytest.raises(ResumeTokenExpired):
            async with watching(other, told) as reader:
                await reader.told(1)


async def test_a_reader_that_lags_behind_a_compaction(connection: EtcdConnection, store: EtcdStore) -> None:
    await put(store, "a", 1, **_large(1))
    async with watching(store, listing=False) as reader:
        await reader.seen()
        # More than the flow control of the stream and etcd's own buffers hold.
        for generation in range(2, 400):
            await put(store, "a", generation, **_large(generation))
        await compact(connection)
        seen: list[Seen[ContainerView]] = []
        with pytest.raises(ResumeTokenExpired):
            await _exhaust(reader, seen)
        numbers = [one.after.container.generation for one in seen if one.after]
        assert numbers == list(range(2, 2 + len(numbers))), "what it got before is without a gap"
        before = [one.before.container.generation for one in seen if one.before]
        assert before == [number - 1 for number in numbers], "and nothing is added that was there"
        with pytest.raises(StopAsyncIteration):
            await reader.seen()


async def _exhaust(reader: Reader, seen: list[Seen[ContainerView]]) -> None:
    while True:
        seen.append(await reader.seen())


def _large(number: int) -> dict[str, object]:
    spec = container("a").spec
    return {"spec": spec.model_copy(update={"env": {"LARGE": f"{number} " + "x" * 200_000}})}


@pytest.mark.deep
async def test_a_batch_that_comes_in_fragments(store: EtcdStore) -> None:
    async with watching(store) as reader:
        start = (await reader.seen()).token
    names = [f"c{number:02d}" for number in range(6)]
    for round_number in range(1, 8):
        views = [await store.container(name) for name in names]
        await store.apply(
            [
                PutContainer(container(name, generation=round_number, **_large(1)), expect=view.version if view else 0)
                for name, view in zip(names, views, strict=True)
            ]
        )
    # Eight megabytes, with as much that was there before, in one batch of messages that hold two at most.
    expected = [
        (f"{name}.{number - 1}" if number > 1 else "", f"{name}.{number}") for number in range(1, 8) for name in names
    ]
    async with watching(store, start) as reader:
        tokens = []
        for one in expected:
            assert await reader.told(1) == [one]
            tokens.append(reader.token)
    # Also where a fragment ended in the midst of a revision.
    for at, token in enumerate(tokens[:-1]):
        async with watching(store, token) as reader:
            assert await reader.told(1) == [expected[at + 1]], f"behind {at}"


async def test_nonsense_is_refused(store: EtcdStore, connection: EtcdConnection, prefix: str) -> None:
    other = EtcdStore(connection, prefix="/elsewhere" + prefix)
    await put(store, "a", 1)
    async with watching(store) as reader:
        mine = (await reader.seen()).token
    for store_, token in ((store, "x"), (store, "W10"), (store, mine[:-4]), (other, mine), (store, "é" * 3)):
        with pytest.raises(InvalidArgument) as refused:
            async with watching(store_, token) as reader:
                await reader.seen()
        assert refused.value.violations[0].field == "resume_token"


@pytest.mark.deep
async def test_an_etcd_that_dies_and_stands_still_in_the_middle(own_etcd: EmbeddedEtcd) -> None:
    async with connected(own_etcd.address.endpoints[0], timeout=1) as connection:
        store = EtcdStore(connection, idle=QUIET, deadline=timedelta(seconds=8))
        await store.open()
        await put(store, "a", 1)
        async with watching(store) as reader:
            assert await reader.told(1) == [("", "a.1")]
            for generation in range(2, 5):
                following = asyncio.create_task(reader.told(1))
                # Its keeper starts it anew.
                os.kill(own_etcd.pid, signal.SIGKILL)
                await put(store, "a", generation)
                assert await following == [(f"a.{generation - 1}", f"a.{generation}")]
            pid = own_etcd.pid
            following = asyncio.create_task(reader.told(1))
            await asyncio.sleep(0)
            freeze(pid)
            await asyncio.sleep(1)
            os.kill(pid, signal.SIGCONT)
            await put(store, "a", 5)
            assert await following == [("a.4", "a.5")]


@pytest.mark.deep
async def test_an_etcd_that_stays_away(own_etcd: EmbeddedEtcd) -> None:
    async with connected(own_etcd.address.endpoints[0], timeout=0.5) as connection:
        store = EtcdStore(connection, idle=IDLE, deadline=timedelta(seconds=1))
        await store.open()
        async with watching(store, listing=False) as reader:
            await reader.seen()
            freeze(own_etcd.pid)
            try:
                # A connection that is silent is found out within seconds; then the store's own patience counts.
                async with asyncio.timeout(30):
                    with pytest.raises(StoreUnavailable):
                        await _exhaust(reader, [])
            finally:
                os.kill(own_etcd.pid, signal.SIGCONT)


async def test_leaving_frees_the_stream(store: EtcdStore, rig: Rig) -> None:
    async with connected(rig.etcd.endpoint) as connection:
        mine = EtcdStore(connection, prefix=store._keys._prefix, idle=QUIET)
        before = len(asyncio.all_tasks())
        for _ in range(20):
            async with watching(mine, listing=False) as reader:
                await reader.seen()
                following = asyncio.ensure_future(reader.seen())
                await asyncio.sleep(0.01)
                following.cancel()
                await asyncio.wait({following})
        await asyncio.sleep(0.1)
        assert len(asyncio.all_tasks()) <= before + 2


def test_one_range_spans_what_is_watched() -> None:
    keys = Keys("/p/")
    watched = keys.watched(TargetKind.CONTAINER, keys.containers())
    for key in (keys.container("a"), keys.lock(TargetKind.CONTAINER, "a"), watched.idle):
        assert watched.span.holds(key)
    # What is written often and is none of its business.
    assert not watched.span.holds(keys.operation("op"))
    assert watched.heads.rest(keys.container("a")) == watched.locks.rest(keys.lock(TargetKind.CONTAINER, "a")) == b"a"


async def test_who_mounts_a_volume_is_told_from_any_token_on(store: EtcdStore) -> None:
    chance = random.Random(7)  # noqa: S311 - the same every time, no secret
    names = ("a", "b", "c")
    for name in names[:2]:
        await store.apply([PutVolume(volume(name), expect=0)])
    before = await store.volumes(page_size=10, page_token="")
    mounted: dict[str, tuple[str, ...]] = {}
    for number in range(80):
        name = chance.choice(("x", "y", "z"))
        others: list[Change] = []
        if number == 40:
            others = [PutVolume(volume("c"), expect=0), Lock(TargetKind.VOLUME, "a", "op1")]
        if name in mounted and chance.random() < 0.3:
            del mounted[name]
            await delete(store, name, *others)
            continue
        # Mostly other mounts, now and then the same ones.
        mounted[name] = tuple(chance.sample(names, chance.randrange(4)))
        mounts = tuple(Mount(volume=one, target=f"/{one}") for one in mounted[name])
        await put(store, name, number + 1, *others, spec=container(name).spec.changed(mounts=mounts))
    after = {one.volume.name for one in (await store.volumes(page_size=10, page_token="")).items}
    expected = {name: tuple(sorted(one for one in mounted if name in mounted[one])) for name in after}

    async def tail(token: str) -> tuple[list[Seen[VolumeSeen]], dict[str, tuple[str, ...]]]:
        """What is told up to a change that is made now, and what it adds up to."""
        await store.apply([Lock(TargetKind.VOLUME, "b", "op2")])
        told, known = [], {}
        async with aclosing(store.watch_volumes(token=token, listing=False)) as watch:
            async with asyncio.timeout(SOON):
                async for seen in watch:
                    if seen.after is not None:
                        assert seen.before != seen.after, "nothing is told that changes nothing"
                        told.append(seen)
                        known[seen.after.view.volume.name] = seen.after.containers
                        if seen.after.view.operation_id == "op2":
                            break
        await store.apply([Unlock(TargetKind.VOLUME, "b", "op2")])
        return told, known

    whole, known = await tail(before.watch_token)
    assert known == expected
    changes = [(one.before, one.after) for one in whole]
    for index in range(0, len(whole) - 1, 7):
        rest, known = await tail(whole[index].token)
        assert [(one.before, one.after) for one in rest][: len(changes) - index - 1] == changes[index + 1 :]
