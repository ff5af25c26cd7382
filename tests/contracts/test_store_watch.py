"""ports.Store: watches of containers and volumes, every change once and in order, from any token on."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing

import pytest
from gpudock_server.errors import InvalidArgument, ResumeTokenExpired
from gpudock_server.model.resource import ResourceKind
from gpudock_server.model.spec import Mount
from gpudock_server.model.store_changes import (
    Claim,
    Lock,
    PutContainer,
    PutOperation,
    PutVolume,
    StoreChange,
    Unlock,
)
from gpudock_server.ports import Store, StoreEvent, VolumeDetails

from tests.contracts.store_examples import SOON, Forget, delete, put, text, watching
from tests.engine.etcd_examples import GPU, container, holder, operation, volume
from tests.rig.patience import limit

pytest_plugins = ["tests.contracts.store_fixtures"]

# MemoryStore does besides not: send an event every idle interval, and hold a writer back for a slow reader
# (tests/engine/test_etcd_watch.py).
NOT_FAKED: dict[str, dict[str, str]] = {}


@pytest.fixture
def store(any_store: Store) -> Store:
    return any_store


async def test_the_list_and_then_every_change_with_its_lock(store: Store) -> None:
    await put(store, "a", 1)
    await put(store, "b", 1, Lock(ResourceKind.CONTAINER, "b", "op1"))
    async with watching(store) as reader:
        assert await reader.told(2) == [("", "a.1"), ("", "b.1 op1")]
        complete = await reader.seen()
        assert complete.list_complete
        assert complete.before is complete.after is None
        await put(store, "c", 1, Lock(ResourceKind.CONTAINER, "c", "op2"), PutOperation(operation("op2"), expect=0))
        # A lock alone, without the head; and claims, which are nobody's business here.
        await store.apply([Unlock(ResourceKind.CONTAINER, "b", "op1"), Claim("h1", GPU, holder("b"))])
        await store.apply([Lock(ResourceKind.CONTAINER, "nobody", "op3")])
        # Two objects in one transaction.
        a, b = await store.container("a"), await store.container("b")
        assert a is not None
        assert b is not None
        await store.apply(
            [
                PutContainer(container("b", generation=2), expect=b.version),
                PutContainer(container("a", generation=2), expect=a.version),
                Lock(ResourceKind.CONTAINER, "a", "op4"),
            ]
        )
        await delete(store, "a", Unlock(ResourceKind.CONTAINER, "a", "op4"))
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
    assert [text(view) for view in seen.items] == ["a.3", "b.2", "c.1 op2"], "what the watch has told adds up to it"


async def test_every_token_goes_on_behind_its_own_message(store: Store) -> None:
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
    told = [(text(one.before), text(one.after)) for one in everything]
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


async def test_a_list_and_the_watch_behind_it_lose_nothing(store: Store) -> None:
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


async def test_without_a_list_only_what_happens_from_now_on_is_told(store: Store) -> None:
    await put(store, "a", 1)
    async with watching(store, listing=False) as reader:
        begun = await reader.seen()
        assert (begun.before, begun.after, begun.list_complete) == (None, None, False)
        await put(store, "a", 2)
        assert await reader.told(1) == [("a.1", "a.2")]


async def test_each_watch_is_told_everything(store: Store) -> None:
    async with watching(store) as one, watching(store) as other:
        for reader in (one, other):
            assert (await reader.seen()).list_complete
        await put(store, "a", 1)
        assert await one.told(1) == await other.told(1) == [("", "a.1")]


async def test_a_reader_that_is_cancelled_goes_on_from_its_last_token(store: Store) -> None:
    async with watching(store, listing=False) as reader:
        await reader.seen()
        waiting = asyncio.ensure_future(reader.seen())
        await asyncio.wait({waiting}, timeout=0.05)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
    await put(store, "a", 1)
    async with watching(store, reader.token) as resumed:
        assert await resumed.told(1) == [("", "a.1")]


async def test_tokens_that_are_no_tokens_of_this_watch_are_refused(store: Store) -> None:
    await put(store, "a", 1)
    async with watching(store) as reader:
        mine = (await reader.seen()).token
    of_volumes = (await store.volumes(page_size=1, page_token="")).watch_token
    for token in ("x", "W10", mine[:-4], "é" * 3, of_volumes):
        with pytest.raises(InvalidArgument) as refused:
            async with watching(store, token) as reader:
                await reader.seen()
        assert refused.value.violations[0].field == "resume_token"


async def test_tokens_that_are_old_have_expired(store: Store, forget: Forget) -> None:
    await put(store, "a", 1)
    async with watching(store) as reader:
        tokens = [(await reader.seen()).token for _ in range(2)]
    await put(store, "a", 2)
    await forget()
    for token in tokens:
        with pytest.raises(ResumeTokenExpired):
            async with watching(store, token) as reader:
                await reader.told(1)
    async with watching(store) as reader:
        assert await reader.told(1) == [("", "a.2")], "what is there now is not forgotten"


async def test_who_mounts_a_volume_is_told_from_any_token_on(store: Store) -> None:
    chance = random.Random(7)  # noqa: S311 - the same every time, no secret
    names = ("a", "b", "c")
    for name in names[:2]:
        await store.apply([PutVolume(volume(name), expect=0)])
    before = await store.volumes(page_size=10, page_token="")
    mounted: dict[str, tuple[str, ...]] = {}
    for number in range(80):
        name = chance.choice(("x", "y", "z"))
        others: list[StoreChange] = []
        if number == 40:
            others = [PutVolume(volume("c"), expect=0), Lock(ResourceKind.VOLUME, "a", "op1")]
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

    async def tail(token: str) -> tuple[list[StoreEvent[VolumeDetails]], dict[str, tuple[str, ...]]]:
        """What is told up to a change that is made now, and what it adds up to."""
        await store.apply([Lock(ResourceKind.VOLUME, "b", "op2")])
        told, known = [], {}
        async with aclosing(store.watch_volumes(token=token, listing=False)) as watch:
            async with asyncio.timeout(limit(SOON)):
                async for seen in watch:
                    if seen.after is not None:
                        assert seen.before != seen.after, "nothing is told that changes nothing"
                        told.append(seen)
                        known[seen.after.view.volume.name] = seen.after.containers
                        if seen.after.view.operation_id == "op2":
                            break
        await store.apply([Unlock(ResourceKind.VOLUME, "b", "op2")])
        return told, known

    whole, known = await tail(before.watch_token)
    assert known == expected
    changes = [(one.before, one.after) for one in whole]
    for index in range(0, len(whole) - 1, 7):
        rest, known = await tail(whole[index].token)
        assert [(one.before, one.after) for one in rest][: len(changes) - index - 1] == changes[index + 1 :]


async def test_a_watch_of_volumes_begins_with_the_list_and_who_mounts_them(store: Store) -> None:
    mounts = (Mount(volume="data", target="/data"),)
    await store.apply([PutVolume(volume("data"), expect=0), Lock(ResourceKind.VOLUME, "data", "op1")])
    await put(store, "web", 1, spec=container("web").spec.changed(mounts=mounts))
    async with aclosing(store.watch_volumes(token="", listing=True)) as watch, asyncio.timeout(limit(SOON)):
        listed = await anext(watch)
        assert listed.after is not None
        assert (listed.after.view.operation_id, listed.after.containers) == ("op1", ("web",))
        assert (await anext(watch)).list_complete
        await delete(store, "web")
        changed = await anext(watch)
        assert changed.after is not None
        assert changed.after.containers == ()
